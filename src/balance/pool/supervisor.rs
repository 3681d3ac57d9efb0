//! Keeping an endpoint connected.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connect_plan::ConnectPlan;
use super::endpoint::{Endpoint, SlotState};
use crate::backoff::Backoff;
use crate::balance::connection::{Capacity, Connect, Connection, Target};
use crate::instance::Instance;
use crate::panics;

/// The first pause and the jitter of gRPC's connection backoff ("GRPC Connection Backoff
/// Protocol").
const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_JITTER: Range<f64> = 0.8..1.2;

/// Starts the supervisors of a pool.
pub(crate) struct Spawner<C> {
    pub(crate) connector: Arc<C>,
    pub(crate) plan: ConnectPlan,
    /// Notified whenever the state of a connection changes.
    pub(crate) changed: Arc<Notify>,
    /// Notified whenever a connection has a free stream after it had none.
    pub(crate) capacity: Arc<Capacity>,
}

impl<C: Connect> Spawner<C> {
    /// The target of an instance, or why the channel cannot call it.
    pub(crate) fn target(&self, instance: &Instance) -> Result<Target, String> {
        Target::new(instance, self.connector.is_tls())
    }

    /// Starts to connect to an endpoint.
    pub(crate) fn spawn(&self, target: Target, instance: &Instance) -> Supervisor {
        let endpoint = Arc::new(Endpoint::new(target, instance, self.plan.connections));
        let mut tasks = JoinSet::new();
        for slot in 0..self.plan.connections {
            let task = ConnectionTask {
                endpoint: Arc::clone(&endpoint),
                slot,
                connector: Arc::clone(&self.connector),
                changed: Arc::clone(&self.changed),
                capacity: Arc::clone(&self.capacity),
            };
            tasks.spawn(task.run(self.plan.max_backoff));
        }
        Supervisor {
            endpoint,
            _tasks: tasks,
        }
    }
}

/// Keeps an endpoint connected until it is dropped. Calls in flight then finish, and each
/// connection closes after its last call.
#[derive(Debug)]
#[must_use = "dropping a supervisor closes its endpoint"]
pub(crate) struct Supervisor {
    pub(crate) endpoint: Arc<Endpoint>,
    /// Aborted on drop.
    _tasks: JoinSet<()>,
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.endpoint.close();
    }
}

/// The task that keeps one connection of an endpoint.
struct ConnectionTask<C> {
    endpoint: Arc<Endpoint>,
    slot: usize,
    connector: Arc<C>,
    changed: Arc<Notify>,
    capacity: Arc<Capacity>,
}

impl<C: Connect> ConnectionTask<C> {
    async fn run(self, max_backoff: Duration) {
        let mut backoff = Backoff::with_jitter(BACKOFF_BASE, max_backoff, BACKOFF_JITTER);
        loop {
            let started = Instant::now();
            let error = match self.connect().await {
                Ok(connection) => {
                    let connected = Instant::now();
                    let reason = self.hold(connection).await;
                    if connected.elapsed() >= BACKOFF_BASE {
                        // The connection was stable, so its loss starts a new series of attempts.
                        backoff.reset();
                        continue;
                    }
                    reason
                }
                Err(error) => error,
            };
            tracing::debug!(address = %self.endpoint.target.address, %error, "not connected");
            self.set(SlotState::Backoff {
                error: error.clone(),
            });
            // gRPC counts the pause from the start of the attempt, because an attempt that took
            // long to fail has already waited.
            tokio::time::sleep_until(started + backoff.next()).await;
            let last_error = Some(error);
            self.set(SlotState::Connecting { last_error });
        }
    }

    /// Makes one attempt to connect. A panic of the connector is a failed attempt.
    async fn connect(&self) -> Result<Connection, String> {
        panics::catch(self.connector.connect(&self.endpoint.target))
            .await
            .unwrap_or_else(|text| Err(format!("the connector panicked: {text}")))
    }

    /// Offers a connection to calls until it accepts no more. Returns the reason for its end.
    async fn hold(&self, connection: Connection) -> String {
        connection.sender.set_capacity(&self.capacity);
        self.set(SlotState::Ready(connection.sender));
        let reason = connection.ended.await;
        // The picker is told before a new attempt starts. Calls that have already picked this
        // connection get their request back and pick again.
        let last_error = Some(reason.clone());
        self.set(SlotState::Connecting { last_error });
        reason
    }

    fn set(&self, state: SlotState) {
        self.endpoint.set_slot(self.slot, state);
        self.changed.notify_one();
    }
}
