//! HTTP/2 keep-alive: finding a peer that has stopped responding.

use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::Instant;

use super::state::ConnectionState;

/// HTTP/2 keep-alive: ping after `interval` without traffic, give up `timeout` later.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeepAliveSettings {
    /// `None` sends no pings.
    pub(crate) interval: Option<Duration>,
    pub(crate) timeout: Duration,
    /// Whether to ping a connection without calls.
    pub(crate) while_idle: bool,
}

/// Resolves when nothing arrived for the keep-alive interval and a ping then got no response within
/// the timeout.
pub(super) async fn keep_alive(
    pings: Option<PingPong>,
    state: &ConnectionState,
    settings: KeepAliveSettings,
) {
    let (Some(mut pings), Some(interval)) = (pings, settings.interval) else {
        return std::future::pending().await;
    };
    loop {
        let last = state.last_activity();
        tokio::time::sleep_until(last + interval).await;
        if state.last_activity() != last {
            continue;
        }
        if state.is_idle() && !settings.while_idle {
            tokio::time::sleep(interval).await;
            continue;
        }
        let deadline = Instant::now() + settings.timeout;
        // Fails while an earlier ping is outstanding; its pong serves as well.
        let _ = pings.send_ping(Ping::opaque());
        let pong = std::future::poll_fn(|cx| pings.poll_pong(cx));
        match tokio::time::timeout_at(deadline, pong).await {
            Ok(Ok(_)) => {}
            // The connection has ended; polling it returns the reason.
            Ok(Err(_)) => return std::future::pending().await,
            // Any bytes count, because a peer that sends is alive.
            Err(_) if state.last_activity() != last => {}
            Err(_) => return,
        }
    }
}
