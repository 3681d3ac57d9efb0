//! Which faults are played, and when: a pure function of the seed.
//!
//! Faults come in lanes. Those of one lane are played one after the other, those of different lanes
//! overlap as they like. That bounds what can go wrong at once: one member, or all of them, at a time,
//! so etcd is without a majority only where that is the fault; two paths; one thing done by hand.

use std::fmt;
use std::time::Duration;

use fastrand::Rng;

/// How many servers there are at first, and about how many there are throughout.
pub const SERVERS: usize = 20;

/// The servers in the first so many places reach etcd over a path of their own, that can be cut.
pub const SERVER_PATHS: usize = 6;

/// How many clients there are.
pub const CLIENTS: usize = 5;

/// The first so many clients reach etcd over a path of their own.
pub const CLIENT_PATHS: usize = 3;

/// The members of etcd.
pub const MEMBERS: usize = 3;

/// How long before the end no fault begins or lasts, so that there is time to see whether everything
/// is put right: 5 s to converge, and what a lease may last beyond a server's death.
pub const QUIET: Duration = Duration::from_secs(10);

/// Below this there is no time for faults.
pub const SHORTEST: Duration = Duration::from_secs(15);

/// With more than this many servers no others join; those that end have no heir until there are as many
/// as at first again.
const MANY: usize = 22;

/// A way to all members of etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// That of a client.
    Client(usize),
    /// That of the servers in a place, one after the other.
    Server(usize),
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Client(index) => write!(f, "client {index}"),
            Path::Server(place) => write!(f, "the server in place {place}"),
        }
    }
}

/// What tells a server from all others, also from its predecessors in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// Servers that follow each other share a place.
    pub place: usize,
    /// How many were in that place before.
    pub turn: usize,
}

impl Name {
    /// The path on which it reaches etcd, if it has one of its own.
    pub fn path(self) -> Option<Path> {
        (self.place < SERVER_PATHS).then_some(Path::Server(self.place))
    }

    fn heir(self) -> Self {
        Self {
            turn: self.turn + 1,
            ..self
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{:02}-{}", self.place, self.turn)
    }
}

/// What somebody's hand writes over a key, without a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Nothing that can be decoded.
    Garbage,
    /// The first half of what was there.
    Half,
    /// An address at which nobody listens.
    OtherAddress,
}

/// One fault. Those that last are undone after [`Planned::lasts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and a start with its data after a while.
    KillMember(usize),
    /// SIGSTOP, and SIGCONT after a while.
    PauseMember(usize),
    /// SIGTERM, and a start with its data at once.
    RestartMember(usize),
    /// Its data is lost: replaced by an empty one.
    WipeMember(usize),
    KillAll,
    PauseAll,
    /// All data is lost: a new history begins.
    WipeAll,
    Cut(Path),
    Blackhole(Path),
    Compact,
    RevokeLease(Name),
    DeleteKey(Name),
    CorruptKey(Name, Damage),
    /// SIGKILL; the heir starts at once.
    KillServer(Name, Option<Name>),
    /// SIGTERM; the heir starts at once.
    EndServer(Name, Option<Name>),
    /// Many start at the same time.
    Join(Vec<Name>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let and_heir = |heir: &Option<Name>| match heir {
            Some(heir) => format!(", {heir} starts"),
            None => String::new(),
        };
        match self {
            Fault::KillMember(member) => write!(f, "kill member {member}"),
            Fault::PauseMember(member) => write!(f, "pause member {member}"),
            Fault::RestartMember(member) => write!(f, "restart member {member}"),
            Fault::WipeMember(member) => write!(f, "wipe member {member}"),
            Fault::KillAll => write!(f, "kill all members"),
            Fault::PauseAll => write!(f, "pause all members"),
            Fault::WipeAll => write!(f, "wipe all members"),
            Fault::Cut(path) => write!(f, "cut the path of {path}"),
            Fault::Blackhole(path) => write!(f, "blackhole on the path of {path}"),
            Fault::Compact => write!(f, "compact"),
            Fault::RevokeLease(name) => write!(f, "revoke the lease of {name}"),
            Fault::DeleteKey(name) => write!(f, "delete the key of {name}"),
            Fault::CorruptKey(name, damage) => write!(f, "overwrite {name} ({damage:?})"),
            Fault::KillServer(name, heir) => write!(f, "SIGKILL {name}{}", and_heir(heir)),
            Fault::EndServer(name, heir) => write!(f, "SIGTERM {name}{}", and_heir(heir)),
            Fault::Join(names) => {
                let names: Vec<String> = names.iter().map(Name::to_string).collect();
                write!(f, "{} start: {}", names.len(), names.join(" "))
            }
        }
    }
}

