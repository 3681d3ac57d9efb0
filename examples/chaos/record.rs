//! What happened, as far as the checks need it. Times count from the beginning of the run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::Instance;
use goo_etcd::format::{EtcdNaming, Format};
use tokio::time::Instant;

use crate::schedule::{Fault, Name, Path};

/// The service that all servers are.
pub const SERVICE: &str = "chaos";

/// The default prefix of [`EtcdNaming`].
const PREFIX: &str = "services";

/// Where the service's keys are.
pub fn range() -> String {
    format!("{PREFIX}/{SERVICE}/")
}

/// The keys of a server; there is one at least.
pub fn keys_of(name: Name) -> impl Iterator<Item = String> {
    name.ids().map(|id| format!("{PREFIX}/{SERVICE}/{id}"))
}

/// The key of a server that something is done to by hand: the last, beside which there may be another.
pub fn last_key_of(name: Name) -> String {
    keys_of(name).last().unwrap_or_default()
}

/// What a value means; `None` if nothing.
pub fn decode(key: &str, value: &[u8]) -> Option<Arc<Instance>> {
    let decoded = EtcdNaming.decode(PREFIX, SERVICE, key.as_bytes(), value);
    decoded.ok()?.pop().map(Arc::new)
}

/// Instances by key.
pub type Picture = BTreeMap<String, Arc<Instance>>;

/// Tells the time of a run.
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
    /// When it was heard of.
    pub at: Duration,
    pub revision: i64,
    pub key: String,
    /// When the key came to be.
    pub create_revision: i64,
    pub lease: i64,
    /// `None` when it was deleted.
    pub value: Option<Vec<u8>>,
}

/// One history of etcd. When all members are wiped another one begins.
#[derive(Debug, Clone, Default)]
pub struct Epoch {
    pub began: Duration,
    pub ended: Option<Duration>,
    /// No revision after this one was ever shown to anybody, or has been seen here so far.
    pub known_to: i64,
    /// Whether it is certain, of one that has ended, that there was no later revision.
    pub whole: bool,
    /// In order of revision.
    pub changes: Vec<Change>,
}

/// What a directory showed.
#[derive(Debug, Clone)]
pub struct Shown {
    pub at: Duration,
    pub revision: i64,
    pub picture: Picture,
}

/// A call that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    pub client: usize,
    pub begun: Duration,
    pub ended: Duration,
    /// Code and message.
    pub status: String,
    /// The address that the message begins with: where it was sent.
    pub sent_to: Option<String>,
}

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// SIGKILL.
    Killed,
    /// SIGTERM.
    Left,
}

/// A server's life.
#[derive(Debug, Clone)]
pub struct Life {
    pub name: Name,
    pub address: String,
    pub started: Duration,
    pub end: Option<End>,
}

#[derive(Debug, Clone, Copy)]
pub struct End {
    pub how: Ending,
    /// When it was sent the signal.
    pub signalled: Duration,
    /// When its process had ended.
    pub gone: Duration,
}

/// Why a lease may last longer than its time to live from its server's end on.
#[derive(Debug, Clone, Copy)]
pub enum Extension {
    /// There is a new leader, which counts all leases anew. So it is after a restart of all members.
    Leader { at: Duration },
    /// What was sent before or in this time, a renewal perhaps, waited until its end: in a member that was
    /// paused, or on a path, and then only for servers on that path.
    Waited {
        from: Duration,
        to: Duration,
        path: Option<Path>,
    },
    /// There was nobody who could take away what was over: no leader, or the machine stood still.
    Standstill { from: Duration, to: Duration },
}

impl Extension {
    /// What a fault does to leases by itself, if it lasted so long. One member that ends or begins
    /// makes none last longer: where another leads after it, that is seen, and tells of itself.
    pub fn by(fault: &Fault, from: Duration, to: Duration) -> Option<Self> {
        let path = match fault {
            Fault::PauseMember(_) | Fault::PauseAll => None,
            Fault::Cut(path) | Fault::Blackhole(path) => Some(*path),
            _ => return None,
        };
        Some(Extension::Waited { from, to, path })
    }
}

/// A time in which something was wrong, on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Disturbance {
    pub from: Duration,
    pub to: Duration,
    pub whom: Whom,
}

/// Who cannot be expected to be as they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    Everybody,
    /// Who is on this path.
    Path(Path),
    Server(Name),
}

impl Whom {
    /// Whom a fault disturbs while it lasts. What happens to a server's process is told by its [`Life`].
    pub fn disturbed_by(fault: &Fault) -> Option<Self> {
        match fault {
            Fault::KillMember(_)
            | Fault::PauseMember(_)
            | Fault::RestartMember(_)
            | Fault::WipeMember(_)
            | Fault::KillAll
            | Fault::PauseAll
            | Fault::WipeAll => Some(Whom::Everybody),
            Fault::Cut(path) | Fault::Blackhole(path) => Some(Whom::Path(*path)),
            Fault::RevokeLease(name) | Fault::DeleteKey(name) | Fault::CorruptKey(name, _) => {
                Some(Whom::Server(*name))
            }
            Fault::Compact
            | Fault::Advance(_)
            | Fault::KillServer(..)
            | Fault::EndServer(..)
            | Fault::Join(_) => None,
        }
    }

    /// Whether it concerns this server.
    pub fn has(self, server: Name) -> bool {
        match self {
            Whom::Everybody => true,
            Whom::Path(path) => server.path() == Some(path),
            Whom::Server(name) => server == name,
        }
    }
}
