//! Renewing leases: once, on behalf of a registrar, or in the background.

use std::fmt;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{LeaseKeepAliveResponse, LeaseKeepAliveStream, LeaseKeeper};
use futures::stream::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::WatchStream;
use tokio_util::task::AbortOnDropHandle;

use super::etcd_error::EtcdError;
use super::handle::{Client, STREAM_OPEN_TIMEOUT};
use super::lease::{ID_NOT_POSITIVE, PROBE_TTL, lease_error, validate_id};
use super::renewal::LeaseClock;
use super::transport::CallOptions;
use crate::backoff::Backoff;
use crate::balance::AttemptedEndpoints;
use crate::error::{Error, Result};

/// Renewals of leases. The calls fail like [`Client::revoke`].
impl Client {
    /// Renews a lease once. The response has its new TTL.
    pub async fn keep_alive_once(&self, id: i64) -> Result<LeaseKeepAliveResponse> {
        validate_id(id, ID_NOT_POSITIVE)?;
        self.open_stream(|| operation(id), || self.renew_confirmed(id, None))
            .await
            .map(|(response, _)| response)
    }

    /// Keeps a lease alive: a background task renews it every third of its TTL until the
    /// [`KeepAlive`] is dropped, whether or not the stream is polled. Returns after the first
    /// renewal.
    pub async fn keep_alive(&self, id: i64) -> Result<KeepAlive> {
        validate_id(id, ID_NOT_POSITIVE)?;
        let open = || async {
            let sent_at = Instant::now();
            let (first, stream) = self.renew_confirmed(id, None).await?;
            Ok((sent_at, first, stream))
        };
        let (sent_at, first, stream) = self.open_stream(|| operation(id), open).await?;
        let renewer = Renewer {
            client: self.clone(),
            id,
            stream: Some(stream),
            ttl: granted_ttl(&first),
            clock: LeaseClock::new(sent_at, granted_ttl(&first)),
        };
        let clock = renewer.clock.clone();
        let (responses, latest) = watch::channel(Ok(first));
        Ok(KeepAlive {
            responses: WatchStream::new(latest),
            clock,
            _renewer: AbortOnDropHandle::new(tokio::spawn(renewer.run(responses))),
        })
    }

    /// Renews a lease for a registrar: on `stream`, which the previous renewal returned, or else on
    /// a new one, on any member. Each member may take `per_member` to respond, at most
    /// [`STREAM_OPEN_TIMEOUT`].
    ///
    /// A response that the lease is gone is not confirmed, because the registrar then grants a new
    /// lease anyway. The probe would create a lease with the same id for a moment. If this process
    /// died before revoking it, keys put under it in that moment would stay until it expires.
    pub(crate) async fn renew(
        &self,
        id: i64,
        stream: Option<RenewalStream>,
        per_member: Duration,
    ) -> Result<RenewalStream> {
        let per_member = per_member.min(STREAM_OPEN_TIMEOUT);
        if let Some(stream) = stream {
            let renewal = Box::pin(self.renew_unconfirmed(id, Some(stream)));
            match timeout(per_member, self.or_closed(renewal)).await {
                Ok(Ok((_, stream))) => return Ok(stream),
                Ok(Err(error)) if error.is_permanent() => return Err(error),
                Ok(Err(error)) => tracing::debug!(%error, "lost a stream of renewals"),
                Err(_) => tracing::debug!(id, "no response to a renewal, trying another member"),
            }
        }
        let renew = || self.renew_unconfirmed(id, None);
        self.open_stream_within(per_member, || operation(id), renew)
            .await
            .map(|(_, stream)| stream)
    }

    /// Renews a lease once, and confirms a response that it is gone.
    async fn renew_confirmed(
        &self,
        id: i64,
        stream: Option<RenewalStream>,
    ) -> Result<(LeaseKeepAliveResponse, RenewalStream)> {
        match self.renew_unconfirmed(id, stream).await {
            Err(Error::LeaseNotFound { .. }) => Err(self.confirm_gone(id).await),
            renewed => renewed,
        }
    }

    /// Renews a lease once, on `stream` or a new one. After a failure the stream is dropped, so
    /// that a late response is never taken for the response to the next renewal.
    async fn renew_unconfirmed(
        &self,
        id: i64,
        stream: Option<RenewalStream>,
    ) -> Result<(LeaseKeepAliveResponse, RenewalStream)> {
        if let Some(stream) = stream {
            match self.renew_on(stream).await {
                // A stream keeps the token that it was opened with, and etcd checks that token at
                // each renewal (from 3.5.28 and 3.6.9 on). A new stream gets a fresh token, so its
                // refusal is final.
                Err(error) if EtcdError::of(&error).is_auth_refusal() => {
                    tracing::debug!(%error, "a stream of renewals was refused, opening another");
                }
                result => return result,
            }
        }
        let stream = self.open_renewal_stream(id).await?;
        self.renew_on(stream).await
    }

