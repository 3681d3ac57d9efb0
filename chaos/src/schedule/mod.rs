//! The schedule of faults: a pure function of the seed.
//!
//! Faults are planned in lanes. Faults of one lane run one after the other; those of different
//! lanes overlap freely. That bounds the faults at any time: one member or all members, so that
//! etcd loses its majority only in faults that say so; two paths; one manual edit.

mod lanes;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::Duration;

use fastrand::Rng;

use lanes::Lane;

/// The number of servers at the start, and about the number throughout.
pub const SERVERS: usize = 20;

/// Servers in the first `SERVER_PATHS` slots reach etcd over a path that can be cut.
pub const SERVER_PATHS: usize = 6;

/// The number of clients.
pub const CLIENTS: usize = 5;

/// Servers in every third slot register two instances at one address and under one lease, so that
/// keys are changed and deleted beside other keys of the same registrar.
const DOUBLE: usize = 3;

/// The first `CLIENT_PATHS` clients reach etcd over a path that can be cut.
pub const CLIENT_PATHS: usize = 3;

/// The number of etcd members.
pub const MEMBERS: usize = 3;

/// No fault is active this long before the end, which leaves time to converge (5 s) and for the
/// leases of killed servers to expire.
pub const QUIET: Duration = Duration::from_secs(10);

/// The shortest run that has time for faults.
pub const SHORTEST: Duration = Duration::from_secs(15);

/// Above this number of servers no more join, and servers that end get no successor until the
/// initial number is reached again.
const MANY: usize = 22;

/// A network path to all etcd members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// The path of a client.
    Client(usize),
    /// The path shared by the consecutive servers of a slot.
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

/// Identifies a server among all servers of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// A server and its successors share a slot.
    pub slot: usize,
    /// The number of earlier servers in that slot.
    pub generation: usize,
}

impl Name {
    /// The server's path to etcd, if it has a path that can be cut.
    pub fn path(self) -> Option<Path> {
        (self.slot < SERVER_PATHS).then_some(Path::Server(self.slot))
    }

    /// The instance ids that the server registers: one or two.
    pub fn ids(self) -> impl Iterator<Item = String> {
        let second = self.slot.is_multiple_of(DOUBLE);
        let second = second.then(|| format!("{self}-b"));
        std::iter::once(self.to_string()).chain(second)
    }

    fn successor(self) -> Self {
        Self {
            generation: self.generation + 1,
            ..self
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{:02}-{}", self.slot, self.generation)
    }
}

/// The value that a manual edit writes over a key, without a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Bytes that cannot be decoded.
    Garbage,
    /// The first half of the present value.
    Half,
    /// An address at which nothing listens.
    OtherAddress,
}

/// One fault. A lasting one is undone after [`Planned::lasts`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; starts with its data after a while.
    KillMember(usize),
    /// SIGSTOP; SIGCONT after a while.
    PauseMember(usize),
    /// SIGTERM; starts with its data at once.
    RestartMember(usize),
    /// The member loses its data and is replaced by an empty one.
    WipeMember(usize),
    /// The same, but the new member is a learner at first, and is promoted after a while.
    ReplaceWithLearner(usize),
    /// SIGSTOP of the leader for longer than a lease lasts; SIGCONT after that.
    HangLeader,
    KillAll,
    PauseAll,
    /// All members lose their data: a new history begins.
    WipeAll,
    Cut(Path),
    Blackhole(Path),
    Compact,
    /// This number of revisions by other clients, outside of our prefix. After a wipe the new
    /// history soon is longer than the old one was.
    Advance(u32),
    RevokeLease(Name),
    DeleteKey(Name),
    CorruptKey(Name, Damage),
    /// SIGKILL; the successor starts at once.
    KillServer(Name, Option<Name>),
    /// SIGTERM; the successor starts at once.
    TerminateServer(Name, Option<Name>),
    /// Several servers start at the same time.
    Join(Vec<Name>),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let and_successor = |successor: &Option<Name>| match successor {
            Some(successor) => format!(", {successor} starts"),
            None => String::new(),
        };
        match self {
            Fault::KillMember(member) => write!(f, "kill member {member}"),
            Fault::PauseMember(member) => write!(f, "pause member {member}"),
            Fault::RestartMember(member) => write!(f, "restart member {member}"),
            Fault::WipeMember(member) => write!(f, "wipe member {member}"),
            Fault::ReplaceWithLearner(member) => {
                write!(f, "replace member {member} with a learner")
            }
            Fault::HangLeader => write!(f, "hang the leader"),
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
            Fault::KillServer(name, successor) => {
                write!(f, "SIGKILL {name}{}", and_successor(successor))
            }
            Fault::TerminateServer(name, successor) => {
                write!(f, "SIGTERM {name}{}", and_successor(successor))
            }
            Fault::Join(names) => {
                let names: Vec<String> = names.iter().map(Name::to_string).collect();
                write!(f, "{} start: {}", names.len(), names.join(" "))
            }
        }
    }
}

/// A fault and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Since the start of the run.
    pub at: Duration,
    /// The time until the fault is undone, not counting the undoing itself. Zero for instantaneous
    /// faults.
    pub lasts: Duration,
    pub fault: Fault,
}

/// All planned faults, by lane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// Faults of etcd members, one after the other.
    pub members: Vec<Planned>,
    /// Faults of paths. The faults of each list run one after the other, so that a path never has
    /// two.
    pub paths: [Vec<Planned>; 2],
    /// Manual edits in etcd, one after the other.
    pub manual_edits: Vec<Planned>,
    /// Faults of servers, which may overlap.
    pub servers: Vec<Planned>,
}

impl Schedule {
    /// Plans the faults of `seed` for a run of this length.
    pub fn new(seed: u64, length: Duration) -> Self {
        let until = length.saturating_sub(QUIET);
        let mut rng = Rng::with_seed(seed);
        // Each lane has a separate random number generator, so that a change of one lane leaves the
        // others as they are. Only the servers that leave undisturbed depend on the members' lane.
        let mut lane = || Lane {
            rng: rng.fork(),
            until,
        };
        let members = lane().members();
        let clients = (0..CLIENT_PATHS).map(Path::Client).collect();
        let servers = (0..SERVER_PATHS).map(Path::Server).collect();
        let paths = [lane().paths(clients), lane().paths(servers)];
        let (servers, lives) = lane().servers(lanes::rest_points(&members));
        let manual_edits = lane().manual_edits(&lives);
        Self {
            members,
            paths,
            manual_edits,
            servers,
        }
    }

    /// The servers of the start.
    pub fn first_servers() -> Vec<Name> {
        (0..SERVERS)
            .map(|slot| Name {
                slot,
                generation: 0,
            })
            .collect()
    }
}
