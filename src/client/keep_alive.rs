//! Renewing leases: once, on behalf of a registrar, or in the background.

use std::fmt;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::LeaseKeepAliveResponse;
use futures::stream::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_stream::wrappers::WatchStream;
use tokio_util::task::AbortOnDropHandle;

use super::etcd_error::EtcdError;
use super::handle::Client;
use super::lease::{ID_NOT_POSITIVE, validate_id};
use super::probes::probe_ttl;
use super::renewal::{LeaseClock, LeaseStreams, Pace, Renewed, operation};
use super::transport::CallOptions;
use crate::backoff::Backoff;
use crate::balance::AttemptRecord;
use crate::error::{Error, Result};

/// Renewals of leases. The calls fail like [`Client::revoke`].
///
/// All renewals of a client share their streams, usually one. A renewal that gets no response is
/// also sent to another member: after a twelfth of the TTL and at most 1 s, or after up to four
/// times as long if the last response of the member was slow.
impl Client {
    /// Renews a lease once. The response has its new TTL.
    pub async fn keep_alive_once(&self, id: i64) -> Result<LeaseKeepAliveResponse> {
        validate_id(id, ID_NOT_POSITIVE)?;
        let mut renewer = Renewer::new(self, id);
        self.with_timeout(|| operation(id), renewer.renew_until_final())
            .await
    }

    /// Keeps a lease alive: a background task renews it every third of its TTL until the
    /// [`KeepAlive`] is dropped, whether or not the stream is polled. Returns after the first
    /// renewal.
    pub async fn keep_alive(&self, id: i64) -> Result<KeepAlive> {
        validate_id(id, ID_NOT_POSITIVE)?;
        let mut renewer = Renewer::new(self, id);
        let renewal = renewer.renew_until_final();
        let first = self.with_timeout(|| operation(id), renewal).await?;
        let clock = renewer.clock.clone();
        let (responses, latest) = watch::channel(Ok(first));
        Ok(KeepAlive {
            responses: WatchStream::new(latest),
            clock,
            _renewer: AbortOnDropHandle::new(tokio::spawn(renewer.run(responses))),
        })
    }

    /// The renewals of a registrar's leases.
    pub(crate) fn renewals(&self) -> Renewals {
        Renewals {
            client: self.clone(),
            streams: LeaseStreams::of(self),
        }
    }

    /// Renews a lease once, and confirms a response that it is gone. `ttl` is the lease's, if it is
    /// known.
    async fn renew_confirmed(
        &self,
        streams: &LeaseStreams,
        id: i64,
        ttl: Option<Duration>,
    ) -> Result<Renewed> {
        match streams.renew(id, Pace::of_ttl(ttl)).await {
            Ok(renewed) if self.probes().contains(id, renewed.response.ttl()) => {
                Err(self.revoke_probe(id).await)
            }
            Err(Error::LeaseNotFound { .. }) => Err(self.confirm_gone(id, ttl).await),
            renewed => renewed,
        }
    }

    /// Confirms with a probe that a lease is gone, and returns the error of its renewal.
    ///
    /// A leader responds to a renewal from the log entries that it has applied. A new leader may
    /// not have applied the grant yet and then responds that the lease does not exist (etcd#6978;
    /// seen with 3.5.1). A grant goes through the log, so etcd refuses to grant an id that exists.
    async fn confirm_gone(&self, id: i64, ttl: Option<Duration>) -> Error {
        let ttl = probe_ttl(ttl.map(|ttl| ttl.as_secs().try_into().unwrap_or(i64::MAX)));
        let probes = self.probes();
        let may_exist = probes.remember(id, ttl);
        let granted = self.grant_raw(ttl, id).await;
        let error = match granted {
            Ok(granted) => {
                probes.remember(id, granted.ttl());
                return self.revoke_probe(id).await;
            }
            Err(error) => error,
        };
        let refused = match EtcdError::of(&error) {
            EtcdError::LeaseExists => Error::LeaseNotApplied { id },
            // An etcd without space grants nothing until it has space again, so the probe says
            // nothing and the renewal's own response counts.
            EtcdError::NoSpace => Error::LeaseNotFound { id },
            // The probe may have been granted nevertheless. The next renewal finds it by its TTL.
            _ => return error,
        };
        if !may_exist {
            probes.forget(id);
        }
        refused
    }