/// A fault with its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Since the beginning.
    pub at: Duration,
    /// How long until it is undone; what undoing takes comes on top. Zero for what happens at once.
    pub lasts: Duration,
    pub fault: Fault,
}

/// All that is planned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// To members of etcd, one after the other.
    pub members: Vec<Planned>,
    /// To paths; the faults of one list come one after the other, never two on one path at a time.
    pub paths: [Vec<Planned>; 2],
    /// What somebody does in etcd, one after the other.
    pub by_hand: Vec<Planned>,
    /// To servers; each at its time.
    pub servers: Vec<Planned>,
}

impl Schedule {
    /// The faults of `seed` for a run of this length.
    pub fn new(seed: u64, length: Duration) -> Self {
        let until = length.saturating_sub(QUIET);
        let mut rng = Rng::with_seed(seed);
        // Lanes draw from sources of their own, so that each can be changed without the others.
        let mut lane = || Lane {
            rng: rng.fork(),
            until,
        };
        let members = lane().members();
        let clients = (0..CLIENT_PATHS).map(Path::Client).collect();
        let servers = (0..SERVER_PATHS).map(Path::Server).collect();
        let paths = [lane().paths(clients), lane().paths(servers)];
        let (servers, lives) = lane().servers();
        let by_hand = lane().by_hand(&lives);
        Self {
            members,
            paths,
            by_hand,
            servers,
        }
    }

    /// The servers that are there at the beginning.
    pub fn first_servers() -> Vec<Name> {
        (0..SERVERS).map(|place| Name { place, turn: 0 }).collect()
    }
}

/// When a server is there, according to the schedule.
struct Life {
    name: Name,
    from: Duration,
    to: Option<Duration>,
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

struct Lane {
    rng: Rng,
    until: Duration,
}

impl Lane {
    fn between(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.u64(least..=most))
    }

    /// What one of `choices` is; there is at least one.
    fn one_of<T: Copy>(&mut self, choices: &[T]) -> Option<T> {
        self.rng.choice(choices).copied()
    }

