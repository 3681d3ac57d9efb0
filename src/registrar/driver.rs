//! Runs the reconciler: does what it asks for, and tells it what comes of it.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::executor::Executor;
use super::key_watch::KeyWatches;
use super::state::{Action, Next, Now, Outcome, Reconciler};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::time::sleep_until;

/// What the handles and the task share.
#[derive(Debug)]
pub(super) struct Shared {
    reconciler: Mutex<Reconciler>,
    changed: Notify,
    /// No handle is left: what can be cleaned up at once is, and then the task ends.
    abandoned: AtomicBool,
}

impl Shared {
    pub(super) fn new() -> Self {
        Self {
            reconciler: Mutex::new(Reconciler::new()),
            changed: Notify::new(),
            abandoned: AtomicBool::new(false),
        }
    }

    /// Changes what is wanted, and wakes the task.
    pub(super) fn want<T>(&self, change: impl FnOnce(&mut Reconciler) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_one();
        result
    }

    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// The lock is held for as long as a step takes, never over an await. A panic inside of one
    /// leaves nothing half done that the next step would not see.
    pub(super) fn lock(&self) -> MutexGuard<'_, Reconciler> {
        self.reconciler
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn now() -> Now {
    Now {
        instant: Instant::now(),
        wall: SystemTime::now(),
    }
}

/// Reconciles until no handle is left or the client is closed.
pub(super) async fn reconcile(shared: Arc<Shared>, client: Client, ttl: Duration) {
    let mut key_watches = KeyWatches::new(client.clone());
    let executor = Executor::new(client, ttl);
    let mut under_way: FuturesUnordered<BoxFuture<'_, (Action, Result<Outcome>)>> =
        FuturesUnordered::new();
    loop {
        let wake_at = loop {
            let next = shared.lock().next(now());
            match next {
                Next::Do(action) => under_way.push(Box::pin(executor.perform(action))),
                Next::WaitUntil(at) => break at,
            }
        };
        let abandoned = shared.abandoned.load(Ordering::Acquire);
        if abandoned && shared.lock().is_empty() {
            return;
        }
        let keys: BTreeSet<String> = shared.lock().to_watch().cloned().collect();
        key_watches.set_keys(&keys);
        tokio::select! {
            Some((action, result)) = under_way.next() => {
                if let Err(error @ Error::Closed { .. }) = &result {
                    shared.lock().closed(error, now());
                    return;
                }
                let failed = result.is_err();
                let outcome = result.unwrap_or_else(|error| {
                    tracing::debug!(%action, %error, "registrar: an attempt failed");
                    Outcome::Failed(error)
                });
                shared.lock().finished(&action, outcome, now());
                // Abandoned, etcd gets one attempt to clean up; the lease's time to live does the rest.
                let cleans_up = matches!(action, Action::Revoke { .. } | Action::Delete { .. });
                if failed && abandoned && cleans_up {
                    return;
                }
            }
            (key, heard) = key_watches.next() => shared.lock().heard(&key, &heard, now()),
            () = shared.changed.notified() => {}
            () = sleep_until(wake_at) => {}
        }
    }
}
