//! What happened, as far as the checks need it. Times count from the beginning of the run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::Instance;
use goo_etcd::format::{EtcdNaming, Format};
use tokio::time::Instant;

use crate::schedule::{Name, Path};

/// The service that all servers are.
pub const SERVICE: &str = "chaos";

/// The default prefix of [`EtcdNaming`].
const PREFIX: &str = "services";

/// Where the service's keys are.
pub fn range() -> String {
    format!("{PREFIX}/{SERVICE}/")
}

/// The key of a server.
pub fn key_of(name: Name) -> String {
    format!("{PREFIX}/{SERVICE}/{name}")
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

/// A moment at which a lease may have been extended although its server was dead: a new leader
/// starts all leases anew, and a renewal may have waited in a member that was paused, or on a path.
#[derive(Debug, Clone, Copy)]
pub struct Extension {
    pub at: Duration,
    /// Only for servers on this path; for all if `None`.
    pub path: Option<Path>,
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
