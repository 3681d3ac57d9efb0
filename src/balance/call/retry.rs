//! Which failed calls are retried, and when.

use std::time::Duration;

use tonic::Code;

use crate::backoff::Backoff;
use crate::time::MAX_DURATION;

/// The most attempts that gRPC allows (gRFC A6).
const MAX_ATTEMPTS: u32 = 5;

/// The default backoff: before the second attempt, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// gRPC's jitter of retries: 20 % either way (gRFC A6).
const JITTER: std::ops::Range<f64> = 0.8..1.2;

/// Retries failed calls, each time on another endpoint if there is one.
///
/// A failed call is retried while all of this holds: its response has not begun, its status is one
/// of the policy's [codes](Self::on) (a response that is not gRPC has the code for its HTTP
/// status), the policy has attempts left, its deadline leaves time for the backoff, and its request
/// can be sent again. A request can be sent again when it is unary, or a stream of which at most 64
/// KiB were sent.
///
/// Retry only on statuses that say that the server did not execute the call, or only calls that may
/// be executed twice. After `UNAVAILABLE` from a connection that broke, the server may have
/// executed the call completely.
///
/// Transparent retries need no policy and do not count as attempts: a call that provably reached no
/// server application is sent to another endpoint, depending on the reason at most 5 times or until
/// [`ready_timeout`](crate::balance::BalancedChannelBuilder::ready_timeout) has passed (see
/// [`balance`](crate::balance)). A policy does not raise these bounds.
///
/// ```
/// use goo_etcd::balance::RetryPolicy;
/// use tonic::Code;
///
/// let policy = RetryPolicy::new(3).on([Code::Unavailable, Code::ResourceExhausted]);
/// ```
#[derive(Debug, Clone, PartialEq)]
#[must_use = "a policy has no effect until `BalancedChannelBuilder::retry`"]
pub struct RetryPolicy {
    attempts: u32,
    codes: Vec<Code>,
    backoff: (Duration, Duration),
}

impl RetryPolicy {
    /// Creates a policy of at most `attempts` attempts per call, including the first one. The
    /// number is limited to the range from 1 to 5 (gRFC A6).
    ///
    /// The policy retries on `UNAVAILABLE`, after a backoff of 10 ms at first and 1 s at most.
    pub fn new(attempts: u32) -> Self {
        Self {
            attempts: attempts.clamp(1, MAX_ATTEMPTS),
            codes: vec![Code::Unavailable],
            backoff: BACKOFF,
        }
    }

    /// Sets the codes on which a call is retried. Default: `UNAVAILABLE` alone.
    pub fn on(mut self, codes: impl IntoIterator<Item = Code>) -> Self {
        self.codes = codes.into_iter().collect();
        self
    }

    /// Sets the backoff before the second attempt and the longest one before any attempt. Default:
    /// 10 ms and 1 s.
    ///
    /// The backoff grows by a factor of 1.6 per attempt, with a jitter of 20 %.
    pub fn backoff(mut self, initial: Duration, max: Duration) -> Self {
        self.backoff = (initial.min(MAX_DURATION), max.min(MAX_DURATION));
        self
    }

    /// Whether a call whose latest attempt, of `attempts` so far, ended with `code` may be retried.
    pub(super) fn allows(&self, code: Code, attempts: u32) -> bool {
        attempts < self.attempts && self.codes.contains(&code)
    }

    /// The backoff of one call.
    pub(super) fn start_backoff(&self) -> Backoff {
        Backoff::with_jitter(self.backoff.0, self.backoff.1, JITTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_codes_and_counted_attempts_are_retried() {
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
