//! A lease that is kept alive in the background.

use std::fmt;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::LeaseKeepAliveResponse;
use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::handle::Client;
use super::lease::{ABOVE_0, Link, check, is_over, keeping};
use super::wire::Route;
use crate::backoff::Backoff;
use crate::balance::Tried;
use crate::error::{Error, Result};

/// Keeping leases alive.
impl Client {
    /// Keeps a lease alive: a task of its own renews it at a third of its TTL, whether the stream
    /// is polled or not, until the [`KeepAlive`] is dropped. Returns after the first renewal.
    pub async fn keep_alive(&self, id: i64) -> Result<KeepAlive> {
        check(id, ABOVE_0)?;
        let open = || async {
            let sent = Instant::now();
            let (first, link) = self.renewed(id, None).await?;
            Ok((sent, first, link))
        };
        let (sent, first, link) = self.opened_stream(|| keeping(id), open).await?;
        let keeping = Keeping {
            client: self.clone(),
            id,
            link: Some(link),
            ttl: seconds(first.ttl()),
            renewed: sent,
        };
        let (answers, latest) = watch::channel(Ok(first));
        Ok(KeepAlive::new(
            latest,
            AbortOnDropHandle::new(tokio::spawn(keeping.run(answers))),
        ))
    }
}

/// The renewals of a lease, from [`Client::keep_alive`].
///
/// Yields the latest answer; those that nobody fetched in time are skipped, so it may be left
/// unpolled. While etcd cannot be reached it keeps trying. Once the TTL has passed since the last
/// renewal that was answered was sent, the lease may have expired: in that moment, whatever is being
/// tried then, the stream yields [`Error::LeaseUnconfirmed`], once; and it goes on, since a restarted
/// etcd extends its leases. It ends with [`Error::LeaseNotFound`] when etcd says that the lease is gone,
/// with [`Error::Closed`] when the client is closed, or with [`Error::Rpc`] when etcd refuses the user.
///
/// Dropping it stops the renewals; the lease then expires in its time.
#[must_use = "the lease is kept alive only while this is held"]
pub struct KeepAlive {
    answers: BoxStream<'static, Result<LeaseKeepAliveResponse>>,
    _renewals: AbortOnDropHandle<()>,
}

impl KeepAlive {
    fn new(
        mut latest: watch::Receiver<Result<LeaseKeepAliveResponse>>,
        renewals: AbortOnDropHandle<()>,
    ) -> Self {
        // The first answer is there already, and is yielded too.
        latest.mark_changed();
        let answers = unfold(latest, |mut latest| async {
            latest.changed().await.ok()?;
            let answer = latest.borrow_and_update().clone();
            Some((answer, latest))
        });
        KeepAlive {
            answers: answers.boxed(),
            _renewals: renewals,
        }
    }
}

impl Stream for KeepAlive {
    type Item = Result<LeaseKeepAliveResponse>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.answers.poll_next_unpin(cx)
    }
}

impl fmt::Debug for KeepAlive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAlive").finish_non_exhaustive()
    }
}

struct Keeping {
    client: Client,
    id: i64,
    link: Option<Link>,
    ttl: Duration,
    /// When the last renewal that was answered had been sent: the lease lasts a TTL from
    /// then on at least.
    renewed: Instant,
}

impl Keeping {
    async fn run(mut self, answers: watch::Sender<Result<LeaseKeepAliveResponse>>) {
        let client = self.client.clone();
        loop {
            match client.unless_closed(self.round(&answers)).await {
                Ok(answer) => drop(answers.send_replace(Ok(answer))),
                Err(error) => {
                    drop(answers.send_replace(Err(error)));
                    return;
                }
            }
        }
    }

    /// Waits until it is time, and renews the lease or learns that it is gone. When it may have expired
    /// before that, it tells.
    async fn round(
        &mut self,
        answers: &watch::Sender<Result<LeaseKeepAliveResponse>>,
    ) -> Result<LeaseKeepAliveResponse> {
        let (id, renewed, ttl) = (self.id, self.renewed, self.ttl);
        let (tell, failed) = watch::channel("a renewal is not answered".to_owned());
        let mut renewal = pin!(async {
            sleep(ttl / 3).await;
            self.renew(&tell).await
        });
        // Whatever is under way then: etcd gives what hangs on the lease to others in that moment.
        let expires = sleep(ttl.saturating_sub(renewed.elapsed()));
        tokio::select! {
            biased;
            result = &mut renewal => return result,
            () = expires => {}
        }
        let reason = failed.borrow().clone();
        drop(answers.send_replace(Err(Error::LeaseUnconfirmed {
            id,
            after: renewed.elapsed(),
            reason,
        })));
        renewal.await
    }

    /// Tries until the lease is renewed or is gone, and tells how the last try failed.
    async fn renew(&mut self, tell: &watch::Sender<String>) -> Result<LeaseKeepAliveResponse> {
        // A hung member must leave time for others within the TTL.
        let one_try = (self.ttl / 3).min(self.client.inner.config.request_timeout);
        let tried = Tried::default();
        let mut pauses = Backoff::for_etcd();
        loop {
            let sent = Instant::now();
            let route = Route {
                only: None,
                tried: Some(tried.clone()),
            };
            let try_once = route.of(self.client.renewed(self.id, self.link.take()));
            let error = match timeout(one_try, try_once).await {
                Ok(Ok((answer, link))) => {
                    self.link = Some(link);
                    self.ttl = seconds(answer.ttl());
                    self.renewed = sent;
                    return Ok(answer);
                }
                Ok(Err(error)) => error,
                Err(_) => Error::Timeout {
                    operation: keeping(self.id),
                    after: one_try,
                },
            };
            if is_over(&error) {
                return Err(error);
            }
            tell.send_replace(error.to_string());
            sleep(pauses.next()).await;
        }
    }
}

fn seconds(ttl: i64) -> Duration {
    // etcd answers with one second or more for a lease that is there.
    Duration::from_secs(ttl.max(1).unsigned_abs())
}
