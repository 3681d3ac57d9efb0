//! Drives a reconciler: performs its actions, and reports their outcomes and the watches' events.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::executor::Executor;
use super::key_watch::KeyWatches;
use super::state::{Action, ActionOutcome, EntryId, Event, Reconciler, Step, Timestamp};
use crate::client::{AttemptRecord, Client};
use crate::error::{Error, Result};
use crate::time::sleep_until;

/// The registrations that share one lease, as the handles and the driver see them.
#[derive(Debug)]
pub(super) struct LeaseGroup {
    /// Locked for one request, event or step at a time, never over an await.
    reconciler: Mutex<Reconciler>,
    /// Wakes the driver after a request.
    wake: Notify,
    /// Notified when the driver has stepped.
    stepped: Notify,
    /// The attempts of the action that was started last.
    attempts: Mutex<AttemptRecord>,
    /// Set when no handle is left or the registrar was closed. The driver then cleans up once, and
    /// ends.
    abandoned: AtomicBool,
}

impl LeaseGroup {
    pub(super) fn new() -> Self {
        Self {
            reconciler: Mutex::new(Reconciler::new()),
            wake: Notify::new(),
            stepped: Notify::new(),
            attempts: Mutex::default(),
            abandoned: AtomicBool::new(false),
        }
    }

    /// Changes the desired state, and wakes the driver.
    pub(super) fn with_reconciler<T>(&self, request: impl FnOnce(&mut Reconciler) -> T) -> T {
        let result = request(&mut self.reconciler.lock());
        self.wake.notify_one();
        result
    }

    /// Ends the driver, which first tries once to delete the keys that are left.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Reconciler> {
        self.reconciler.lock()
    }

    /// Waits until no registration and no lease is left.
    ///
    /// # Errors
    ///
    /// The error that closed the client, because the driver does no more work then.
    pub(super) async fn wait_until_empty(&self) -> Result<()> {
        loop {
            // Created before the check, so that a step right after the check is not missed.
            let stepped = self.stepped.notified();
            {
                let reconciler = self.lock();
                if reconciler.is_empty() {
                    return Ok(());
                }
                if let Some(error) = reconciler.close_error() {
                    return Err(error.clone());
                }
            }
            stepped.await;
        }
    }

    /// The attempts of the action that was started last.
    pub(super) fn attempts(&self) -> AttemptRecord {
        self.attempts.lock().clone()
    }

    /// Starts the record of another action.
    fn record_action(&self) -> AttemptRecord {
        let record = AttemptRecord::default();
        *self.attempts.lock() = record.clone();
        record
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    fn step(&self) -> Step {
        self.lock().step(Timestamp::now())
    }

    fn must_delete_singly(&self) -> bool {
        self.lock().must_delete_singly(Instant::now())
    }

    fn on_event(&self, event: Event) {
        self.lock().on_event(event, Timestamp::now());
    }
}

type RunningAction<'a> = BoxFuture<'a, (Action, Result<ActionOutcome>)>;

/// Drives a group's reconciler until no handle is left or the client is closed.
pub(super) async fn run(group: Arc<LeaseGroup>, client: Client, ttl: Duration) {
    let mut ending = RuntimeEnd(Some(Arc::clone(&group)));
    drive(&group, client, ttl).await;
    ending.0 = None;
}

/// Tells a group, whose driver is dropped before it has ended, that its runtime has ended.
struct RuntimeEnd(Option<Arc<LeaseGroup>>);

impl Drop for RuntimeEnd {
    fn drop(&mut self) {
        if let Some(group) = &self.0 {
            group.on_event(Event::ClientClosed(Error::RuntimeEnded {
                operation: "keeping instances registered".to_owned(),
                what: "the registrar",
            }));
            group.stepped.notify_waiters();
        }
    }
}

/// How the cleanup of an abandoned group failed. No caller waits for it, so it is not retried: the
/// keys disappear when the TTL of the lease has passed.
enum FailedCleanup {
    /// etcd refused to delete the keys of this entry. The others can be deleted.
    Refused(EntryId),
    /// etcd refused to revoke the lease. Its keys can be deleted one by one.
    NotRevoked,
    Failed,
}

fn failed_cleanup(action: &Action, result: &Result<ActionOutcome>) -> Option<FailedCleanup> {
    match (action, result) {
        (Action::Delete { entry, .. }, Err(error)) if error.is_permanent() => {
            Some(FailedCleanup::Refused(entry.clone()))
        }
        (Action::Revoke { .. }, Ok(ActionOutcome::LeaseRefused(_))) => {
            Some(FailedCleanup::NotRevoked)
        }
        (Action::Delete { .. } | Action::Revoke { .. }, Err(_)) => Some(FailedCleanup::Failed),
        _ => None,
    }
}

async fn drive(group: &LeaseGroup, client: Client, ttl: Duration) {
    let mut key_watches = KeyWatches::new(client.clone());
    let executor = Executor::new(client, ttl);
    let mut running: FuturesUnordered<RunningAction<'_>> = FuturesUnordered::new();
    loop {
        let wake_at = loop {
            match group.step() {
                Step::Perform(action) => {
                    let attempts = group.record_action();
                    running.push(Box::pin(executor.perform(action, attempts)));
                }
                Step::SleepUntil(at) => break at,
            }
        };
        group.stepped.notify_waiters();
        let is_abandoned = group.is_abandoned();
        if is_abandoned && group.lock().is_empty() {
            return;
        }
        let keys: BTreeSet<String> = group.lock().watched_keys().cloned().collect();
        key_watches.set_keys(&keys);
        tokio::select! {
            Some((action, result)) = running.next() => {
                if let Err(error @ (Error::Closed { .. } | Error::RuntimeEnded { .. })) = result {
                    group.on_event(Event::ClientClosed(error));
                    group.stepped.notify_waiters();
                    return;
                }
                let failure = is_abandoned.then(|| failed_cleanup(&action, &result)).flatten();
                let outcome = result.unwrap_or_else(|error| {
                    tracing::debug!(%action, %error, "a request of the registrar failed");
                    ActionOutcome::Failed(error)
                });
                group.on_event(Event::Finished { action, outcome });
                match failure {
                    None => {}
                    Some(FailedCleanup::Refused(entry)) => group.lock().forget(&entry),
                    Some(FailedCleanup::NotRevoked) if group.must_delete_singly() => {}
                    Some(FailedCleanup::NotRevoked | FailedCleanup::Failed) => return,
                }
            }
            (key, event) = key_watches.next() => group.on_event(Event::Key { key, event }),
            () = group.wake.notified() => {}
            () = sleep_until(wake_at) => {}
        }
    }
}