    async fn open_renewal_stream(&self, id: i64) -> Result<RenewalStream> {
        let mut lease = self.inner.transport.lease.clone();
        match lease.keep_alive(id).await {
            Ok((keeper, responses)) => Ok(RenewalStream {
                id,
                keeper,
                responses,
            }),
            Err(error) => Err(lease_error(operation(id), id, error)),
        }
    }

    async fn renew_on(
        &self,
        mut stream: RenewalStream,
    ) -> Result<(LeaseKeepAliveResponse, RenewalStream)> {
        let id = stream.id;
        match stream.renew().await? {
            response if response.ttl() == PROBE_TTL => Err(self.revoke_probe(id).await),
            response if response.ttl() > 0 => Ok((response, stream)),
            _ => Err(Error::LeaseNotFound { id }),
        }
    }

    /// Confirms with a probe that a lease is gone, and returns the error of its renewal.
    ///
    /// A leader responds to a renewal from the log entries that it has applied. A new leader may
    /// not have applied the grant yet and then responds that the lease does not exist (etcd#6978;
    /// seen with 3.5.1). A grant goes through the log, so etcd refuses to grant an id that exists.
    async fn confirm_gone(&self, id: i64) -> Error {
        match self.grant_raw(PROBE_TTL, id).await {
            Ok(_) => self.revoke_probe(id).await,
            Err(refused) if EtcdError::of(&refused) == EtcdError::LeaseExists => {
                Error::LeaseNotApplied { id }
            }
            // An etcd without space grants nothing until it has space again, so the probe says
            // nothing and the renewal's own response counts.
            Err(refused) if EtcdError::of(&refused) == EtcdError::NoSpace => {
                Error::LeaseNotFound { id }
            }
            // The probe may have been granted nevertheless; the next renewal finds it by its TTL.
            Err(unknown) => unknown,
        }
    }

    /// Revokes the probe that has replaced a lease, and returns the error for the lease. A probe
    /// that cannot be revoked is recognised by its TTL until it expires.
    async fn revoke_probe(&self, id: i64) -> Error {
        if let Err(error) = self.revoke(id).await {
            tracing::debug!(%error, "cannot revoke a probe lease, leaving it to expire");
        }
        Error::LeaseNotFound { id }
    }
}

/// A stream to one member on which a lease is renewed.
pub(crate) struct RenewalStream {
    id: i64,
    keeper: LeaseKeeper,
    responses: LeaseKeepAliveStream,
}

impl RenewalStream {
    /// Sends one renewal and waits for its response.
    async fn renew(&mut self) -> Result<LeaseKeepAliveResponse> {
        let failed = |error| lease_error(operation(self.id), self.id, error);
        self.keeper.keep_alive().await.map_err(failed)?;
        let response = self.responses.message().await.map_err(failed)?;
        response.ok_or_else(|| Error::StreamLost {
            operation: operation(self.id),
            reason: "the server ended the stream".to_owned(),
        })
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

/// The task behind a [`KeepAlive`].
struct Renewer {
    client: Client,
    id: i64,
    stream: Option<RenewalStream>,
    ttl: Duration,
    clock: LeaseClock,
}

impl Renewer {
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
        let (id, ttl, expires_at) = (self.id, self.ttl, self.clock.expires_at());
        let last_error = Mutex::new("no response to a renewal".to_owned());
        let mut renewal = pin!(async {
            sleep(ttl / 3).await;
            self.renew_until_final(&last_error).await
        });
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
            reason,
        })));
        renewal.await
    }

    /// Retries until the lease is renewed or the failure is final, and keeps the latest failure in
    /// `last_error`.
    async fn renew_until_final(
        &mut self,
        last_error: &Mutex<String>,
    ) -> Result<LeaseKeepAliveResponse> {
        // A hung member must leave time for others within the TTL.
        let limit = (self.ttl / 3).min(self.client.request_timeout());
        let options = CallOptions {
            attempted: Some(AttemptedEndpoints::default()),
            ..CallOptions::default()
        };
        let mut backoff = Backoff::for_etcd();
        let id = self.id;
        loop {
            let sent_at = Instant::now();
            let renewal = self.client.renew_confirmed(id, self.stream.take());
            let renewal = options.clone().scope(renewal);
            let renewed = self.client.within(limit, || operation(id), renewal);
            let error = match renewed.await {
                Ok((response, stream)) => {
                    self.stream = Some(stream);
                    self.ttl = granted_ttl(&response);
                    self.clock.renew(sent_at, self.ttl);
                    return Ok(response);
                }
                Err(error) => error,
            };
            if error.is_permanent() {
                return Err(error);
            }
            *last_error.lock() = error.to_string();
            sleep(backoff.next()).await;
        }
    }
}

/// The responses of a [`Renewer`]. If its task is dropped because the runtime has ended, an error is
/// the last item.
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

fn operation(id: i64) -> String {
    format!("keep lease {id:x} alive")
}
