//! Where the calls of the current task go.
//!
//! etcd-client builds its requests inside its own methods and takes no options for them. The only
//! way to tell the service beneath it how to route a call is therefore a task-local variable, which
//! is set while etcd-client's method runs.

use std::future::Future;
use std::sync::Arc;

use crate::balance::{AttemptRecord, AttemptedEndpoints, BalancedChannel};

tokio::task_local! {
    /// The options of the calls that the current task makes.
    static CALL_OPTIONS: CallOptions;
}

/// Routing of the calls made within a scope. By default a call goes to any member.
#[derive(Debug, Clone, Default)]
pub(in crate::client) struct CallOptions {
    /// Use this channel only.
    pub(in crate::client) pinned: Option<BalancedChannel>,
    /// Members to avoid if others are available. The calls add the members that they are sent to.
    pub(in crate::client) attempted: Option<AttemptedEndpoints>,
    /// The attempts of the operation that the calls belong to.
    pub(in crate::client) record: Option<AttemptRecord>,
    /// The gRPC message to send to a path, because etcd-client leaves out a field of it.
    pub(in crate::client) message: Option<(&'static str, &'static [u8])>,
}

impl CallOptions {
    /// The options of the innermost scope around the caller.
    pub(in crate::client) fn current() -> Self {
        CALL_OPTIONS
            .try_with(CallOptions::clone)
            .unwrap_or_default()
    }

    /// The member that the latest call was sent to.
    pub(in crate::client) fn last_attempted(&self) -> Option<Arc<str>> {
        self.attempted.as_ref()?.last()
    }

    /// Applies the options to the calls that `work` makes. Without a record of its own, `work` uses
    /// that of the scope around it.
    pub(in crate::client) async fn scope<T>(mut self, work: impl Future<Output = T>) -> T {
        if self.record.is_none() {
            self.record = Self::current().record;
        }
        CALL_OPTIONS.scope(self, work).await
    }
}
