//! The errors of this module.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub(super) type Result<T> = std::result::Result<T, TestingError>;

/// An error of a server under test. Messages are long, because they are meant for a test's output.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestingError {
    /// No etcd was found, or the program cannot be executed on this machine.
    #[error(
        "cannot run etcd ({}): {source}; set ETCD to its path, or put it on PATH \
         (in goo-etcd's own tree: scripts/tools)", .program.display()
    )]
    #[non_exhaustive]
    CannotRun {
        /// The program that was tried.
        program: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },

    /// The server is down: it exited, or was killed or stopped before.
    #[error("etcd at {endpoint} is not running ({status}); from its log:\n{log}")]
    #[non_exhaustive]
    NotRunning {
        /// The server's endpoint.
        endpoint: String,
        /// The exit status, if the server exited.
        status: String,
        /// The first and last lines of its log.
        log: String,
    },

    /// The server runs but does not respond.
    #[error("etcd at {endpoint} did not respond within {after:?}: {reason}; from its log:\n{log}")]
    #[non_exhaustive]
    NotReady {
        /// The server's endpoint.
        endpoint: String,
        /// The time limit.
        after: Duration,
        /// The error of the last attempt.
        reason: String,
        /// The first and last lines of its log.
        log: String,
    },

    /// No running member of the cluster knows a leader.
    #[error("no running member of the etcd cluster knows a leader")]
    NoLeader,

    /// etcd responded with an error, or could not be reached.
    #[error("{operation} failed: {source}")]
    #[non_exhaustive]
    Client {
        /// The operation that failed.
        operation: &'static str,
        /// The error of etcd or of the connection.
        source: Box<etcd_client::Error>,
    },

    /// The operating system refused an operation.
    #[error("{operation} failed: {source}")]
    #[non_exhaustive]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// The operating system's error.
        source: io::Error,
    },
}

impl TestingError {
    pub(super) fn io(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, source }
    }

    pub(super) fn client(operation: &'static str) -> impl FnOnce(etcd_client::Error) -> Self {
        move |source| Self::Client {
            operation,
            source: Box::new(source),
        }
    }
}
