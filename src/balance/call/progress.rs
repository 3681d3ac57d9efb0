//! How far a call has come: its attempts so far, and whether and when the next one is made.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;

use super::grpc_timeout::Deadline;
use super::retry::RetryPolicy;
use crate::backoff::Backoff;
use crate::balance::pool::Endpoint;

/// Transparent retries that are made without a pause. Several connections that close at once are
/// usual, for example while a fleet restarts.
const IMMEDIATE_RETRIES: u32 = 3;

/// The pause before each further transparent retry, so that a server that refuses every stream is
/// not called in a tight loop.
const TRANSPARENT_RETRY_PAUSE: Duration = Duration::from_millis(10);

/// The present wait of a call, which the message of an exceeded deadline names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WaitingFor {
    /// The channel's concurrency limit is reached.
    Permit,
    /// No endpoint is ready, or all ready endpoints are full.
    Endpoint,
    /// An attempt was sent and its response has not begun, or the call backs off before the next
    /// attempt.
    Response,
}

/// Whether a call is sent again after an attempt without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Retry,
    RetryAfter(Duration),
    /// The call ends with the attempt's status.
    GiveUp,
}

/// The state of one call between its attempts.
#[derive(Debug)]
pub(super) struct Progress<'a> {
    started: Instant,
    deadline: Option<Deadline>,
    ready_timeout: Duration,
    retry: Option<&'a RetryPolicy>,
    /// Created by the first retry.
    backoff: Option<Backoff>,
    waiting_for: WaitingFor,
    /// Attempts that a server may have seen, and that have failed.
    failed_attempts: u32,
    /// Transparent retries in a row.
    transparent_retries: u32,
    /// From when `ready_timeout` counts: the start of the call, or the end of the last pause before
    /// a retry. Later by the time that attempts spent on endpoints that then refused them.
    waiting_since: Instant,
    exclude: Option<Arc<Endpoint>>,
}

impl<'a> Progress<'a> {
    pub(super) fn new(
        started: Instant,
        deadline: Option<Deadline>,
        ready_timeout: Duration,
        retry: Option<&'a RetryPolicy>,
    ) -> Self {
        Self {
            started,
            deadline,
            ready_timeout,
            retry,
            backoff: None,
            waiting_for: WaitingFor::Response,
            failed_attempts: 0,
            transparent_retries: 0,
            waiting_since: started,
            exclude: None,
        }
    }

    pub(super) fn waiting_for(&self) -> WaitingFor {
        self.waiting_for
    }

    pub(super) fn set_waiting_for(&mut self, waiting_for: WaitingFor) {
        self.waiting_for = waiting_for;
    }

    pub(super) fn deadline(&self) -> Option<&Deadline> {
        self.deadline.as_ref()
    }

    /// Until when the call waits for a permit under the channel's concurrency limit.
    pub(super) fn permit_deadline(&self) -> Instant {
        self.started + self.ready_timeout
    }

    /// Until when the call waits for an endpoint.
    pub(super) fn ready_deadline(&self) -> Instant {
        self.waiting_since + self.ready_timeout
    }

    /// The endpoint of the latest attempt, which the next attempt avoids if there is another.
    pub(super) fn excluded_endpoint(&self) -> Option<&Arc<Endpoint>> {
        self.exclude.as_ref()
    }

    pub(super) fn exclude(&mut self, endpoint: Arc<Endpoint>) {
        self.exclude = Some(endpoint);
    }

    /// Whether the policy allows to retry after the present attempt, if it ends with `code`.
    pub(super) fn may_retry(&self, code: Code) -> bool {
        self.retry
            .is_some_and(|policy| policy.allows(code, self.failed_attempts + 1))
    }

    /// Records an attempt that no server application has seen and that ended after `elapsed`.
    ///
    /// The first transparent retry is always made. The others are made until the call has waited
    /// for `ready_timeout`.
    pub(super) fn on_not_sent(&mut self, elapsed: Duration, now: Instant) -> Decision {
        self.transparent_retries += 1;
        self.waiting_since += elapsed;
        if self.transparent_retries > 1 && now > self.ready_deadline() {
            Decision::GiveUp
        } else if self.transparent_retries > IMMEDIATE_RETRIES {
            Decision::RetryAfter(TRANSPARENT_RETRY_PAUSE)
        } else {
            Decision::Retry
        }
    }