    fn members(mut self) -> Vec<Planned> {
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
            // Some of the pauses are long enough for everything to come to rest.
            at += lasts + self.between(1_000, 8_000);
        }
        planned
    }

    fn paths(mut self, paths: Vec<Path>) -> Vec<Planned> {
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

    fn by_hand(mut self, lives: &[Life]) -> Vec<Planned> {
        type Kind = fn(Name) -> Fault;
        let kinds: Vec<Kind> = vec![
            |_| Fault::Compact,
            Fault::RevokeLease,
            Fault::DeleteKey,
            |name| Fault::CorruptKey(name, Damage::Garbage),
            |name| Fault::CorruptKey(name, Damage::Half),
            |name| Fault::CorruptKey(name, Damage::OtherAddress),
            |_| Fault::Compact,
        ];
        let mut deck = Deck::new(kinds);
        let mut planned = Vec::new();
        let mut at = self.between(300, 1_500);
        while at < self.until {
            let there: Vec<Name> = lives
                .iter()
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

    fn servers(mut self) -> (Vec<Planned>, Vec<Life>) {
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
            .map(|name| Life {
                name,
                from: Duration::ZERO,
                to: None,
            })
            .collect();
        let mut next_place = SERVERS;
        let mut planned = Vec::new();
        let mut at = self.between(500, 2_000);
        while at < self.until {
            let Some(kind) = deck.draw(&mut self.rng) else {
                break;
            };
            let there: Vec<usize> = (0..lives.len())
                .filter(|life| lives[*life].to.is_none())
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
                    let Some(chosen) = self.one_of(&there) else {
                        break;
                    };
                    let name = lives[chosen].name;
                    lives[chosen].to = Some(at);
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
            lives.extend(newcomers.into_iter().map(|name| Life {
                name,
                from: at,
                to: None,
            }));
            planned.push(Planned {
                at,
                lasts: Duration::ZERO,
                fault,
            });
            at += self.between(300, 4_000);
        }
        (planned, lives)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const THREE_MINUTES: Duration = Duration::from_secs(180);

    fn all(schedule: &Schedule) -> impl Iterator<Item = &Planned> {
        let Schedule {
            members,
            paths,
            by_hand,
            servers,
        } = schedule;
        let paths = paths.iter().flatten();
        members.iter().chain(paths).chain(by_hand).chain(servers)
    }

    #[test]
    fn a_seed_always_gives_the_same_schedule_and_another_one_another() {
        let schedule = Schedule::new(7, THREE_MINUTES);
        assert_eq!(schedule, Schedule::new(7, THREE_MINUTES));
        assert_ne!(schedule, Schedule::new(8, THREE_MINUTES));
    }

    #[test]
    fn three_minutes_have_every_kind_of_fault() {
        for seed in 0..200 {
            let schedule = Schedule::new(seed, THREE_MINUTES);
            let kinds: BTreeSet<String> = all(&schedule)
                .map(|planned| match &planned.fault {
                    Fault::Cut(path) | Fault::Blackhole(path) => {
                        let of_client = matches!(path, Path::Client(_));
                        let cut = matches!(planned.fault, Fault::Cut(_));
                        format!("path {of_client} {cut}")
                    }
                    Fault::CorruptKey(_, damage) => format!("{damage:?}"),
                    fault => format!("{:?}", std::mem::discriminant(fault)),
                })
                .collect();
            assert_eq!(kinds.len(), 7 + 4 + 3 + 3 + 3, "seed {seed}: {kinds:?}");
        }
    }

    #[test]
    fn faults_of_a_lane_do_not_overlap_and_all_end_before_the_quiet_time() {
        for seed in 0..200 {
            let schedule = Schedule::new(seed, THREE_MINUTES);
            for planned in all(&schedule) {
                assert!(planned.at + planned.lasts <= THREE_MINUTES - QUIET);
            }
            let [clients, servers] = &schedule.paths;
            for lane in [&schedule.members, clients, servers, &schedule.by_hand] {
                for pair in lane.windows(2) {
                    assert!(
                        pair[0].at + pair[0].lasts < pair[1].at,
                        "seed {seed}: {pair:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn about_twenty_servers_are_there_throughout_and_each_ends_once() {
        for seed in 0..200 {
            let mut there: BTreeSet<Name> = Schedule::first_servers().into_iter().collect();
            for planned in &Schedule::new(seed, THREE_MINUTES).servers {
                match &planned.fault {
                    Fault::KillServer(name, heir) | Fault::EndServer(name, heir) => {
                        assert!(there.remove(name), "seed {seed}: {name} is not there");
                        there.extend(heir);
                    }
                    Fault::Join(names) => there.extend(names),
                    other => panic!("{other} in the servers' lane"),
                }
                assert!((SERVERS..=MANY + 6).contains(&there.len()), "seed {seed}");
                let paths = there.iter().filter(|name| name.path().is_some());
                assert_eq!(paths.count(), SERVER_PATHS);
            }
        }
    }

    #[test]
    fn the_shortest_run_has_faults() {
        for seed in 0..200 {
            assert!(
                all(&Schedule::new(seed, SHORTEST)).count() >= 3,
                "seed {seed}"
            );
        }
    }
}
