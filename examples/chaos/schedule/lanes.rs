//! What happens in each lane.

use std::time::Duration;

use fastrand::Rng;

use super::{Damage, Fault, MANY, MEMBERS, Name, Path, Planned, SERVERS, Schedule};

/// How many revisions others make at a time; with twenty servers a history has some hundred by itself.
const REVISIONS: u32 = 200;

/// A pause that is long enough for everything to come to rest, in milliseconds: 5 s after the fault is
/// undone, which takes some seconds where all members start again. A minute has one at least.
const REST: (u64, u64) = (8_000, 9_000);

/// When in such a pause a server is asked to leave that nothing else is done to, so that leaving is judged
/// in every run of a minute: after the fault is undone, and with the rest of the pause to leave in.
const LEAVE_AFTER: Duration = Duration::from_secs(5);

/// How old that server is at least: it is registered.
const GROWN_UP: Duration = Duration::from_secs(5);

/// When a server is there, according to the schedule.
pub(super) struct Life {
    name: Name,
    from: Duration,
    to: Option<Duration>,
    /// Nothing is done to it but to ask it to leave.
    spared: bool,
}

impl Life {
    fn begin(name: Name, from: Duration) -> Self {
        Self {
            name,
            from,
            to: None,
            spared: false,
        }
    }
}

/// When something can leave with no fault of these in its way.
pub(super) fn rests(members: &[Planned]) -> Vec<Duration> {
    let pauses = members.windows(2).map(|pair| {
        let undone = pair[0].at + pair[0].lasts;
        (undone, pair[1].at - undone)
    });
    let rests = pauses.filter(|(_, pause)| *pause >= Duration::from_millis(REST.0));
    rests.map(|(undone, _)| undone + LEAVE_AFTER).collect()
}

/// Each kind once, in random order, and again: a run of three minutes has every kind.
struct Deck<T> {
    all: Vec<T>,
    left: Vec<T>,
}

impl<T: Clone> Deck<T> {
    fn new(all: Vec<T>) -> Self {
        Self {
            all,
            left: Vec::new(),
        }
    }

    fn draw(&mut self, rng: &mut Rng) -> Option<T> {
        if self.left.is_empty() {
            self.left.clone_from(&self.all);
            rng.shuffle(&mut self.left);
        }
        self.left.pop()
    }
}

/// Where the faults of a lane come from.
pub(super) struct Lane {
    pub(super) rng: Rng,
    pub(super) until: Duration,
}

