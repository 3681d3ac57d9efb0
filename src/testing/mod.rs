//! Real etcd servers for tests (feature `testing`): started, killed, paused, wiped, cut off.
//!
//! A test against a mock of etcd tests the mock. These are small handles on the real program, each on
//! free loopback ports with its data in a temporary folder, so tests run side by side; and the faults
//! are real ones: SIGKILL, SIGSTOP, an empty disk, a compacted history, a network that is cut.
//!
//! ```no_run
//! use goo_etcd::testing::Etcd;
//!
//! #[tokio::test]
//! async fn my_service_survives_a_restart_of_etcd() -> Result<(), Box<dyn std::error::Error>> {
//!     let etcd = Etcd::start().await?;
//!     let mut client = etcd.client().await?; // or your own client, of `etcd.endpoint()`
//!     client.put("key", "value", None).await?;
//!
//!     etcd.kill().await?;
//!     // ... look at what your service does without etcd ...
//!     etcd.start_again().await?; // the same port, the same data
//!
//!     assert_eq!(client.get("key", None).await?.count(), 1);
//!     Ok(()) // dropping the handle stops the server and removes its folder
//! }
//! # fn main() {}
//! ```
//!
//! - [`Etcd`] is one server, [`EtcdCluster`] several; [`Etcd::builder`] takes etcd's flags.
//! - A member of an [`EtcdCluster::start_partitionable`] can be cut off from the others, while clients reach it.
//! - [`Proxy`] is the network between a client and a server: cut, silent, slow.
//!
//! # Which etcd
//!
//! The program that the environment variable `ETCD` names, else `target/tools/bin/etcd` in the
//! current folder or one above it, else `etcd` on PATH. Any release from 3.4 on will do.
//!
//! # Limits
//!
//! Unix only, since the faults are signals. It needs tokio's time to run: not for tests in paused
//! time. Everything binds to 127.0.0.1. etcd runs with `--unsafe-no-fsync`: its data outlives the
//! process, not the machine.

mod builder;
mod cluster;
mod etcd;
mod peers;
mod port;
mod process;
mod proxy;
mod ready;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use builder::EtcdBuilder;
pub use cluster::EtcdCluster;
pub use etcd::Etcd;
pub use proxy::Proxy;

type Result<T> = std::result::Result<T, TestingError>;

/// What can go wrong around a server under test. Meant for a test's output: the messages are long.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestingError {
    /// There is no etcd, or it is no program of this machine.
    #[error(
        "cannot run etcd ({}): {source}; set ETCD to its path, or put it on PATH \
         (in goo-etcd's own tree: scripts/tools)", .program.display()
    )]
    CannotRun {
        /// What was tried.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// It is down: it ended by itself, or was killed or stopped before.
    #[error("etcd at {endpoint} is not running ({status}); from its log:\n{log}")]
    NotRunning {
        /// Its endpoint.
        endpoint: String,
        /// How it ended.
        status: String,
        /// The first and last lines of its log.
        log: String,
    },

    /// It runs, and does not answer.
    #[error("etcd at {endpoint} did not answer within {after:?}: {reason}; from its log:\n{log}")]
    NotReady {
        /// Its endpoint.
        endpoint: String,
        /// How long it was given.
        after: Duration,
        /// What the last try said.
        reason: String,
        /// The first and last lines of its log.
        log: String,
    },

    /// No running member of the cluster knows of a leader.
    #[error("no running member of the etcd cluster knows of a leader")]
    NoLeader,

    /// etcd answered a request with an error.
    #[error("{operation} failed: {source}")]
    Client {
        /// What was tried.
        operation: &'static str,
        /// What etcd, or the way to it, said.
        source: Box<etcd_client::Error>,
    },

    /// The operating system refused something.
    #[error("{operation} failed: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl TestingError {
    fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }

    fn client(operation: &'static str) -> impl FnOnce(etcd_client::Error) -> Self {
        move |source| Self::Client {
            operation,
            source: Box::new(source),
        }
    }
}
