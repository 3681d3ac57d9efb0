//! Which member a renewal is sent to next, and when.

use std::cmp::Reverse;

use tokio::time::Instant;

use super::pace::Pace;
use super::standing::Standing;

/// A member that can be asked, or a stream whose member is not known yet because no member is
/// connected.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'a> {
    pub(super) standing: &'a Standing,
    pub(super) stream: Stream,
    /// When this renewal was sent to the member, while it has no response.
    pub(super) asked_at: Option<Instant>,
}

/// The open stream of a candidate.
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

/// What a renewal does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Send the renewal on the stream of this candidate.
    Send(usize),
    /// Send the renewal on a new stream to one of these candidates.
    Open(Vec<usize>),
    /// Close the stream of this candidate, which is silent, and ask for the next step.
    Replace(usize),
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

/// Decides what a renewal does next.
///
/// The renewal is sent to another member when each one asked so far has been silent for a while. A
/// member that did not respond is asked again only after all others, on a new stream.
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
    let replace_at = |(index, candidate): (usize, &Candidate)| {
        candidate.asked_at?;
        Some((candidate.replace_at(pace)?, index))
    };
    let next = candidates.iter().enumerate().filter_map(replace_at).min();
    let retry_at = candidates.iter().filter(|c| c.asked_at.is_none());
    let retry_at = retry_at.filter_map(|c| c.standing.retry_at()).min();
    match next {
        Some((replace_at, index)) if replace_at <= now => Step::Replace(index),
        Some((replace_at, _)) => {
            Step::Wait(Some(retry_at.map_or(replace_at, |at| at.min(replace_at))))
        }
        None => Step::Wait(retry_at),
    }
}

impl Candidate<'_> {
    /// When another member is asked beside this one. Each response counts, also to another lease's
    /// renewal, because etcd responds to one after the other.
    fn overdue_at(&self, pace: Pace) -> Option<Instant> {
        let asked_at = self.asked_at?;
        let hedge_after = pace.hedge_after();
        let silent_since = match self.stream {
            Stream::Owing(since) => since,
            _ => asked_at,
        };
        // Where other leases get responses, this one may still be forgotten.
        Some((silent_since + hedge_after).min(asked_at + hedge_after * 3))
    }

    /// When the stream is replaced, if no other member can be asked.
    fn replace_at(&self, pace: Pace) -> Option<Instant> {
        let asked_at = self.asked_at?;
        let replace_after = pace.replace_after(self.standing.replaced());
        match self.stream {
            // No member is connected, so a new stream would wait as well.
            Stream::Waiting => None,
            Stream::Owing(since) => Some((since + replace_after).min(asked_at + replace_after * 2)),
            _ => Some(asked_at + replace_after),
        }
    }

    fn promise(&self, pace: Pace, now: Instant) -> Promise {
        let is_overdue = match self.stream {
            Stream::Owing(since) => since + pace.hedge_after() <= now,
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
    use std::time::Duration;

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
                    Step::Replace(index) => ("replace", index),
                };
                let at = (self.now - self.start).as_secs_f64();
                self.steps.push(format!("{at} {verb} {index}"));
                let member = &mut self.members[index];
                if verb == "replace" {
                    member.standing.on_silent();
                    member.standing.on_replaced();
                    (member.stream, member.asked_at) = (None, None);
                    continue;
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

        fn respond(&mut self, index: usize) {
            let member = &mut self.members[index];
            member.standing.on_response(self.now);
            (member.stream, member.asked_at) = (Some(Stream::Idle), None);
        }

        fn take_steps(&mut self) -> Vec<String> {
            std::mem::take(&mut self.steps)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_member_is_asked_before_one_is_asked_again() {
        let mut play = Play::new(3);
        play.wait(HEDGE_AFTER * 6);
        let expected = [
            "0 open 0",
            "1 open 1",
            "2 open 2",
            "3 replace 0",
            "3 open 0",
            "4 replace 1",
            "4 open 1",
            "5 replace 2",
            "5 open 2",
        ];
        assert_eq!(play.take_steps(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn single_silent_member_is_asked_ever_more_rarely() {
        let mut play = Play::new(1);
        play.wait(HEDGE_AFTER * 22);
        let expected = [
            "0 open 0",
            "3 replace 0",
            "3 open 0",
            "9 replace 0",
            "9 open 0",
            "21 replace 0",
            "21 open 0",
        ];
        assert_eq!(play.take_steps(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn member_that_responded_last_is_preferred() {
        let mut play = Play::new(3);
        for index in [0, 2, 1] {
            play.now += HEDGE_AFTER;
            play.respond(index);
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
        // But not for ever: this lease may be forgotten.
        play.now += HEDGE_AFTER * 2;
        play.members[0].stream = Some(Stream::Owing(play.now));
        assert_eq!(play.step(), Step::Open(vec![1]));
    }

    #[tokio::test(start_paused = true)]
    async fn unconnected_stream_is_never_replaced() {
        let mut play = Play::new(1);
        play.ask();
        play.members[0].stream = Some(Stream::Waiting);
        play.now += HEDGE_AFTER * 100;
        assert_eq!(play.step(), Step::Wait(None));
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