impl Lane {
    fn between(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.u64(least..=most))
    }

    /// What one of `choices` is; there is at least one.
    fn one_of<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        self.rng.choice(choices).copied()
    }

    pub(super) fn members(mut self) -> Vec<Planned> {
        type Kind = (fn(usize) -> Fault, u64, u64);
        // With how long they last, in milliseconds. A dead majority lasts up to twice the servers'
        // time to live, a dead member shorter and longer than an election.
        let kinds: Vec<Kind> = vec![
            (Fault::KillMember, 300, 6_000),
            (Fault::PauseMember, 300, 8_000),
            (Fault::RestartMember, 0, 0),
            (Fault::WipeMember, 0, 0),
            (|_| Fault::KillAll, 100, 6_000),
            (|_| Fault::PauseAll, 300, 5_000),
            (|_| Fault::WipeAll, 0, 2_000),
        ];
        let mut deck = Deck::new(kinds);
        let mut pauses = Deck::new(vec![(1_000, 4_000), (1_000, 4_000), REST]);
        let mut planned = Vec::new();
        let mut at = self.between(500, 2_000);
        while let Some((fault, least, most)) = deck.draw(&mut self.rng) {
            let member = self.rng.usize(..MEMBERS);
            let lasts = self.between(least, most);
            if at + lasts > self.until {
                break;
            }
            let fault = fault(member);
            planned.push(Planned { at, lasts, fault });
            let (least, most) = pauses.draw(&mut self.rng).unwrap_or(REST);
            at += lasts + self.between(least, most);
        }
        planned
    }

    pub(super) fn paths(mut self, paths: Vec<Path>) -> Vec<Planned> {
        let mut deck: Deck<fn(Path) -> Fault> = Deck::new(vec![Fault::Cut, Fault::Blackhole]);
        let mut planned = Vec::new();
        let mut at = self.between(200, 3_000);
        while let (Some(fault), Some(path)) = (deck.draw(&mut self.rng), self.one_of(&paths)) {
            let lasts = self.between(100, 8_000);
            if at + lasts > self.until {
                break;
            }
            let fault = fault(path);
            planned.push(Planned { at, lasts, fault });
            at += lasts + self.between(300, 4_000);
        }
        planned
    }

    pub(super) fn by_hand(mut self, lives: &[Life]) -> Vec<Planned> {
        type Kind = fn(Name) -> Fault;
        let kinds: Vec<Kind> = vec![
            |_| Fault::Compact,
            Fault::RevokeLease,
            Fault::DeleteKey,
            |name| Fault::CorruptKey(name, Damage::Garbage),
            |name| Fault::CorruptKey(name, Damage::Half),
            |name| Fault::CorruptKey(name, Damage::OtherAddress),
            |_| Fault::Compact,
            |_| Fault::Advance(REVISIONS),
        ];
        let mut deck = Deck::new(kinds);
        let mut planned = Vec::new();
        let mut at = self.between(300, 1_500);
        while at < self.until {
            let there: Vec<Name> = lives
                .iter()
                .filter(|life| !life.spared)
                .filter(|life| life.from <= at && life.to.is_none_or(|to| at < to))
                .map(|life| life.name)
                .collect();
            let (Some(fault), Some(name)) = (deck.draw(&mut self.rng), self.one_of(&there)) else {
                break;
            };
            planned.push(Planned {
                at,
                lasts: Duration::ZERO,
                fault: fault(name),
            });
            at += self.between(500, 3_000);
        }
        planned
    }

    pub(super) fn servers(mut self, rests: Vec<Duration>) -> (Vec<Planned>, Vec<Life>) {
        #[derive(Clone, Copy)]
        enum Kind {
            Kill,
            End,
            Join,
        }
        use Kind::{End, Join, Kill};
        let mut deck = Deck::new(vec![Kill, Kill, Kill, Kill, End, End, End, End, Join]);
        let mut lives: Vec<Life> = Schedule::first_servers()
            .into_iter()
            .map(|name| Life::begin(name, Duration::ZERO))
            .collect();
        let mut rests = rests.into_iter().peekable();
        let mut next_place = SERVERS;
        let mut planned = Vec::new();
        let mut next = self.between(500, 2_000);
        loop {
            let rest = rests.next_if(|rest| *rest <= next);
            let at = rest.unwrap_or(next);
            if at >= self.until {
                break;
            }
            let kind = match rest {
                Some(_) => Some(End),
                None => deck.draw(&mut self.rng),
            };
            let Some(kind) = kind else {
                break;
            };
            let there: Vec<usize> = (0..lives.len())
                .filter(|life| lives[*life].to.is_none())
                .collect();
            // What a path of its own would be in the way of, and its beginning.
            let is_free = |life: &Life| life.name.path().is_none() && life.from + GROWN_UP <= at;
            let choices: Vec<usize> = there
                .iter()
                .copied()
                .filter(|life| rest.is_none() || is_free(&lives[*life]))
                .collect();
            let newcomers: Vec<Name>;
            let fault = match kind {
                Join if there.len() <= MANY => {
                    let count = self.rng.usize(3..=6);
                    let names =
                        (next_place..next_place + count).map(|place| Name { place, turn: 0 });
                    newcomers = names.collect();
                    next_place += count;
                    Fault::Join(newcomers.clone())
                }
                Kill | End | Join => {
                    let Some(chosen) = self.one_of(&choices) else {
                        break;
                    };
                    let name = lives[chosen].name;
                    lives[chosen].to = Some(at);
                    lives[chosen].spared = rest.is_some();
                    // Those of the first places always have one, so that their paths are in use.
                    let succeeded = there.len() <= SERVERS || name.path().is_some();
                    let heir = succeeded.then(|| name.heir());
                    newcomers = heir.into_iter().collect();
                    match kind {
                        End => Fault::EndServer(name, heir),
                        Kill | Join => Fault::KillServer(name, heir),
                    }
                }
            };
            lives.extend(newcomers.into_iter().map(|name| Life::begin(name, at)));
            planned.push(Planned {
                at,
                lasts: Duration::ZERO,
                fault,
            });
            if rest.is_none() {
                next += self.between(300, 4_000);
            }
        }
        (planned, lives)
    }
}
