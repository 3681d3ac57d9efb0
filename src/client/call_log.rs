//! The debug log of calls: one event for each, when it is over.

use std::sync::Arc;

use http::Uri;
use tokio::time::Instant;
use tonic::Code;

/// One call to etcd, from [`Config::enable_grpc_debug_log`](crate::Config::enable_grpc_debug_log).
/// Keys and values are not seen here, so they cannot be written.
#[derive(Debug)]
pub(super) struct CallLog {
    method: String,
    begun: Instant,
    over: bool,
}

impl CallLog {
    pub(super) fn begin(uri: &Uri) -> Self {
        Self {
            method: uri.path().trim_start_matches('/').to_owned(),
            begun: Instant::now(),
            over: false,
        }
    }

    /// The call, with the member that was asked last.
    pub(super) fn end(mut self, status: Code, member: Option<Arc<str>>) {
        self.write(&format!("{status:?}"), member.as_deref().unwrap_or("none"));
    }

    fn write(&mut self, status: &str, member: &str) {
        self.over = true;
        let time = self.begun.elapsed();
        tracing::debug!(method = self.method, member, status, ?time, "etcd call");
    }
}

/// A call that the caller gave up, or a stream it closed.
impl Drop for CallLog {
    fn drop(&mut self) {
        if !self.over {
            self.write("dropped", "unknown");
        }
    }
}
