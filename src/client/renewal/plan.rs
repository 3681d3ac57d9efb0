//! Which member a renewal is sent to next, and when.

use std::cmp::Reverse;
use std::time::Duration;

use tokio::time::Instant;

use super::pace::Pace;
use super::standing::Standing;

/// A member that can be asked, or a stream whose member is not known yet because no member is
/// connected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) standing: &'a Standing,
    pub(super) stream: Stream,
    /// When this renewal was sent on the stream, while it has no response.
    pub(super) asked_at: Option<Instant>,
}

/// The newest open stream of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    None,
    /// Waits for a member to be connected.
    Waiting,
    /// Owes no response.
    Idle,
    /// Owes a response, and has sent none since then.
    Owing(Instant),
}

/// The next step of a renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Send the renewal on the stream of this candidate.
    Send(usize),
    /// Send the renewal on a new stream to one of these candidates.
    Open(Vec<usize>),
    /// Send the renewal on a further stream to this candidate, whose stream is silent.
    Reopen(usize),
    /// Wait for a response, until then.
    Wait(Option<Instant>),
}

/// How much a candidate promises, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Promise {
    HasStream(Reverse<Option<Instant>>),
    NoStream,
    Refused,
    Silent,
}

/// Decides the next step of a renewal.
///
/// The renewal is sent to another member when each one asked so far has been silent for a while. A
/// member that did not respond is asked again only after all others, on a further stream. The
/// silent one stays open, because the member may only be slow.
pub(super) fn next_step(pace: Pace, now: Instant, candidates: &[Candidate]) -> Step {
    let overdue_at = |candidate: &Candidate| candidate.overdue_at(pace);
    let asked = || candidates.iter().filter(|c| c.asked_at.is_some());
    if let Some(overdue_at) = asked().filter_map(overdue_at).max()
        && now < overdue_at
    {
        return Step::Wait(Some(overdue_at));
    }
    let askable = || {
        let all = candidates.iter().enumerate();
        all.filter(|(_, c)| {
            c.asked_at.is_none() && c.standing.retry_at().is_none_or(|at| at <= now)
        })
    };
    let promise = |candidate: &Candidate| candidate.promise(pace, now);
    if let Some((best, candidate)) = askable().min_by_key(|(_, c)| promise(c)) {
        if candidate.stream != Stream::None {
            return Step::Send(best);
        }
        let equals = askable().filter(|(_, c)| promise(c) == promise(candidate));
        let without_stream = equals.filter(|(_, c)| c.stream == Stream::None);
        return Step::Open(without_stream.map(|(index, _)| index).collect());
    }
    let is_waiting = candidates.iter().any(|c| c.stream == Stream::Waiting);
    let reopen_at = |(index, candidate): (usize, &Candidate)| {
        let reopen_at = candidate.reopen_at(pace)?;
        // While one stream waits for a connected member, a further one would wait as well.
        let after_waiting = now + pace.reopen_after(Duration::ZERO);
        Some(if is_waiting {
            (reopen_at.max(after_waiting), index)
        } else {
            (reopen_at, index)
        })
    };
    let next = candidates.iter().enumerate().filter_map(reopen_at).min();
    let retry_at = candidates.iter().filter(|c| c.asked_at.is_none());
    let retry_at = retry_at.filter_map(|c| c.standing.retry_at()).min();
    match next {
        Some((reopen_at, index)) if reopen_at <= now => Step::Reopen(index),
        Some((reopen_at, _)) => {
            Step::Wait(Some(retry_at.map_or(reopen_at, |at| at.min(reopen_at))))
        }
        None => Step::Wait(retry_at),
    }
}

