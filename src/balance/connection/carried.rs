//! The calls that a connection carried.

use std::sync::Arc;
use std::time::Duration;

use super::state::ConnectionState;

/// A connection that ends sooner, before any call used it, was only greeted. Proxies close idle
/// connections after a longer time.
pub(crate) const GREETING: Duration = Duration::from_millis(100);

/// Whether the server of a connection has served a call on it. Holds the connection's state and not
/// the connection itself.
///
/// Recorded where frames are read and not by the call, because a connection may end before the
/// call's task runs.
#[derive(Debug, Clone)]
pub(crate) struct Carried(Arc<ConnectionState>);

impl Carried {
    pub(crate) fn of(state: &Arc<ConnectionState>) -> Self {
        Self(Arc::clone(state))
    }

    pub(crate) fn has_served(&self) -> bool {
        self.0.has_served()
    }

    /// Whether the server has announced the end of the connection and has accepted calls on it, which
    /// may still be served.
    pub(crate) fn has_accepted(&self) -> bool {
        self.0.has_accepted()
    }

    /// Whether the server was sent a request.
    pub(crate) fn had_request(&self) -> bool {
        // Stream ids begin with 1.
        self.0.is_written(1)
    }

    /// Whether the peer has announced the end of the connection and may still serve the calls in
    /// flight.
    pub(super) fn is_draining(&self) -> bool {
        self.0.close_reason.is_graceful() && self.0.has_calls()
    }

    /// Resolves when the server has served a call. A connection whose peer announced its end may
    /// still carry responses.
    pub(crate) async fn wait_until_served(&self) {
        self.0.wait_until_served().await;
    }

    /// Whether a call may still be served: the connection, or a call on it, is alive.
    pub(crate) fn may_change(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}
