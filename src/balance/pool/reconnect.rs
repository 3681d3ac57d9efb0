//! When to connect again after an attempt has failed or a connection has ended.
//!
//! Servers and proxies end healthy connections all the time: after a number of requests, at a
//! certain age, or when they are idle. Backoff separates failed attempts (gRPC's "Connection
//! Backoff Protocol"), so a connection that carried a response is replaced at once. A connection
//! that was ready and carried no response is replaced at once too, but only a few times in a row,
//! because a server may greet every connection and close it.

use std::ops::Range;
use std::time::Duration;

use crate::backoff::Backoff;

/// The first pause and the jitter of gRPC's connection backoff ("GRPC Connection Backoff
/// Protocol").
pub(super) const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_JITTER: Range<f64> = 0.8..1.2;

/// How many connections in a row that carried no response are replaced at once.
const MAX_UNANSWERED: u32 = 2;

/// When the next attempt to connect is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Now,
    /// After a pause that counts from the start of the last attempt.
    After {
        pause: Duration,
        /// Whether a waiting call cuts the pause short.
        on_demand: bool,
    },
}

/// Decides when one connection of an endpoint is made again.
#[derive(Debug)]
pub(super) struct Reconnect {
    backoff: Backoff,
    /// Connections in a row that were ready and ended without a response.
    unanswered: u32,
    /// Whether the last attempt was made for a waiting call during a pause.
    was_on_demand: bool,
}

impl Reconnect {
    pub(super) fn new(max_backoff: Duration) -> Self {
        Self {
            backoff: Backoff::with_jitter(BACKOFF_BASE, max_backoff, BACKOFF_JITTER),
            unanswered: 0,
            was_on_demand: false,
        }
    }

    /// An attempt to connect has failed.
    pub(super) fn on_failed(&mut self) -> Next {
        self.was_on_demand = false;
        Next::After {
            pause: self.backoff.next(),
            on_demand: false,
        }
    }

    /// A connection has ended that was ready for `lifetime` and carried no response.
    ///
    /// A connection that lasted longer than the first pause cannot be part of a tight loop, so it
    /// counts as one that worked.
    pub(super) fn on_unanswered(&mut self, lifetime: Duration) -> Next {
        if lifetime >= BACKOFF_BASE {
            return self.on_answered();
        }
        self.unanswered += 1;
        let was_on_demand = std::mem::take(&mut self.was_on_demand);
        if self.unanswered <= MAX_UNANSWERED {
            return Next::Now;
        }
        Next::After {
            pause: self.backoff.next(),
            // One attempt for a waiting call. If that ends without a response too, the pause holds.
            on_demand: !was_on_demand,
        }
    }

    /// A connection has ended that carried a response, or an ended one carries a response now.
    pub(super) fn on_answered(&mut self) -> Next {
        self.backoff.reset();
        self.unanswered = 0;
        self.was_on_demand = false;
        Next::Now
    }

    /// The pause was cut short by a waiting call.
    pub(super) fn on_demand(&mut self) {
        self.was_on_demand = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(5);

    fn reconnect() -> Reconnect {
        Reconnect::new(Duration::from_secs(30))
    }

    /// The pause in seconds, and whether a waiting call cuts it short.
    fn pause(next: Next) -> (f64, bool) {
        match next {
            Next::Now => panic!("no pause"),
            Next::After { pause, on_demand } => (pause.as_secs_f64(), on_demand),
        }
    }

    #[test]
    fn answered_connections_are_replaced_at_once_for_ever() {
        let mut reconnect = reconnect();
        for _ in 0..1_000 {
            assert_eq!(reconnect.on_answered(), Next::Now);
        }
    }

    #[test]
    fn unanswered_connections_are_replaced_at_once_twice() {
        let mut reconnect = reconnect();
        for _ in 0..2 {
            assert_eq!(reconnect.on_unanswered(SHORT), Next::Now);
        }
        let pauses: Vec<f64> = (0..4)
            .map(|_| pause(reconnect.on_unanswered(SHORT)).0)
            .collect();
        assert!((0.8..1.2).contains(&pauses[0]), "{pauses:?}");
        assert!((3.2..5.0).contains(&pauses[3]), "{pauses:?}");
        assert_eq!(reconnect.on_answered(), Next::Now);
        assert_eq!(reconnect.on_unanswered(SHORT), Next::Now);
    }

    #[test]
    fn connection_that_lasted_starts_over() {
        let mut reconnect = reconnect();
        for _ in 0..10 {
            reconnect.on_unanswered(SHORT);
        }
        assert_eq!(reconnect.on_unanswered(BACKOFF_BASE), Next::Now);
        assert_eq!(reconnect.on_unanswered(SHORT), Next::Now);
    }

    #[test]
    fn failed_attempts_pause_and_no_call_cuts_them_short() {
        let mut reconnect = reconnect();
        let (first, on_demand) = pause(reconnect.on_failed());
        assert!((0.8..1.2).contains(&first), "{first}");
        assert!(!on_demand);
        let (second, on_demand) = pause(reconnect.on_failed());
        assert!((1.28..1.92).contains(&second), "{second}");
        assert!(!on_demand);
        reconnect.on_answered();
        assert!(pause(reconnect.on_failed()).0 < 1.2);
    }

    #[test]
    fn waiting_call_cuts_one_pause_short() {
        let mut reconnect = reconnect();
        for _ in 0..2 {
            reconnect.on_unanswered(SHORT);
        }
        assert!(pause(reconnect.on_unanswered(SHORT)).1);
        reconnect.on_demand();
        assert!(!pause(reconnect.on_unanswered(SHORT)).1);
        // That pause ran to its end, so the next attempt was not for a call.
        assert!(pause(reconnect.on_unanswered(SHORT)).1);
        reconnect.on_demand();
        assert_eq!(reconnect.on_answered(), Next::Now);
    }
}
