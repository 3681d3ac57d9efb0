//! Whether an entry in a queue is lost, and why.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use crate::client::handle::{Client, display_key};
use crate::client::renewal::LeaseClock;
use crate::error::{Error, Result};

/// The loss of an entry, which tasks, the clock and the end of the client report.
///
/// The first reason stays: an entry that was seen as lost never counts as held again, even if a
/// late renewal shows that its lease survived. Otherwise two observers could disagree. Clones share
/// the loss.
#[derive(Clone)]
pub(super) struct Loss {
    client: Client,
    key: Vec<u8>,
    lease: i64,
    ttl: Duration,
    /// Goes on with the renewals of the lease.
    clock: LeaseClock,
    reason: watch::Sender<Option<Error>>,
}

impl Loss {
    /// No loss of the entry at `key` yet, whose lease lasts as long as `clock` says.
    pub(super) fn new(
        client: &Client,
        key: Vec<u8>,
        lease: i64,
        ttl: Duration,
        clock: LeaseClock,
    ) -> Self {
        Self {
            client: client.clone(),
            key,
            lease,
            ttl,
            clock,
            reason: watch::channel(None).0,
        }
    }

    fn report(&self, reason: Error) {
        self.reason.send_if_modified(|reported| {
            let is_first = reported.is_none();
            reported.get_or_insert(reason);
            is_first
        });
    }

    /// Starts a task that reports the error of `losing`. The end of the task's runtime is a loss
    /// too.
    pub(super) fn report_from(
        &self,
        losing: impl Future<Output = Error> + Send + 'static,
    ) -> AbortOnDropHandle<()> {
        let ending = ReportEndOnDrop(self.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let reason = losing.await;
            ending.0.report(reason);
        }))
    }

    /// Whether the entry is lost. Looks at the clock, because the task that renews the lease may
    /// stand still together with the process.
    pub(super) fn is_reported(&self) -> bool {
        if self.reason.borrow().is_some() {
            return true;
        }
        let reason = if self.client.is_closed() {
            self.client.closed_error()
        } else if self.clock.has_expired() {
            let expired_at = self.clock.expires_at();
            Error::LeaseUnconfirmed {
                id: self.lease,
                after: self.ttl + Instant::now().saturating_duration_since(expired_at),
                reason: "no renewal was confirmed in time".to_owned(),
            }
        } else {
            return false;
        };
        self.report(reason);
        true
    }

    /// Resolves when the entry is lost, with the reason. Looks at the clock whenever it is polled.
    pub(super) async fn reason(&self) -> Error {
        let mut reason = self.reason.subscribe();
        let mut reported = pin!(reason.wait_for(Option::is_some));
        let reason = poll_fn(|cx| {
            self.is_reported();
            reported.as_mut().poll(cx)
        });
        let reason = reason.await.ok().and_then(|reason| reason.clone());
        reason.unwrap_or_else(|| self.end_of_runtime())
    }

    /// The result of `work`, or the reason of the loss as soon as the entry is lost.
    pub(super) async fn or_reason<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        // Boxed, because the future is large and this is rare.
        let mut work = Box::pin(work);
        tokio::select! {
            biased;
            error = self.reason() => Err(error),
            result = &mut work => result,
        }
    }

    fn end_of_runtime(&self) -> Error {
        let operation = format!("hold {}", display_key(&self.key));
        self.client.runtime_error(operation)
    }
}

/// Reports the end of the runtime when a task is dropped before it has reported a loss.
struct ReportEndOnDrop(Loss);

impl Drop for ReportEndOnDrop {
    fn drop(&mut self) {
        self.0.report(self.0.end_of_runtime());
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::task::Poll;

    use futures::poll;
    use tokio::time::advance;

    use super::*;
    use crate::config::Config;

    const TTL: Duration = Duration::from_secs(2);

    fn loss() -> Loss {
        let client = Client::connect_lazy("main", Config::default()).unwrap();
        let clock = LeaseClock::new(Instant::now(), TTL);
        Loss::new(&client, b"l/7".to_vec(), 7, TTL, clock)
    }

    #[tokio::test(start_paused = true)]
    async fn entry_is_lost_by_the_clock_alone() {
        let loss = loss();
        let mut waiting = pin!(loss.reason());
        let mut working = pin!(loss.or_reason(async { Ok(()) }));
        assert!(poll!(&mut waiting).is_pending());
        advance(TTL - Duration::from_millis(1)).await;
        assert!(!loss.is_reported());
        advance(TTL * 2).await;
        // No task has reported anything.
        let Poll::Ready(reason) = poll!(&mut waiting) else {
            panic!("still waiting");
        };
        assert!(
            matches!(reason, Error::LeaseUnconfirmed { id: 7, after, .. } if after > TTL * 2),
            "{reason}"
        );
        assert!(loss.is_reported());
        // Work that ended meanwhile came too late.
        assert!(matches!(poll!(&mut working), Poll::Ready(Err(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn late_renewal_does_not_undo_a_loss() {
        let loss = loss();
        advance(TTL).await;
        assert!(loss.is_reported());
        loss.clock.renew(Instant::now(), TTL);
        loss.report(Error::LeaseNotFound { id: 7 });
        assert!(loss.is_reported());
        let reason = loss.reason().await;
        assert!(matches!(reason, Error::LeaseUnconfirmed { .. }), "{reason}");
    }

    #[tokio::test(start_paused = true)]
    async fn renewed_entry_is_held_past_its_first_ttl() {
        let loss = loss();
        for _ in 0..3 {
            advance(TTL / 2).await;
            loss.clock.renew(Instant::now(), TTL);
        }
        assert!(!loss.is_reported());
    }

    #[tokio::test]
    async fn dropped_task_reports_the_end_of_its_runtime() {
        let loss = loss();
        let task = loss.report_from(pending());
        assert!(!loss.is_reported());
        drop(task);
        let reason = loss.reason().await;
        assert!(matches!(reason, Error::RuntimeEnded { .. }), "{reason}");
    }
}