    /// Revokes the probe that has replaced a lease, and returns the error for the lease. A probe
    /// that cannot be revoked is remembered until it expires.
    async fn revoke_probe(&self, id: i64) -> Error {
        if let Err(error) = self.revoke(id).await {
            tracing::debug!(%error, "cannot revoke a probe lease, leaving it to expire");
        }
        Error::LeaseNotFound { id }
    }
}

/// The renewals of a registrar's leases, from [`Client::renewals`]. Clones share their streams,
/// which end with the last of them.
#[derive(Clone)]
pub(crate) struct Renewals {
    client: Client,
    streams: Arc<LeaseStreams>,
}

impl Renewals {
    /// Renews a lease of `ttl` once, within `request_timeout`. Returns when the renewal was sent,
    /// from when the lease lasts a TTL.
    ///
    /// A response that the lease is gone is not confirmed, because the registrar then grants a new
    /// lease anyway. The probe would create a lease with the same id for a moment. If this process
    /// died before revoking it, keys put under it in that moment would stay until it expires.
    pub(crate) async fn renew(&self, id: i64, ttl: Duration) -> Result<Instant> {
        let renewal = self.streams.renew(id, Pace::of_ttl(Some(ttl)));
        let renewed = self.client.with_timeout(|| operation(id), renewal).await?;
        if self.client.probes().contains(id, renewed.response.ttl()) {
            return Err(self.client.revoke_probe(id).await);
        }
        Ok(renewed.sent_at)
    }
}

/// The renewals of a lease, from [`Client::keep_alive`].
///
/// A stream of the responses. A response that is not fetched before the next one is skipped, so the
/// stream may be left unpolled. While etcd cannot be reached, the renewals are retried. The errors:
///
/// - [`Error::LeaseUnconfirmed`], once per loss: no renewal was confirmed for a whole TTL, so the
///   lease may have expired. The item comes at that moment. The stream goes on, because a restarted
///   etcd extends its leases.
/// - [`Error::LeaseNotFound`]: etcd says that the lease is gone. The stream ends.
/// - [`Error::Closed`]: the client was closed. The stream ends.
/// - [`Error::RuntimeEnded`]: the Tokio runtime has ended on which the client was built, or
///   [`Client::keep_alive`] was called. The stream ends.
/// - [`Error::Rpc`]: etcd refuses the user. The stream ends.
///
/// Dropping it stops the renewals, and the lease expires after its TTL.
#[must_use = "dropping a `KeepAlive` stops the renewals, and the lease expires"]
pub struct KeepAlive {
    responses: WatchStream<Result<LeaseKeepAliveResponse>>,
    clock: LeaseClock,
    _renewer: AbortOnDropHandle<()>,
}

impl KeepAlive {
    /// How long the lease certainly lasts. The clock goes on with the renewals of this value.
    pub(super) fn clock(&self) -> LeaseClock {
        self.clock.clone()
    }
}

impl Stream for KeepAlive {
    type Item = Result<LeaseKeepAliveResponse>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.responses.poll_next_unpin(cx)
    }
}

impl fmt::Debug for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAlive").finish_non_exhaustive()
    }
}

/// The renewals of one lease.
struct Renewer {
    client: Client,
    streams: Arc<LeaseStreams>,
    id: i64,
    /// `None` before the first renewal.
    ttl: Option<Duration>,
    /// When the last confirmed renewal was sent.
    renewed_at: Instant,
    clock: LeaseClock,
    /// The latest failure of the current renewal, if it was not that of a stream.
    last_error: Arc<Mutex<Option<String>>>,
}

