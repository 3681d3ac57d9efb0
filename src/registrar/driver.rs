//! Does for the reconciler what it asks for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::state::{Action, Next, Now, Outcome, Reconciler};
use crate::client::{Compare, CompareOp, PutOptions, TxnOp};
use crate::{Client, Error, Result};

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
    fn lock(&self) -> MutexGuard<'_, Reconciler> {
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
    let mut under_way: FuturesUnordered<BoxFuture<'_, (Action, Result<Outcome>)>> =
        FuturesUnordered::new();
    loop {
        let wake_at = loop {
            let next = shared.lock().next(now());
            match next {
                Next::Do(action) => under_way.push(Box::pin(perform(&client, action, ttl))),
                Next::WaitUntil(at) => break at,
            }
        };
        let abandoned = shared.abandoned.load(Ordering::Acquire);
        if abandoned && shared.lock().is_empty() {
            return;
        }
        tokio::select! {
            Some((action, result)) = under_way.next() => {
                if let Err(error @ Error::Closed { .. }) = &result {
                    shared.lock().closed(error, now());
                    return;
                }
                let failed = result.is_err();
                let outcome = result.unwrap_or_else(|error| {
                    tracing::debug!(action = name_of(&action), %error, "registrar: an attempt failed");
                    Outcome::Failed(error)
                });
                shared.lock().finished(&action, outcome, now());
                // Abandoned, etcd gets one attempt to clean up; the lease's time to live does the rest.
                let cleans_up = matches!(action, Action::Revoke { .. } | Action::Delete { .. });
                if failed && abandoned && cleans_up {
                    return;
                }
            }
            () = shared.changed.notified() => {}
            () = sleep_until(wake_at) => {}
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// One exchange with etcd, bounded by a third of the lease's time to live: there must be time for
/// another attempt before the lease is gone.
async fn perform(client: &Client, action: Action, ttl: Duration) -> (Action, Result<Outcome>) {
    let limit = ttl / 3;
    let result = match tokio::time::timeout(limit, exchange(client, &action, ttl)).await {
        // A transaction does not say which keys it was about.
        Ok(Err(Error::Rpc { status, .. }))
            if status.code() != tonic::Code::NotFound
                && matches!(action, Action::Put { .. } | Action::Delete { .. }) =>
        {
            let operation = name_of(&action);
            Err(Error::Rpc { operation, status })
        }
        Ok(Err(Error::LeaseNotFound { .. })) => Ok(Outcome::LeaseGone),
        Ok(Err(error)) if error.code() == Some(tonic::Code::NotFound) => Ok(Outcome::LeaseGone),
        Ok(result) => result,
        Err(_) => Err(Error::Timeout {
            operation: name_of(&action),
            after: limit,
        }),
    };
    (action, result)
}

fn name_of(action: &Action) -> String {
    match action {
        Action::Grant => "grant of a lease".to_owned(),
        Action::Renew { lease } => format!("keep-alive of lease {lease:x}"),
        Action::Put { pairs, .. } => {
            format!("put {}", list(pairs.iter().map(|(key, _)| key)))
        }
        Action::Delete { keys, .. } => format!("delete {}", list(keys)),
        Action::Revoke { lease } => format!("revoke of lease {lease:x}"),
    }
}

fn list<'a>(keys: impl IntoIterator<Item = &'a String>) -> String {
    let keys: Vec<String> = keys.into_iter().map(|key| format!("{key:?}")).collect();
    keys.join(" and ")
}

async fn exchange(client: &Client, action: &Action, ttl: Duration) -> Result<Outcome> {
    Ok(match action {
        Action::Grant => {
            let granted = client
                .grant(ttl.as_secs().try_into().unwrap_or(i64::MAX))
                .await?;
            Outcome::Granted {
                lease: granted.id(),
                ttl: seconds(granted.ttl()),
            }
        }
        Action::Renew { lease } => {
            client.renew(*lease).await?;
            Outcome::Renewed
        }
        Action::Put {
            pairs, gone, lease, ..
        } => {
            let options = || Some(PutOptions::new().with_lease(*lease));
            if let ([(key, value)], []) = (pairs.as_slice(), gone.as_slice()) {
                client.put(key.as_str(), value.clone(), options()).await?;
            } else {
                let puts = pairs
                    .iter()
                    .map(|(key, value)| TxnOp::put(key.as_str(), value.clone(), options()));
                let deletes = gone.iter().map(|key| delete_if_under(key, *lease));
                client.txn().and_then(puts.chain(deletes)).commit().await?;
            }
            Outcome::Done
        }
        Action::Delete { keys, lease, .. } => {
            let deletes = keys.iter().map(|key| delete_if_under(key, *lease));
            client.txn().and_then(deletes).commit().await?;
            Outcome::Done
        }
        Action::Revoke { lease } => {
            client.revoke(*lease).await?;
            Outcome::Done
        }
    })
}

/// A transaction within a transaction, since each key is looked at on its own.
fn delete_if_under(key: &str, lease: i64) -> TxnOp {
    TxnOp::txn(
        etcd_client::Txn::new()
            .when([Compare::lease(key, CompareOp::Equal, lease)])
            .and_then([TxnOp::delete(key, None)]),
    )
}

fn seconds(ttl: i64) -> Duration {
    Duration::from_secs(ttl.max(1).unsigned_abs())
}
