//! The record of a run, as far as the checks need it. Times count from the start of the run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::Instance;
use goo_etcd::format::{EtcdNaming, Format, KeyContext};
use tokio::time::Instant;

use crate::schedule::{Fault, Name, Path};

/// The service name of all servers.
pub const SERVICE: &str = "chaos";

/// The default prefix of [`EtcdNaming`].
const PREFIX: &str = "services";

/// The key prefix of the service.
pub fn range() -> String {
    format!("{PREFIX}/{SERVICE}/")
}

/// The keys of a server, at least one.
pub fn keys_of(name: Name) -> impl Iterator<Item = String> {
    name.ids().map(|id| format!("{PREFIX}/{SERVICE}/{id}"))
}

/// The key that manual edits of a server act on: its last. A server with two keys keeps the other.
pub fn last_key_of(name: Name) -> String {
    keys_of(name).last().unwrap_or_default()
}

/// Decodes a value; `None` if it is invalid.
pub fn decode(key: &str, value: &[u8]) -> Option<Arc<Instance>> {
    let context = KeyContext::new(PREFIX, SERVICE, key.as_bytes());
    let decoded = EtcdNaming.decode(context, value);
    decoded.ok()?.pop().map(Arc::new)
}

/// Instances by key.
pub type InstanceMap = BTreeMap<String, Arc<Instance>>;

/// The clock of a run.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn now(self) -> Duration {
        self.0.elapsed()
    }

    pub fn instant(self, at: Duration) -> Instant {
        self.0 + at
    }
}

/// A change of one key in etcd.
#[derive(Debug, Clone)]
pub struct Change {
    /// When the observer received it.
    pub at: Duration,
    pub revision: i64,
    pub key: String,
    /// The revision that created the key.
    pub create_revision: i64,
    pub lease: i64,
    /// `None` for a deletion.
    pub value: Option<Vec<u8>>,
}

/// One history of etcd. Wiping all members begins another.
#[derive(Debug, Clone, Default)]
pub struct Epoch {
    pub began: Duration,
    pub ended: Option<Duration>,
    /// The last revision that was seen. No client can have seen a later one while the history
    /// lasts.
    pub known_to: i64,
    /// Whether the history has certainly no later revision. Known only once it has ended.
    pub whole: bool,
    /// Ordered by revision.
    pub changes: Vec<Change>,
}

/// A snapshot that a directory published.
#[derive(Debug, Clone)]
pub struct ShownSnapshot {
    pub at: Duration,
    pub revision: i64,
    pub instances: InstanceMap,
}

/// A call that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    pub client: usize,
    pub begun: Duration,
    pub ended: Duration,
    /// The status code and message.
    pub status: String,
    /// The endpoint that the call was sent to: its address begins the message.
    pub sent_to: Option<String>,
}

/// How a server was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitKind {
    /// SIGKILL.
    Killed,
    /// SIGTERM.
    Terminated,
}

/// A server process, from start to exit.
#[derive(Debug, Clone)]
pub struct Life {
    pub name: Name,
    pub address: String,
    pub started: Duration,
    pub end: Option<Exit>,
}

#[derive(Debug, Clone, Copy)]
pub struct Exit {
    pub how: ExitKind,
    /// When the signal was sent.
    pub signalled: Duration,
    /// When the process had exited.
    pub gone: Duration,
}

/// A reason why a lease may outlive its server by more than its TTL.
#[derive(Debug, Clone, Copy)]
pub enum Extension {
    /// A new leader restarts the TTL of all leases. A restart of all members does too.
    Leader { at: Duration },
    /// Messages sent before or during this time, a renewal perhaps, waited until its end: in a
    /// paused member, or on a path; the latter only for servers on that path.
    Delayed {
        from: Duration,
        to: Duration,
        path: Option<Path>,
    },
    /// Expired keys could not be removed: there was no leader, or the machine stalled.
    Standstill { from: Duration, to: Duration },
}

impl Extension {
    /// How a fault affects leases, if it lasted from `from` to `to`. Ending or starting one member
    /// extends no lease; the observer records a new leader separately.
    pub fn by(fault: &Fault, from: Duration, to: Duration) -> Option<Self> {
        let path = match fault {
            Fault::PauseMember(_) | Fault::HangLeader | Fault::PauseAll => None,
            Fault::Cut(path) | Fault::Blackhole(path) => Some(*path),
            _ => return None,
        };
        Some(Extension::Delayed { from, to, path })
    }
}

/// A time span in which a fault was active.
#[derive(Debug, Clone, Copy)]
pub struct Disturbance {
    pub from: Duration,
    pub to: Duration,
    pub scope: Scope,
}

/// The clients and servers that a fault affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    All,
    /// Clients or servers on this path.
    Path(Path),
    Server(Name),
}

impl Scope {
    /// The scope of a fault while it lasts. The exit of a server process is part of its [`Life`]
    /// instead.
    pub fn of(fault: &Fault) -> Option<Self> {
        match fault {
            Fault::KillMember(_)
            | Fault::PauseMember(_)
            | Fault::RestartMember(_)
            | Fault::WipeMember(_)
            | Fault::ReplaceWithLearner(_)
            | Fault::HangLeader
            | Fault::KillAll
            | Fault::PauseAll
            | Fault::WipeAll => Some(Scope::All),
            Fault::Cut(path) | Fault::Blackhole(path) => Some(Scope::Path(*path)),
            Fault::RevokeLease(name) | Fault::DeleteKey(name) | Fault::CorruptKey(name, _) => {
                Some(Scope::Server(*name))
            }
            Fault::Compact
            | Fault::Advance(_)
            | Fault::KillServer(..)
            | Fault::TerminateServer(..)
            | Fault::Join(_) => None,
        }
    }

    /// Whether the scope includes this server.
    pub fn includes(self, server: Name) -> bool {
        match self {
            Scope::All => true,
            Scope::Path(path) => server.path() == Some(path),
            Scope::Server(name) => server == name,
        }
    }
}
