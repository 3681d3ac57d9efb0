//! The keep-alive interval of an endpoint, which grows when the server asks for fewer pings.
//!
//! A server may permit fewer pings than [`ping_budget`](super::ping_budget) assumes. gRFC A8 asks
//! the client to double the interval when the server ends a connection because of "too_many_pings".
//! The interval doubles up to the longest pause that servers demand by default, because a server
//! that still complains then may do so whatever the client does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use h2::Reason;
use parking_lot::Mutex;

use super::go_away::GoAway;
use super::ping_budget;

/// The debug data of the GOAWAY (gRFC A8). The code alone has other meanings, too.
const TOO_MANY_PINGS: &[u8] = b"too_many_pings";

/// How often the interval of an endpoint was doubled. Shared by the endpoint's connections, present
/// and future.
#[derive(Debug, Clone, Default)]
pub(super) struct Doublings(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    count: AtomicU32,
    /// The cause of the latest doubling, and the setting that prevents it.
    advice: Mutex<Option<String>>,
}

impl Doublings {
    /// Why the interval was doubled, and what to set. `None` if it was not.
    pub(super) fn advice(&self) -> Option<String> {
        // Without a lock while nothing was doubled, which is usual.
        let is_doubled = self.0.count.load(Ordering::Acquire) > 0;
        is_doubled.then(|| self.0.advice.lock().clone())?
    }
}

/// All are equal, because the doublings are no property of a target.
impl PartialEq for Doublings {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Doublings {}

/// The keep-alive interval of one connection.
#[derive(Debug)]
pub(super) struct PingInterval {
    address: Arc<str>,
    configured: Option<Duration>,
    endpoint: Doublings,
    /// The endpoint's doublings when the connection was made.
    doublings: u32,
}

impl PingInterval {
    pub(super) fn new(
        address: &Arc<str>,
        configured: Option<Duration>,
        endpoint: &Doublings,
    ) -> Self {
        Self {
            address: Arc::clone(address),
            configured,
            endpoint: endpoint.clone(),
            doublings: endpoint.0.count.load(Ordering::Relaxed),
        }
    }

    /// `None` if the connection is not pinged.
    pub(super) fn get(&self) -> Option<Duration> {
        Some(doubled(self.configured?, self.doublings))
    }

    /// Doubles the interval of the endpoint's next connections, if the server ended this one
    /// because of too many pings. Returns a text for the user.
    pub(super) fn on_go_away(&self, go_away: &GoAway) -> Option<String> {
        let is_too_many =
            go_away.code == Reason::ENHANCE_YOUR_CALM && go_away.debug_data == TOO_MANY_PINGS;
        let configured = self.configured.filter(|_| is_too_many)?;
        let next = self.doublings + 1;
        let interval = doubled(configured, next);
        let advice = format!(
            "the keep-alive interval is {interval:?} now; set `http2_keep_alive_interval` to what \
             the server permits"
        );
        let endpoint = &self.endpoint.0;
        *endpoint.advice.lock() = Some(format!("{go_away}; {advice}"));
        let is_longest = self.doublings > 0 && Some(interval) == self.get();
        if is_longest {
            return Some(advice);
        }
        // Fails if another connection, made at the same interval, has doubled it already.
        let (set, fetch) = (Ordering::Release, Ordering::Relaxed);
        let exchanged = endpoint
            .count
            .compare_exchange(self.doublings, next, set, fetch);
        if exchanged.is_ok() {
            tracing::warn!(
                address = %self.address,
                ?interval,
                "the server closed a connection because of too many pings; set \
                 `http2_keep_alive_interval` to what the server permits"
            );
        }
        Some(advice)
    }
}

fn doubled(interval: Duration, times: u32) -> Duration {
    let factor = 1u32.checked_shl(times).unwrap_or(u32::MAX);
    let longest = interval.max(ping_budget::WITHOUT_STREAM);
    interval.saturating_mul(factor).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn go_away(code: Reason, debug_data: &[u8]) -> GoAway {
        GoAway {
            last_stream: 0,
            code,
            debug_data: debug_data.to_vec(),
        }
    }

    fn connect(endpoint: &Doublings) -> PingInterval {
        PingInterval::new(&"a:1".into(), Some(10 * SECOND), endpoint)
    }

    #[test]
    fn code_and_debug_data_together_double_the_interval() {
        let calm = Reason::ENHANCE_YOUR_CALM;
        let endpoint = Doublings::default();
        for other in [
            go_away(calm, b""),
            go_away(calm, b"too_many_pings_or_so"),
            go_away(Reason::NO_ERROR, TOO_MANY_PINGS),
        ] {
            assert_eq!(connect(&endpoint).on_go_away(&other), None);
        }
        assert_eq!(connect(&endpoint).get(), Some(10 * SECOND));
        assert_eq!(endpoint.advice(), None);
        let advice = connect(&endpoint).on_go_away(&go_away(calm, TOO_MANY_PINGS));
        assert!(advice.unwrap().contains("interval is 20s now"));
        assert!(endpoint.advice().unwrap().starts_with("GOAWAY"));
        assert_eq!(connect(&endpoint).get(), Some(20 * SECOND));
    }

    #[test]
    fn connections_made_at_the_same_interval_double_it_once() {
        let too_many = go_away(Reason::ENHANCE_YOUR_CALM, TOO_MANY_PINGS);
        let endpoint = Doublings::default();
        let connections = [connect(&endpoint), connect(&endpoint)];
        for connection in connections {
            assert!(connection.on_go_away(&too_many).is_some());
        }
        assert_eq!(connect(&endpoint).get(), Some(20 * SECOND));
    }

    #[test]
    fn interval_grows_up_to_the_longest_usual_pause() {
        let too_many = go_away(Reason::ENHANCE_YOUR_CALM, TOO_MANY_PINGS);
        let endpoint = Doublings::default();
        for _ in 0..100 {
            connect(&endpoint).on_go_away(&too_many);
        }
        let interval = connect(&endpoint).get();
        assert_eq!(interval, Some(ping_budget::WITHOUT_STREAM));
        // 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 7260 s.
        assert_eq!(endpoint.0.count.load(Ordering::Relaxed), 10);
        // An interval that is longer already stays.
        let configured = 3 * ping_budget::WITHOUT_STREAM;
        let long = PingInterval::new(&"a:1".into(), Some(configured), &endpoint);
        assert_eq!(long.get(), Some(configured));
        assert!(long.on_go_away(&too_many).is_some());
    }

    #[test]
    fn connection_without_pings_stays_without() {
        let endpoint = Doublings::default();
        let off = PingInterval::new(&"a:1".into(), None, &endpoint);
        let too_many = go_away(Reason::ENHANCE_YOUR_CALM, TOO_MANY_PINGS);
        assert_eq!(off.on_go_away(&too_many), None);
        assert_eq!(off.get(), None);
    }
}