impl Candidate<'_> {
    /// When another member is asked beside this one. A response to another lease's renewal counts
    /// too, because etcd responds to the renewals of a stream one after the other.
    fn overdue_at(&self, pace: Pace) -> Option<Instant> {
        let asked_at = self.asked_at?;
        let round_trip = self.standing.round_trip();
        let silent_since = match self.stream {
            Stream::Owing(since) => since,
            _ => asked_at,
        };
        // The member may have forgotten this renewal although other leases get responses.
        let forgotten_at = asked_at + pace.reopen_after(round_trip);
        Some((silent_since + pace.hedge_after(round_trip)).min(forgotten_at))
    }

    /// When the member is asked on a further stream, if no other member can be asked.
    fn reopen_at(&self, pace: Pace) -> Option<Instant> {
        let asked_at = self.asked_at?;
        let reopen_after = pace.reopen_after(self.standing.round_trip());
        Some(match self.stream {
            Stream::Owing(since) => (since + reopen_after).min(asked_at + reopen_after * 2),
            _ => asked_at + reopen_after,
        })
    }

    fn promise(&self, pace: Pace, now: Instant) -> Promise {
        let is_overdue = match self.stream {
            Stream::Owing(since) => since + pace.hedge_after(self.standing.round_trip()) <= now,
            _ => false,
        };
        if is_overdue || self.standing.is_silent() {
            Promise::Silent
        } else if self.standing.retry_at().is_some() {
            Promise::Refused
        } else if self.stream == Stream::None {
            Promise::NoStream
        } else {
            Promise::HasStream(Reverse(self.standing.responded_at()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::standing::Response;
    use super::*;

    const TTL: Duration = Duration::from_secs(12);
    const HEDGE_AFTER: Duration = Duration::from_secs(1);

    /// A renewal that is played against members.
    struct Play {
        start: Instant,
        now: Instant,
        members: Vec<Member>,
        /// The steps taken, with the seconds since the start.
        steps: Vec<String>,
    }

    #[derive(Default)]
    struct Member {
        standing: Standing,
        stream: Option<Stream>,
        asked_at: Option<Instant>,
    }

    impl Play {
        fn new(members: usize) -> Self {
            let now = Instant::now();
            Self {
                start: now,
                now,
                members: std::iter::repeat_with(Member::default)
                    .take(members)
                    .collect(),
                steps: Vec::new(),
            }
        }

        fn step(&self) -> Step {
            let candidates: Vec<_> = self
                .members
                .iter()
                .map(|member| Candidate {
                    standing: &member.standing,
                    stream: member.stream.unwrap_or(Stream::None),
                    asked_at: member.asked_at,
                })
                .collect();
            next_step(Pace::of_ttl(Some(TTL)), self.now, &candidates)
        }

        /// Takes the steps that are due. Returns when the next one is.
        fn ask(&mut self) -> Option<Instant> {
            loop {
                let (verb, index) = match self.step() {
                    Step::Wait(until) => return until,
                    Step::Send(index) => ("send", index),
                    Step::Open(indices) => ("open", indices[0]),
                    Step::Reopen(index) => ("reopen", index),
                };
                let at = (self.now - self.start).as_secs_f64();
                self.steps.push(format!("{at} {verb} {index}"));
                let member = &mut self.members[index];
                if verb == "reopen" {
                    member.standing.on_silent();
                    member.stream = None;
                }
                let owing = match member.stream {
                    Some(Stream::Owing(since)) => since,
                    _ => self.now,
                };
                member.stream = Some(Stream::Owing(owing));
                member.asked_at = Some(self.now);
            }
        }

        /// Takes all steps within a time in which no member responds.
        fn wait(&mut self, time: Duration) {
            let end = self.now + time;
            while let Some(next) = self.ask().filter(|next| *next < end) {
                assert!(next > self.now, "busy loop: {:?}", self.steps);
                self.now = next;
            }
            self.now = end;
        }

        fn refuse(&mut self, index: usize) {
            let member = &mut self.members[index];
            member.standing.on_refused(self.now);
            (member.stream, member.asked_at) = (None, None);
        }

        fn respond(&mut self, index: usize, round_trip: Duration) {
            let member = &mut self.members[index];
            member.standing.on_response(Response {
                at: self.now,
                round_trip,
            });
            (member.stream, member.asked_at) = (Some(Stream::Idle), None);
        }

        fn take_steps(&mut self) -> Vec<String> {
            std::mem::take(&mut self.steps)
        }
    }

    /// The renewal is due after a third of the TTL, so the lease ends eight hedges later.
    #[tokio::test(start_paused = true)]
    async fn each_member_is_asked_until_the_lease_ends() {
        let mut play = Play::new(3);
        play.wait(HEDGE_AFTER * 8);
        let expected = [
            "0 open 0",
            "1 open 1",
            "2 open 2",
            "3 reopen 0",
            "4 reopen 1",
            "5 reopen 2",
            "6 reopen 0",
            "7 reopen 1",
        ];
        assert_eq!(play.take_steps(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn single_silent_member_is_asked_every_three_hedges() {
        let mut play = Play::new(1);
        play.wait(HEDGE_AFTER * 8);
        let expected = ["0 open 0", "3 reopen 0", "6 reopen 0"];
        assert_eq!(play.take_steps(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn member_gets_twice_the_time_of_its_last_response() {
        let mut play = Play::new(2);
        play.ask();
        play.respond(0, HEDGE_AFTER * 3 / 2);
        play.take_steps();
        play.wait(HEDGE_AFTER * 4);
        assert_eq!(play.take_steps(), ["0 send 0", "3 open 1"]);
    }

    /// A third of the TTL, and half of it for a further stream.
    #[tokio::test(start_paused = true)]
    async fn member_that_was_slow_once_delays_others_little() {
        let mut play = Play::new(2);
        play.ask();
        play.respond(0, TTL);
        play.take_steps();
        play.wait(TTL * 2 / 3);
        let expected = ["0 send 0", "4 open 1", "6 reopen 0", "7 reopen 1"];
        assert_eq!(play.take_steps(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn member_that_responded_last_is_preferred() {
        let mut play = Play::new(3);
        for index in [0, 2, 1] {
            play.now += HEDGE_AFTER;
            play.respond(index, Duration::ZERO);
        }
        assert_eq!(play.step(), Step::Send(1));
        // Another lease has waited there for too long.
        play.members[1].stream = Some(Stream::Owing(play.now - HEDGE_AFTER));
        assert_eq!(play.step(), Step::Send(2));
        play.members[2].stream = None;
        play.members[2].standing.on_silent();
        assert_eq!(play.step(), Step::Send(0));
        play.members[0].stream = None;
        assert_eq!(play.step(), Step::Open(vec![0]));
    }

    #[tokio::test(start_paused = true)]
    async fn refusing_member_is_asked_again_before_a_silent_one() {
        let mut play = Play::new(2);
        play.wait(HEDGE_AFTER);
        assert_eq!(play.take_steps(), ["0 open 0"]);
        play.ask();
        play.refuse(1);
        let Step::Wait(Some(retry_at)) = play.step() else {
            panic!("{:?}", play.step());
        };
        assert!(retry_at < play.now + HEDGE_AFTER / 10);
        play.now = retry_at;
        assert_eq!(play.step(), Step::Open(vec![1]));
    }

    #[tokio::test(start_paused = true)]
    async fn responses_to_other_leases_show_that_a_stream_is_alive() {
        let mut play = Play::new(2);
        play.ask();
        play.now += HEDGE_AFTER;
        play.members[0].stream = Some(Stream::Owing(play.now - HEDGE_AFTER / 2));
        assert_eq!(play.step(), Step::Wait(Some(play.now + HEDGE_AFTER / 2)));
        // The wait is bounded, because the member may have forgotten this renewal.
        play.now += HEDGE_AFTER * 2;
        play.members[0].stream = Some(Stream::Owing(play.now));
        assert_eq!(play.step(), Step::Open(vec![1]));
    }

    #[tokio::test(start_paused = true)]
    async fn no_further_stream_is_opened_while_one_waits() {
        let mut play = Play::new(2);
        play.ask();
        play.now += HEDGE_AFTER;
        play.ask();
        play.members[0].stream = Some(Stream::Waiting);
        for _ in 0..100 {
            play.now += HEDGE_AFTER * 3;
            let Step::Wait(Some(until)) = play.step() else {
                panic!("{:?}", play.step());
            };
            assert!(until > play.now);
        }
        // A member was connected, and does not respond.
        play.members[0].stream = Some(Stream::Owing(play.now));
        play.now += HEDGE_AFTER * 3;
        assert!(matches!(play.step(), Step::Reopen(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn member_that_cannot_be_sent_to_is_not_lost() {
        let mut play = Play::new(1);
        play.ask();
        play.refuse(0);
        for _ in 0..20 {
            let Step::Wait(Some(retry_at)) = play.step() else {
                panic!("{:?}", play.step());
            };
            assert!(retry_at <= play.now + Duration::from_millis(400));
            play.now = retry_at;
            play.ask();
            play.refuse(0);
        }
    }
}
