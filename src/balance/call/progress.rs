//! How far a call has come: its attempts so far, and whether and when the next one is made.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;

use super::grpc_timeout::Deadline;
use super::retry::RetryPolicy;
use crate::backoff::Backoff;
use crate::balance::connection::Unprocessed;
use crate::balance::pool::Endpoint;

/// Transparent retries after REFUSED_STREAM. gRPC makes one (gRFC A6); the others are for servers
/// that refuse streams while they restart, one after the other.
const MAX_REFUSALS: u32 = 5;

/// Transparent retries after GOAWAY with an error, because each call that the GOAWAY excludes may
/// be the reason and would break the connection of each further endpoint (gRFC A6).
const MAX_EXCLUSIONS: u32 = 1;

/// The pause before the second transparent retry after REFUSED_STREAM, which doubles before each
/// further one. Four pauses together take about 300 ms.
///
/// Also the pause before the retry of the first call that GOAWAY with an error excludes, the likely
/// reason. The others are sent before, so that they are not excluded once more.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// The jitter of that pause, gRPC's for retries (gRFC A6).
const PAUSE_JITTER: Range<f64> = 0.8..1.2;

/// Transparent retries without a pause after GOAWAY(NO_ERROR), or if nothing was sent. A server
/// that ends its connections after few requests refuses the streams of all other callers each time,
/// and a call that pauses while the next connection becomes ready loses its place to later ones.
const IMMEDIATE_RETRIES: u32 = 100;

