//! The faults of each lane.

use std::time::Duration;

use fastrand::Rng;

use super::{Damage, Fault, MANY, MEMBERS, Name, Path, Planned, SERVERS, Schedule};

/// Revisions per [`Fault::Advance`]; a history of twenty servers has a few hundred revisions
/// without it.
const REVISIONS: u32 = 200;

/// A pause in milliseconds after which everything has settled: 5 s after the fault is undone, which
/// takes some seconds if all members restart. Each minute has at least one.
const REST: (u64, u64) = (8_000, 9_000);

/// The time within such a pause when an otherwise undisturbed server is asked to leave, so that
/// every run of a minute checks leaving: after the fault is undone, and with the rest of the pause
/// to leave in.
const LEAVE_AFTER: Duration = Duration::from_secs(5);

/// The minimum age of a server that is asked to leave then, so that it is registered.
const MIN_AGE: Duration = Duration::from_secs(5);

/// A server's life, as the schedule plans it.
pub(super) struct PlannedServer {
    name: Name,
    from: Duration,
    to: Option<Duration>,
    /// The only fault of this server is that it is asked to leave.
    only_leaves: bool,
}

impl PlannedServer {
    fn start(name: Name, from: Duration) -> Self {
        Self {
            name,
            from,
            to: None,
            only_leaves: false,
        }
    }
}

/// The times at which a server can leave without one of these faults in the way.
pub(super) fn rest_points(members: &[Planned]) -> Vec<Duration> {
    let pauses = members.windows(2).map(|pair| {
        let undone = pair[0].at + pair[0].lasts;
        (undone, pair[1].at - undone)
    });
    let rest_points = pauses.filter(|(_, pause)| *pause >= Duration::from_millis(REST.0));
    rest_points
        .map(|(undone, _)| undone + LEAVE_AFTER)
        .collect()
}

/// Draws each kind once in random order, then again: a run of three minutes has every kind.
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

/// Generates the faults of a lane.
pub(super) struct Lane {
    pub(super) rng: Rng,
    pub(super) until: Duration,
}

impl Lane {
    fn between(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.u64(least..=most))
    }

    /// Picks one of `choices`; `None` if there are none.
    fn choose<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        self.rng.choice(choices).copied()
    }

    pub(super) fn members(mut self) -> Vec<Planned> {
        type Kind = (fn(usize) -> Fault, u64, u64);
        // With the range of durations in milliseconds. A lost majority lasts up to twice the
        // servers' TTL, a dead member both shorter and longer than an election, and a leader hangs
        // for longer than the TTL.
        let kinds: Vec<Kind> = vec![
            (Fault::KillMember, 300, 6_000),
            (Fault::PauseMember, 300, 8_000),
            (Fault::RestartMember, 0, 0),
            (Fault::WipeMember, 0, 0),
            (Fault::ReplaceWithLearner, 500, 4_000),
            (|_| Fault::HangLeader, 4_000, 8_000),
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
        while let (Some(fault), Some(path)) = (deck.draw(&mut self.rng), self.choose(&paths)) {
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

    pub(super) fn manual_edits(mut self, servers: &[PlannedServer]) -> Vec<Planned> {
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
            let there: Vec<Name> = servers
                .iter()
                .filter(|server| !server.only_leaves)
                .filter(|server| server.from <= at && server.to.is_none_or(|to| at < to))
                .map(|server| server.name)
                .collect();
            let (Some(fault), Some(name)) = (deck.draw(&mut self.rng), self.choose(&there)) else {
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

    pub(super) fn servers(
        mut self,
        rest_points: Vec<Duration>,
    ) -> (Vec<Planned>, Vec<PlannedServer>) {
        #[derive(Clone, Copy)]
        enum Kind {
            Kill,
            End,
            Join,
        }
        use Kind::{End, Join, Kill};
        let mut deck = Deck::new(vec![Kill, Kill, Kill, Kill, End, End, End, End, Join]);
        let mut servers: Vec<PlannedServer> = Schedule::first_servers()
            .into_iter()
            .map(|name| PlannedServer::start(name, Duration::ZERO))
            .collect();
        let mut rest_points = rest_points.into_iter().peekable();
        let mut next_slot = SERVERS;
        let mut planned = Vec::new();
        let mut next = self.between(500, 2_000);
        loop {
            let rest = rest_points.next_if(|rest| *rest <= next);
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
            let there: Vec<usize> = (0..servers.len())
                .filter(|server| servers[*server].to.is_none())
                .collect();
            // Excludes servers whose path may be cut, and servers that are still starting.
            let is_free = |server: &PlannedServer| {
                server.name.path().is_none() && server.from + MIN_AGE <= at
            };
            let choices: Vec<usize> = there
                .iter()
                .copied()
                .filter(|server| rest.is_none() || is_free(&servers[*server]))
                .collect();
            let (fault, newcomers) = match kind {
                Join if there.len() <= MANY => {
                    let count = self.rng.usize(3..=6);
                    let names = first_of_slots(next_slot..next_slot + count);
                    next_slot += count;
                    (Fault::Join(names.clone()), names)
                }
                Kill | End | Join => {
                    let Some(chosen) = self.choose(&choices) else {
                        break;
                    };
                    let server = &mut servers[chosen];
                    server.to = Some(at);
                    server.only_leaves = rest.is_some();
                    let successor = successor(server.name, there.len());
                    let fault = match kind {
                        End => Fault::TerminateServer(server.name, successor),
                        Kill | Join => Fault::KillServer(server.name, successor),
                    };
                    (fault, successor.into_iter().collect())
                }
            };
            servers.extend(
                newcomers
                    .into_iter()
                    .map(|name| PlannedServer::start(name, at)),
            );
            planned.push(Planned {
                at,
                lasts: Duration::ZERO,
                fault,
            });
            if rest.is_none() {
                next += self.between(300, 4_000);
            }
        }
        (planned, servers)
    }
}

/// The successor of a server that ends while `running` servers run. A server whose path can be cut
/// always has one, so that the paths are in use.
fn successor(name: Name, running: usize) -> Option<Name> {
    let has_successor = running <= SERVERS || name.path().is_some();
    has_successor.then(|| name.successor())
}

/// The first servers of these slots.
fn first_of_slots(slots: std::ops::Range<usize>) -> Vec<Name> {
    slots
        .map(|slot| Name {
            slot,
            generation: 0,
        })
        .collect()
}