    /// Records a failed attempt for which [`may_retry`](Self::may_retry) holds.
    pub(super) fn on_failure(&mut self, now: Instant) -> Decision {
        self.failed_attempts += 1;
        self.transparent_retries = 0;
        let Some(policy) = self.retry else {
            return Decision::GiveUp;
        };
        let backoff = self.backoff.get_or_insert_with(|| policy.start_backoff());
        let pause = backoff.next();
        let next_at = now + pause;
        if self.deadline.is_some_and(|deadline| next_at >= deadline.at) {
            return Decision::GiveUp;
        }
        self.waiting_since = next_at;
        Decision::RetryAfter(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY_TIMEOUT: Duration = Duration::from_secs(5);
    const MS: Duration = Duration::from_millis(1);

    fn progress(retry: Option<&RetryPolicy>) -> (Progress<'_>, Instant) {
        let now = Instant::now();
        (Progress::new(now, None, READY_TIMEOUT, retry), now)
    }

    mod transparent_retries {
        use super::*;

        #[test]
        fn three_are_immediate_and_the_others_pause() {
            let (mut progress, now) = progress(None);
            for _ in 0..IMMEDIATE_RETRIES {
                assert_eq!(progress.on_not_sent(MS, now), Decision::Retry);
            }
            for _ in 0..10 {
                let decision = progress.on_not_sent(MS, now);
                assert_eq!(decision, Decision::RetryAfter(TRANSPARENT_RETRY_PAUSE));
            }
        }

        #[test]
        fn first_is_made_even_after_ready_timeout() {
            let (mut progress, now) = progress(None);
            let late = now + 2 * READY_TIMEOUT;
            assert_eq!(progress.on_not_sent(Duration::ZERO, late), Decision::Retry);
            assert_eq!(progress.on_not_sent(Duration::ZERO, late), Decision::GiveUp);
        }

        #[test]
        fn are_made_until_ready_timeout() {
            let (mut progress, now) = progress(None);
            progress.on_not_sent(Duration::ZERO, now);
            let decision = progress.on_not_sent(Duration::ZERO, now + READY_TIMEOUT);
            assert_eq!(decision, Decision::Retry);
            let decision = progress.on_not_sent(Duration::ZERO, now + READY_TIMEOUT + MS);
            assert_eq!(decision, Decision::GiveUp);
        }

        #[test]
        fn time_on_an_endpoint_does_not_count_as_waiting() {
            let (mut progress, now) = progress(None);
            let held = 3 * READY_TIMEOUT;
            assert_eq!(progress.on_not_sent(held, now + held), Decision::Retry);
            let twice = now + 2 * held;
            assert_eq!(progress.on_not_sent(held, twice), Decision::Retry);
            assert_eq!(progress.ready_deadline(), twice + READY_TIMEOUT);
        }

        #[test]
        fn do_not_count_as_attempts() {
            let policy = RetryPolicy::new(2);
            let (mut progress, now) = progress(Some(&policy));
            for _ in 0..10 {
                progress.on_not_sent(MS, now);
            }
            assert!(progress.may_retry(Code::Unavailable));
        }
    }

    mod retries {
        use super::*;

        #[test]
        fn need_a_policy() {
            let (mut progress, now) = progress(None);
            assert!(!progress.may_retry(Code::Unavailable));
            assert_eq!(progress.on_failure(now), Decision::GiveUp);
        }

        #[test]
        fn end_with_the_policy_s_attempts() {
            let policy = RetryPolicy::new(3);
            let (mut progress, now) = progress(Some(&policy));
            for _ in 0..2 {
                assert!(progress.may_retry(Code::Unavailable));
                assert!(!progress.may_retry(Code::Internal));
                assert!(matches!(progress.on_failure(now), Decision::RetryAfter(_)));
            }
            assert!(!progress.may_retry(Code::Unavailable));
        }

        #[test]
        fn pause_grows_up_to_the_maximum() {
            let policy = RetryPolicy::new(5).backoff(10 * MS, 20 * MS);
            let (mut progress, now) = progress(Some(&policy));
            let pauses: Vec<Duration> = (0..4)
                .map(|_| match progress.on_failure(now) {
                    Decision::RetryAfter(pause) => pause,
                    other => panic!("{other:?}"),
                })
                .collect();
            // With a jitter of 20 %: 10, 16, 20 and 20 ms.
            let expected = [8..=12, 12..=20, 16..=24, 16..=24];
            for (pause, range) in pauses.iter().zip(expected) {
                assert!(range.contains(&pause.as_millis()), "{pauses:?}");
            }
        }

        #[test]
        fn deadline_that_leaves_no_time_ends_them() {
            let policy = RetryPolicy::new(5).backoff(10 * MS, 10 * MS);
            let now = Instant::now();
            let deadline = Deadline::after(now, 100 * MS);
            let mut progress = Progress::new(now, Some(deadline), READY_TIMEOUT, Some(&policy));
            let early = now + 80 * MS;
            assert!(matches!(
                progress.on_failure(early),
                Decision::RetryAfter(_)
            ));
            assert_eq!(progress.on_failure(now + 95 * MS), Decision::GiveUp);
        }

        #[test]
        fn ready_timeout_starts_again_after_the_pause() {
            let policy = RetryPolicy::new(2);
            let (mut progress, now) = progress(Some(&policy));
            assert_eq!(progress.ready_deadline(), now + READY_TIMEOUT);
            let failed_at = now + 3 * READY_TIMEOUT;
            let Decision::RetryAfter(pause) = progress.on_failure(failed_at) else {
                panic!("the policy allows two attempts");
            };
            assert_eq!(progress.ready_deadline(), failed_at + pause + READY_TIMEOUT);
        }

        #[test]
        fn transparent_retries_are_immediate_again_after_one() {
            let policy = RetryPolicy::new(3);
            let (mut progress, now) = progress(Some(&policy));
            for _ in 0..=IMMEDIATE_RETRIES {
                progress.on_not_sent(Duration::ZERO, now);
            }
            progress.on_failure(now);
            assert_eq!(progress.on_not_sent(Duration::ZERO, now), Decision::Retry);
        }
    }
}