impl Renewer {
    fn new(client: &Client, id: i64) -> Self {
        let now = Instant::now();
        Self {
            client: client.clone(),
            streams: LeaseStreams::of(client),
            id,
            ttl: None,
            renewed_at: now,
            clock: LeaseClock::new(now, Duration::ZERO),
            last_error: Arc::default(),
        }
    }

    async fn run(mut self, responses: watch::Sender<Result<LeaseKeepAliveResponse>>) {
        let client = self.client.clone();
        let mut responses = ResponsesOfTask {
            responses,
            id: self.id,
            is_over: false,
        };
        while !responses.is_over {
            let renewing = self.renew_once_due(&responses.responses);
            let renewed = client.or_closed(renewing).await;
            responses.is_over = renewed.is_err();
            drop(responses.responses.send_replace(renewed));
        }
    }

    /// Waits until a renewal is due, and renews the lease. Reports meanwhile, if no renewal
    /// succeeds within the TTL, that the lease may have expired.
    async fn renew_once_due(
        &mut self,
        responses: &watch::Sender<Result<LeaseKeepAliveResponse>>,
    ) -> Result<LeaseKeepAliveResponse> {
        let (id, expires_at) = (self.id, self.clock.expires_at());
        let ttl = self.ttl.unwrap_or_default();
        let due_at = self.renewed_at + ttl / 3;
        let (client, last_error) = (self.client.clone(), Arc::clone(&self.last_error));
        let record = AttemptRecord::default();
        let options = CallOptions {
            record: Some(record.clone()),
            ..CallOptions::default()
        };
        let mut renewal = pin!(options.scope(async {
            sleep_until(due_at).await;
            self.renew_until_final().await
        }));
        // The renewal keeps running: at the same moment etcd hands the keys of the lease to others.
        tokio::select! {
            biased;
            result = &mut renewal => return result,
            () = sleep_until(expires_at) => {}
        }
        let reason = last_error.lock().clone();
        drop(responses.send_replace(Err(Error::LeaseUnconfirmed {
            id,
            after: ttl + expires_at.elapsed(),
            reason: reason.unwrap_or_else(|| client.no_response_reason(&record)),
        })));
        renewal.await
    }

    /// Retries until the lease is renewed or the failure is final.
    async fn renew_until_final(&mut self) -> Result<LeaseKeepAliveResponse> {
        let mut backoff = Backoff::for_etcd();
        loop {
            let renewal = self
                .client
                .renew_confirmed(&self.streams, self.id, self.ttl);
            match renewal.await {
                Ok(Renewed { sent_at, response }) => {
                    let ttl = granted_ttl(&response);
                    self.ttl = Some(ttl);
                    self.renewed_at = sent_at;
                    self.clock.renew(sent_at, ttl);
                    *self.last_error.lock() = None;
                    return Ok(response);
                }
                Err(error) if error.is_permanent() => return Err(error),
                Err(error) => *self.last_error.lock() = Some(error.to_string()),
            }
            sleep(backoff.next()).await;
        }
    }
}

/// The responses of a [`Renewer`]. If its task is dropped because the runtime has ended, an error
/// is the last item.
struct ResponsesOfTask {
    responses: watch::Sender<Result<LeaseKeepAliveResponse>>,
    id: i64,
    is_over: bool,
}

impl Drop for ResponsesOfTask {
    fn drop(&mut self) {
        if !self.is_over {
            drop(self.responses.send_replace(Err(Error::RuntimeEnded {
                operation: operation(self.id),
                what: "the client",
            })));
        }
    }
}

/// The TTL in a response; at least one second, as for every lease that exists.
fn granted_ttl(response: &LeaseKeepAliveResponse) -> Duration {
    Duration::from_secs(response.ttl().max(1).unsigned_abs())
}
