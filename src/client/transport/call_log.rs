//! The debug log of calls: one event per call, when the call ends.

use http::Uri;
use tokio::time::Instant;
use tonic::Code;

use crate::balance::{AttemptedEndpoints, ServedBy};

/// One call to etcd, logged if
/// [`Config::enable_grpc_debug_log`](crate::Config::enable_grpc_debug_log) is set. The log contains
/// no keys and no values, because it sees only the path, the member, the status and the time.
#[derive(Debug)]
pub(super) struct CallLog {
    method: String,
    started: Instant,
    /// Where the call was sent.
    attempted: AttemptedEndpoints,
    /// The member that sent the head of a stream's response.
    stream_server: Option<ServedBy>,
    is_logged: bool,
}

impl CallLog {
    pub(super) fn new(uri: &Uri, attempted: AttemptedEndpoints) -> Self {
        Self {
            method: uri.path().trim_start_matches('/').to_owned(),
            started: Instant::now(),
            attempted,
            stream_server: None,
            is_logged: false,
        }
    }

    /// Notes which member opened a stream. The stream stays with this member wherever else the
    /// caller's next attempts go.
    pub(super) fn set_stream_server(&mut self, server: Option<ServedBy>) {
        self.stream_server = server;
        self.attempted = AttemptedEndpoints::default();
    }

    /// Logs the end of the call. `server` is the member that responded; without one the call failed
    /// at the member that was tried last.
    pub(super) fn end(mut self, status: Code, server: Option<&ServedBy>) {
        let last = self.last_member();
        let member = server.map(ServedBy::address).or(last.as_deref());
        self.write(&format!("{status:?}"), member);
    }

    /// Logs a call that was refused before it was sent to a member.
    pub(super) fn refuse(mut self, status: Code) {
        self.write(&format!("{status:?}"), None);
    }

    fn last_member(&self) -> Option<String> {
        let attempted = self.attempted.last().map(|address| address.to_string());
        let stream = || self.stream_server.as_ref().map(|s| s.address().to_owned());
        attempted.or_else(stream)
    }

    fn write(&mut self, status: &str, member: Option<&str>) {
        self.is_logged = true;
        let (time, member) = (self.started.elapsed(), member.unwrap_or("none"));
        tracing::debug!(method = self.method, member, status, ?time, "etcd call");
    }
}

/// Logs a call whose caller dropped it or whose timeout ended it, with the member that was tried
/// last, and a stream that the caller closed.
impl Drop for CallLog {
    fn drop(&mut self) {
        if !self.is_logged {
            let member = self.last_member();
            self.write("dropped", member.as_deref());
        }
    }
}
