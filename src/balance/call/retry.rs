//! Which failed calls are sent again, and how often.

use std::time::Duration;

use tonic::Code;

use crate::backoff::Backoff;
use crate::time::MAX_DURATION;

/// The most attempts that gRPC allows (gRFC A6).
const MAX_ATTEMPTS: u32 = 5;

/// gRPC's jitter of retries: 20 % either way (gRFC A6).
const JITTER: std::ops::Range<f64> = 0.8..1.2;

/// Sends failed calls again, on another endpoint where there is one.
///
/// A call is sent again only while its response has not begun, its request can be repeated (see
/// below), and its status is one of the chosen. Choose statuses with which a server has not done
/// what it was asked, or calls that may be done twice: after `UNAVAILABLE` from a connection that
/// broke, a server may have done it all.
///
/// A request can be repeated when it is unary, or a stream of which no more than 64 KiB were sent.
///
/// What provably reached no server is sent again without any policy, and counts as no attempt.
///
/// ```
/// use goo_etcd::balance::RetryPolicy;
/// use tonic::Code;
///
/// let policy = RetryPolicy::new(3).on([Code::Unavailable, Code::ResourceExhausted]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    attempts: u32,
    codes: Vec<Code>,
    backoff: (Duration, Duration),
}

impl RetryPolicy {
    /// At most `attempts` per call, the first one included, from 1 to 5 (gRFC A6); on
    /// `UNAVAILABLE`, after 10 ms at first and 1 s at most.
    pub fn new(attempts: u32) -> Self {
        Self {
            attempts: attempts.clamp(1, MAX_ATTEMPTS),
            codes: vec![Code::Unavailable],
            backoff: (Duration::from_millis(10), Duration::from_secs(1)),
        }
    }

    /// The statuses after which a call is sent again, instead of `UNAVAILABLE`.
    #[must_use]
    pub fn on(mut self, codes: impl IntoIterator<Item = Code>) -> Self {
        self.codes = codes.into_iter().collect();
        self
    }

    /// The wait before the second attempt, and the most before any; it grows by 1.6, with a jitter
    /// of 20 %.
    #[must_use]
    pub fn backoff(mut self, initial: Duration, max: Duration) -> Self {
        self.backoff = (initial.min(MAX_DURATION), max.min(MAX_DURATION));
        self
    }

    /// Whether a call that has failed so after so many attempts is to be sent again.
    pub(super) fn allows(&self, code: Code, attempts: u32) -> bool {
        attempts < self.attempts && self.codes.contains(&code)
    }

    pub(super) fn waits(&self) -> Backoff {
        Backoff::with_jitter(self.backoff.0, self.backoff.1, JITTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_counted_and_only_the_chosen_statuses_are_sent_again() {
        let policy = RetryPolicy::new(2);
        assert!(policy.allows(Code::Unavailable, 1));
        assert!(!policy.allows(Code::Unavailable, 2));
        assert!(!policy.allows(Code::Internal, 1));
        let policy = policy.on([Code::Internal]);
        assert!(policy.allows(Code::Internal, 1));
        assert!(!policy.allows(Code::Unavailable, 1));
        assert!(!RetryPolicy::new(100).allows(Code::Unavailable, 5));
        assert!(!RetryPolicy::new(0).allows(Code::Unavailable, 1));
    }
}
