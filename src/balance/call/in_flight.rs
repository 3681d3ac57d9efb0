//! An attempt that is in flight, as its endpoint's load counts it.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::balance::pool::Endpoint;

/// A call that was sent to an endpoint. Its end, or its drop, takes it from the load.
#[derive(Debug)]
pub(super) struct InFlight {
    endpoint: Arc<Endpoint>,
    begun: Instant,
    /// When the call's time is over.
    deadline: Option<Instant>,
    /// Whether the load has learned the latency.
    observed: bool,
}

impl InFlight {
    pub(super) fn begin(endpoint: Arc<Endpoint>, deadline: Option<Instant>, now: Instant) -> Self {
        endpoint.load.begin();
        Self {
            endpoint,
            begun: now,
            deadline,
            observed: false,
        }
    }

    pub(super) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// The response has begun, or the call has failed.
    pub(super) fn observe(&mut self, failed: bool) {
        let now = Instant::now();
        self.endpoint.load.observe(now - self.begun, failed, now);
        self.observed = true;
    }

    /// The response began and did not end well. How long it went on until then says nothing about how
    /// long an answer takes.
    pub(super) fn broke_off(&self) {
        self.endpoint
            .load
            .observe(Duration::ZERO, true, Instant::now());
    }

    /// It was not sent after all, or failed by itself: nothing is to be learned from it.
    pub(super) fn says_nothing(mut self) {
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
        let waited = now - self.begun;
        // A silent endpoint must not look fast.
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            // Its time was over: that is a failure as any other.
            self.endpoint.load.observe(waited, true, now);
        } else {
            // Given up by the caller. How long an answer takes is not known, but it is not less than this.
            self.endpoint.load.observe_at_least(waited, now);
        }
    }
}
