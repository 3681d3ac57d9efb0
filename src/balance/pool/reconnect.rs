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
use crate::balance::connection::GREETING;

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
        /// How long after that start a waiting call cuts the pause short; `None` if no call does.
        on_demand: Option<Duration>,
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
            on_demand: None,
        }
    }

    /// A connection has ended that was ready for `lifetime` and carried no response, with or without
    /// a request.
    ///
    /// A connection that lasted longer than the first pause cannot be part of a tight loop, so it
    /// counts as one that worked.
    pub(super) fn on_unanswered(&mut self, lifetime: Duration, had_request: bool) -> Next {
        if lifetime >= BACKOFF_BASE {
            return self.on_answered();
        }
        self.count_unanswered();
        self.after_unanswered(lifetime, had_request)
    }

    /// A connection has ended earlier and has carried no response after all.
    pub(super) fn count_unanswered(&mut self) {
        self.unanswered += 1;
    }

    /// The server has announced the end of a connection and may still respond to calls on it. The
    /// connection is not counted.
    pub(super) fn on_accepted(&mut self, lifetime: Duration) -> Next {
        if lifetime >= BACKOFF_BASE {
            return self.on_answered();
        }
        self.after_unanswered(lifetime, true)
    }

    fn after_unanswered(&mut self, lifetime: Duration, had_request: bool) -> Next {
        let was_on_demand = std::mem::take(&mut self.was_on_demand);
        if self.unanswered <= MAX_UNANSWERED {
            return Next::Now;
        }
        let on_demand = if !was_on_demand {
            Some(Duration::ZERO)
        } else if had_request || lifetime < GREETING {
            // The attempt for a waiting call led to nothing, so the pause holds.
            None
        } else {
            // The call left before the connection was ready, and the server waited for a request.
            // Another call gets its attempt. Callers that come and go all the time make no more
            // attempts than a server whose connections last just as long.
            Some(BACKOFF_BASE)
        };
        Next::After {
            pause: self.backoff.next(),
            on_demand,
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

    /// The pause in seconds, and when a waiting call cuts it short.
    fn pause(next: Next) -> (f64, Option<Duration>) {
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
            assert_eq!(reconnect.on_unanswered(SHORT, false), Next::Now);
        }
        let pauses: Vec<f64> = (0..4)
            .map(|_| pause(reconnect.on_unanswered(SHORT, false)).0)
            .collect();
        assert!((0.8..1.2).contains(&pauses[0]), "{pauses:?}");
        assert!((3.2..5.0).contains(&pauses[3]), "{pauses:?}");
        assert_eq!(reconnect.on_answered(), Next::Now);
        assert_eq!(reconnect.on_unanswered(SHORT, false), Next::Now);
    }

    #[test]
    fn connection_that_lasted_starts_over() {
        let mut reconnect = reconnect();
        for _ in 0..10 {
            reconnect.on_unanswered(SHORT, false);
        }
        assert_eq!(reconnect.on_unanswered(BACKOFF_BASE, false), Next::Now);
        assert_eq!(reconnect.on_unanswered(SHORT, false), Next::Now);
    }

    #[test]
    fn failed_attempts_pause_and_no_call_cuts_them_short() {
        let mut reconnect = reconnect();
        let (first, on_demand) = pause(reconnect.on_failed());
        assert!((0.8..1.2).contains(&first), "{first}");
        assert_eq!(on_demand, None);
        let (second, on_demand) = pause(reconnect.on_failed());
        assert!((1.28..1.92).contains(&second), "{second}");
        assert_eq!(on_demand, None);
        reconnect.on_answered();
        assert!(pause(reconnect.on_failed()).0 < 1.2);
    }

    /// After an attempt for a waiting call, whose connection ended without a response.
    fn on_demand_again(lifetime: Duration, had_request: bool) -> Option<Duration> {
        let mut reconnect = reconnect();
        for _ in 0..2 {
            reconnect.on_unanswered(SHORT, false);
        }
        let first = pause(reconnect.on_unanswered(SHORT, false)).1;
        assert_eq!(first, Some(Duration::ZERO));
        reconnect.on_demand();
        let again = pause(reconnect.on_unanswered(lifetime, had_request)).1;
        // A pause that runs to its end is followed by an attempt that is not for a call.
        let later = pause(reconnect.on_unanswered(lifetime, had_request)).1;
        assert_eq!(later, Some(Duration::ZERO));
        again
    }

    #[test]
    fn waiting_call_cuts_one_pause_short() {
        assert_eq!(on_demand_again(SHORT, false), None);
        assert_eq!(on_demand_again(SHORT, true), None);
        assert_eq!(on_demand_again(2 * GREETING, true), None);
    }

    #[test]
    fn server_that_waited_for_a_request_gets_another_attempt() {
        assert_eq!(on_demand_again(2 * GREETING, false), Some(BACKOFF_BASE));
    }
}
