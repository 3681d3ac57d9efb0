//! The watch that all handles to one directory share.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::follower::Follower;
use crate::snapshot::Snapshot;

/// Follows one service, in one or several layouts. Dropping it ends its tasks.
pub(super) struct ServiceWatch {
    service: String,
    ttl: Duration,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// One per layout.
    followers: Vec<Arc<Follower>>,
    /// For each runtime that has a handle, one task per follower. The tasks of one runtime follow
    /// etcd, and the others wait to take over when that runtime shuts down.
    tasks: Mutex<HashMap<runtime::Id, Vec<AbortOnDropHandle<()>>>>,
}

impl ServiceWatch {
    pub(super) fn new(
        service: String,
        ttl: Duration,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        followers: Vec<Arc<Follower>>,
    ) -> Self {
        Self {
            service,
            ttl,
            snapshots,
            followers,
            tasks: Mutex::default(),
        }
    }

    pub(super) fn service(&self) -> &str {
        &self.service
    }

    /// The longest default TTL of the formats.
    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    pub(super) fn snapshots(&self) -> &watch::Receiver<Arc<Snapshot>> {
        &self.snapshots
    }

    /// Spawns the tasks on the current runtime, unless it has them already.
    pub(super) fn follow_from_here(&self) {
        let mut tasks = self.tasks.lock();
        // A runtime that has shut down may have had the same id.
        tasks.retain(|_, tasks| !has_ended(tasks));
        tasks
            .entry(runtime::Handle::current().id())
            .or_insert_with(|| {
                let followers = self.followers.iter().map(Arc::clone);
                let tasks = followers.map(|follower| tokio::spawn(follower.run()));
                tasks.map(AbortOnDropHandle::new).collect()
            });
    }

    /// Whether changes still arrive. `false` after the client was closed, or after all runtimes
    /// with tasks have shut down.
    pub(super) fn is_followed(&self) -> bool {
        self.tasks.lock().values().any(|tasks| !has_ended(tasks))
    }
}

fn has_ended(tasks: &[AbortOnDropHandle<()>]) -> bool {
    tasks.iter().any(AbortOnDropHandle::is_finished)
}
