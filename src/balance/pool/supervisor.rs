//! Keeping an endpoint connected.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::endpoint::{Endpoint, Slot};
use crate::backoff::Backoff;
use crate::balance::connection::{Connector, Target};
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::time::MAX_DURATION;

/// gRPC's connection backoff ("GRPC Connection Backoff Protocol"): the first wait and the jitter.
const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_JITTER: Range<f64> = 0.8..1.2;

/// Keeps an endpoint connected until it is dropped. Calls in flight on it then finish, and its
/// connections close after them.
#[derive(Debug)]
pub(crate) struct Supervised {
    pub(crate) endpoint: Arc<Endpoint>,
    /// Aborted on drop.
    _tasks: JoinSet<()>,
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // A call that is still in flight keeps the endpoint, and must not keep its connections with it;
        // nor may a task that has not noticed yet put another one here.
        self.endpoint.lock().clear();
    }
}

impl Supervised {
    /// `changed` is notified whenever the endpoint becomes ready, or is not ready any more; `freed`
    /// whenever it has room for a call after it had none.
    pub(crate) fn start(
        target: Target,
        instance: &Instance,
        connector: &Arc<Connector>,
        plan: ConnectPlan,
        changed: &Arc<Notify>,
        freed: &Arc<Notify>,
    ) -> Self {
        let endpoint = Arc::new(Endpoint::new(target, instance, plan.connections));
        let mut tasks = JoinSet::new();
        for slot in 0..plan.connections {
            let task = Task {
                endpoint: Arc::clone(&endpoint),
                slot,
                connector: Arc::clone(connector),
                changed: Arc::clone(changed),
                freed: Arc::clone(freed),
            };
            tasks.spawn(task.run(plan.max_backoff));
        }
        Self {
            endpoint,
            _tasks: tasks,
        }
    }
}

/// How endpoints are to be connected.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectPlan {
    pub(crate) connections: usize,
    pub(crate) max_backoff: Duration,
}

/// What keeps one connection of an endpoint.
struct Task {
    endpoint: Arc<Endpoint>,
    slot: usize,
    connector: Arc<Connector>,
    changed: Arc<Notify>,
    freed: Arc<Notify>,
}

impl Task {
    async fn run(self, max_backoff: Duration) {
        let mut backoff = Backoff::with_jitter(BACKOFF_BASE, max_backoff, BACKOFF_JITTER);
        loop {
            let begun = Instant::now();
            self.set(|slot| slot.backing_off = false);
            let error = match self.connector.connect(&self.endpoint.target).await {
                Ok(connection) => {
                    let connected = Instant::now();
                    connection.sender.announce_room(&self.freed);
                    self.set(|slot| {
                        slot.sender = Some(connection.sender);
                        slot.last_error = None;
                    });
                    let error = connection.ended.await;
                    // Out of the picker before anything else; calls that have picked it already
                    // get their request back.
                    self.set(|slot| {
                        slot.sender = None;
                        slot.last_error = Some(error.clone());
                    });
                    if connected.elapsed() >= BACKOFF_BASE {
                        // It held: this is a new loss, not the old one.
                        backoff.reset();
                        continue;
                    }
                    error
                }
                Err(error) => error,
            };
            tracing::debug!(address = %self.endpoint.target.address, %error, "not connected");
            self.set(|slot| {
                slot.backing_off = true;
                slot.last_error = Some(error);
            });
            // Counted from the beginning of the attempt, as gRPC does: one that took long to fail has
            // waited already.
            tokio::time::sleep_until(begun + backoff.next()).await;
        }
    }

    fn set(&self, change: impl FnOnce(&mut Slot)) {
        if let Some(slot) = self.endpoint.lock().get_mut(self.slot) {
            change(slot);
        }
        self.changed.notify_one();
    }
}

/// The most connections to one endpoint. Each connection carries thousands of calls, so more are
/// a mistake.
const MAX_CONNECTIONS: usize = 1_000;

/// The default longest backoff. gRPC's is 120 s, which is long for a server that was only restarted.
/// Servers that are gone for good are removed from the set.
const DEFAULT_MAX_BACKOFF: Duration = Duration::from_secs(30);

impl Default for ConnectPlan {
    fn default() -> Self {
        Self {
            connections: 1,
            max_backoff: DEFAULT_MAX_BACKOFF,
        }
    }
}

impl ConnectPlan {
    /// Checks the plan, and limits the backoff to [`MAX_DURATION`].
    pub(crate) fn validated(self) -> Result<Self> {
        let count = self.connections.to_string();
        if self.connections == 0 {
            let reason = "must be at least 1";
            return Err(Error::invalid("connections_per_endpoint", count, reason));
        }
        if self.connections > MAX_CONNECTIONS {
            let reason = format!("must be at most {MAX_CONNECTIONS}");
            return Err(Error::invalid("connections_per_endpoint", count, reason));
        }
        if self.max_backoff.is_zero() {
            let reason = "must be more than zero";
            return Err(Error::invalid("max_connect_backoff", "0 s", reason));
        }
        Ok(Self {
            max_backoff: self.max_backoff.min(MAX_DURATION),
            ..self
        })
    }
}