/// The pause before each further one, which bounds the connections that a single call can end at a
/// server that refuses it over and over again. The number of retries is not bounded.
const GOING_AWAY_PAUSE: Duration = Duration::from_millis(10);

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
    /// Attempts that no server application has seen, by the reason.
    unprocessed: UnprocessedAttempts,
    /// From when `ready_timeout` counts: the start of the call, or the end of the last pause before
    /// a retry of the policy.
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
            unprocessed: UnprocessedAttempts::default(),
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

    /// When the call started, which is its place among waiting calls.
    pub(super) fn started(&self) -> Instant {
        self.started
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

    /// Records an attempt that no server application has seen.
    ///
    /// The first transparent retry is always made. The others are made until the call has taken
    /// `ready_timeout`, at servers or waiting, and within the bounds of their reason.
    pub(super) fn on_unprocessed(&mut self, why: Unprocessed, now: Instant) -> Decision {
        let is_first = self.unprocessed == UnprocessedAttempts::default();
        let Some(pause) = self.unprocessed.pause_after(why) else {
            return Decision::GiveUp;
        };
        if !is_first && now + pause > self.ready_deadline() {
            Decision::GiveUp
        } else if pause.is_zero() {
            Decision::Retry
        } else {
            Decision::RetryAfter(pause)
        }
    }

    /// Records a failed attempt for which [`may_retry`](Self::may_retry) holds.
    pub(super) fn on_failure(&mut self, now: Instant) -> Decision {
        self.failed_attempts += 1;
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

/// How many attempts of a call no server application has seen.
#[derive(Debug, Default, PartialEq, Eq)]
struct UnprocessedAttempts {
    refused: u32,
    /// Excluded by a GOAWAY with an error.
    excluded: u32,
    /// Excluded by GOAWAY(NO_ERROR), or never sent.
    going_away: u32,
}

impl UnprocessedAttempts {
    /// Counts an attempt. Returns the pause before the next one, or `None` if there is none.
    fn pause_after(&mut self, why: Unprocessed) -> Option<Duration> {
        match why {
            Unprocessed::Refused => {
                self.refused += 1;
                (self.refused <= MAX_REFUSALS).then(|| match self.refused {
                    1 => Duration::ZERO,
                    refused => jittered(FIRST_PAUSE * (1 << (refused - 2))),
                })
            }
            Unprocessed::GoAwayError { is_suspect } => {
                self.excluded += 1;
                (self.excluded <= MAX_EXCLUSIONS).then(|| match is_suspect {
                    true => jittered(FIRST_PAUSE),
                    false => Duration::ZERO,
                })
            }
            Unprocessed::GoingAway | Unprocessed::NotSent => {
                self.going_away = self.going_away.saturating_add(1);
                let immediate = self.going_away <= IMMEDIATE_RETRIES;
                Some(if immediate {
                    Duration::ZERO
                } else {
                    GOING_AWAY_PAUSE
                })
            }
        }
    }
}

fn jittered(pause: Duration) -> Duration {
    let Range { start, end } = PAUSE_JITTER;
    pause.mul_f64(start + (end - start) * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use std::ops::RangeInclusive;

    use super::*;

    const READY_TIMEOUT: Duration = Duration::from_secs(5);
    const MS: Duration = Duration::from_millis(1);
    const SUSPECT: Unprocessed = Unprocessed::GoAwayError { is_suspect: true };
    const EXCLUDED: Unprocessed = Unprocessed::GoAwayError { is_suspect: false };

    fn progress(retry: Option<&RetryPolicy>) -> (Progress<'_>, Instant) {
        let now = Instant::now();
        (Progress::new(now, None, READY_TIMEOUT, retry), now)
    }

    mod transparent_retries {
        use super::*;

        /// The decisions after attempts that end for this reason, all at one time.
        fn decisions(why: Unprocessed, attempts: usize) -> Vec<Decision> {
            let (mut progress, now) = progress(None);
            (0..attempts)
                .map(|_| progress.on_unprocessed(why, now))
                .collect()
        }

        /// The pauses in milliseconds before the decision to give up.
        fn pauses(why: Unprocessed) -> Vec<u128> {
            let decisions = decisions(why, 7);
            let retries = decisions.iter().map_while(|decision| match decision {
                Decision::Retry => Some(0),
                Decision::RetryAfter(pause) => Some(pause.as_millis()),
                Decision::GiveUp => None,
            });
            retries.collect()
        }

        fn assert_within(pauses: &[u128], ranges: &[RangeInclusive<u128>]) {
            assert_eq!(pauses.len(), ranges.len(), "{pauses:?}");
            for (pause, range) in pauses.iter().zip(ranges) {
                assert!(range.contains(pause), "{pauses:?}");
            }
        }

        #[test]
        fn five_with_growing_pauses_after_refusals() {
            let ranges = [0..=0, 16..=24, 32..=48, 64..=96, 128..=192];
            assert_within(&pauses(Unprocessed::Refused), &ranges);
        }

        #[test]
        fn one_after_goaway_with_an_error_and_the_likely_reason_is_last() {
            assert_within(&pauses(EXCLUDED), &[0..=0]);
            assert_within(&pauses(SUSPECT), &[16..=24]);
            let (mut progress, now) = progress(None);
            progress.on_unprocessed(EXCLUDED, now);
            assert_eq!(progress.on_unprocessed(SUSPECT, now), Decision::GiveUp);
        }

        #[test]
        fn any_number_after_a_graceful_goaway_but_in_no_tight_loop() {
            for why in [Unprocessed::GoingAway, Unprocessed::NotSent] {
                let decisions = decisions(why, 200);
                assert_eq!(decisions[..100], [Decision::Retry; 100]);
                let paused = Decision::RetryAfter(GOING_AWAY_PAUSE);
                assert!(decisions[100..].iter().all(|decision| *decision == paused));
            }
        }

        #[test]
        fn reasons_are_counted_apart() {
            let (mut progress, now) = progress(None);
            for _ in 0..100 {
                progress.on_unprocessed(Unprocessed::GoingAway, now);
            }
            for _ in 0..MAX_REFUSALS {
                let decision = progress.on_unprocessed(Unprocessed::Refused, now);
                assert_ne!(decision, Decision::GiveUp);
            }
            assert_eq!(progress.on_unprocessed(EXCLUDED, now), Decision::Retry);
        }

        #[test]
        fn first_is_made_even_after_ready_timeout() {
            for why in [Unprocessed::GoingAway, Unprocessed::Refused] {
                let (mut progress, now) = progress(None);
                let late = now + 2 * READY_TIMEOUT;
                assert_eq!(progress.on_unprocessed(why, late), Decision::Retry);
                assert_eq!(progress.on_unprocessed(why, late), Decision::GiveUp);
            }
        }

        #[test]
        fn are_made_until_ready_timeout_wherever_the_time_went() {
            let (mut progress, now) = progress(None);
            let why = Unprocessed::GoingAway;
            assert_eq!(progress.on_unprocessed(why, now), Decision::Retry);
            let decision = progress.on_unprocessed(why, now + READY_TIMEOUT);
            assert_eq!(decision, Decision::Retry);
            assert_eq!(progress.ready_deadline(), now + READY_TIMEOUT);
            let decision = progress.on_unprocessed(why, now + READY_TIMEOUT + MS);
            assert_eq!(decision, Decision::GiveUp);
        }

        #[test]
        fn do_not_count_as_attempts() {
            let policy = RetryPolicy::new(2);
            let (mut progress, now) = progress(Some(&policy));
            for _ in 0..10 {
                progress.on_unprocessed(Unprocessed::GoingAway, now);
            }
            assert!(progress.may_retry(Code::Unavailable));
        }

        #[test]
        fn are_bounded_per_call_and_not_per_attempt_of_the_policy() {
            let policy = RetryPolicy::new(3);
            let (mut progress, now) = progress(Some(&policy));
            for _ in 0..MAX_REFUSALS {
                progress.on_unprocessed(Unprocessed::Refused, now);
            }
            progress.on_failure(now);
            let decision = progress.on_unprocessed(Unprocessed::Refused, now);
            assert_eq!(decision, Decision::GiveUp);
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
    }
}
