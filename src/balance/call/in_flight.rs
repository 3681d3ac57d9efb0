//! An attempt in flight, as its endpoint's load counts it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::balance::pool::Endpoint;

/// An attempt that counts as in flight on its endpoint until this guard is dropped.
///
/// A guard that is dropped before [`observe`](Self::observe) or [`discard`](Self::discard) belongs
/// to an attempt without a response. Its wait then becomes the latency sample, so that an endpoint
/// that does not respond never looks fast.
#[derive(Debug)]
pub(super) struct InFlight {
    endpoint: Arc<Endpoint>,
    started: Instant,
    /// The call's deadline.
    deadline: Option<Instant>,
    /// Whether the load has its sample of this attempt, or should get none.
    observed: bool,
}

impl InFlight {
    pub(super) fn begin(
        endpoint: Arc<Endpoint>,
        deadline: Option<Instant>,
        started: Instant,
    ) -> Self {
        endpoint.load.begin();
        Self {
            endpoint,
            started,
            deadline,
            observed: false,
        }
    }

    pub(super) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Records the latency, because the response has begun or the attempt has failed.
    pub(super) fn observe(&mut self, failed: bool) {
        let now = Instant::now();
        self.endpoint.load.observe(now - self.started, failed, now);
        self.observed = true;
    }

    /// Records a failure of a response that had begun. The duration of the response is no latency
    /// sample, because latency is measured up to a response's head.
    pub(super) fn record_broken_stream(&self) {
        self.endpoint
            .load
            .observe(Duration::ZERO, true, Instant::now());
    }

    /// Ends the attempt without a sample: it was never sent, or the client caused the failure.
    pub(super) fn discard(mut self) {
        self.observed = true;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.endpoint.load.end();
        if self.observed {
            return;
        }
        let now = Instant::now();
        let waited = now - self.started;
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            // A missed deadline is a failure like any other.
            self.endpoint.load.observe(waited, true, now);
        } else {
            // The caller cancelled the call. The latency is unknown, but at least this long.
            self.endpoint.load.observe_lower_bound(waited, now);
        }
    }
}
