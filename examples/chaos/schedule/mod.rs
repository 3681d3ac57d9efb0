//! Which faults are played, and when: a pure function of the seed.
//!
//! Faults come in lanes. Those of one lane are played one after the other, those of different lanes
//! overlap as they like. That bounds what can go wrong at once: one member, or all of them, at a time,
//! so etcd is without a majority only where that is the fault; two paths; one thing done by hand.

mod lanes;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use fastrand::Rng;

use lanes::Lane;

/// How many servers there are at first, and about how many there are throughout.
pub const SERVERS: usize = 20;

/// The servers in the first so many places reach etcd over a path of their own, that can be cut.
pub const SERVER_PATHS: usize = 6;

/// How many clients there are.
pub const CLIENTS: usize = 5;

/// Of so many places, one has servers that register twice, at one address and under one lease: so that
/// keys are also changed and deleted beside others of the same registrar.
const DOUBLE: usize = 3;

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

    /// The ids that it registers: one, or two.
    pub fn ids(self) -> impl Iterator<Item = String> {
        let second = self.place.is_multiple_of(DOUBLE);
        let second = second.then(|| format!("{self}-b"));
        std::iter::once(self.to_string()).chain(second)
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
    /// So many revisions by others, in no key of ours: after a wipe the new history soon is longer than
    /// the old one was.
    Advance(u32),
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
            Fault::Advance(revisions) => write!(f, "{revisions} revisions by others"),
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
        // Only who leaves in peace depends on when the members come to rest.
        let mut lane = || Lane {
            rng: rng.fork(),
            until,
        };
        let members = lane().members();
        let clients = (0..CLIENT_PATHS).map(Path::Client).collect();
        let servers = (0..SERVER_PATHS).map(Path::Server).collect();
        let paths = [lane().paths(clients), lane().paths(servers)];
        let (servers, lives) = lane().servers(lanes::rests(&members));
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
