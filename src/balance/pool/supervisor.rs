//! Keeping an endpoint connected.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connect_plan::ConnectPlan;
use super::demand::{Demand, Turn};
use super::endpoint::{Endpoint, SlotState};
use super::reconnect::{Next, Reconnect};
use crate::balance::connection::{Capacity, Carried, Connect, Connection, Ended, Target};
use crate::instance::Instance;
use crate::panics;

/// Starts the supervisors of a pool.
pub(crate) struct Spawner<C> {
    pub(crate) connector: Arc<C>,
    pub(crate) plan: ConnectPlan,
    /// Notified whenever the state of a connection changes.
    pub(crate) changed: Arc<Notify>,
    /// Notified whenever a connection has a free stream after it had none.
    pub(crate) capacity: Arc<Capacity>,
    pub(crate) demand: Arc<Demand>,
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
                demand: Arc::clone(&self.demand),
                unanswered: Vec::new(),
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
    demand: Arc<Demand>,
    /// Ended connections that carried no response so far. A server that announced the end of a
    /// connection may still respond on it.
    unanswered: Vec<Unanswered>,
}

/// An ended connection that carried no response so far.
struct Unanswered {
    carried: Carried,
    /// Whether the connection was counted when it ended.
    is_counted: bool,
}

impl<C: Connect> ConnectionTask<C> {
    async fn run(mut self, max_backoff: Duration) {
        let mut reconnect = Reconnect::new(max_backoff);
        let mut turn = None;
        loop {
            let started = Instant::now();
            let attempt = self.connect_and_hold(&mut reconnect);
            let (error, next) = Turn::run(turn.take(), attempt).await;
            let address = &*self.endpoint.target.address;
            // The picker is told before a new attempt starts. Calls that have already picked a lost
            // connection get their request back and pick again.
            match next {
                Next::Now => {
                    tracing::debug!(address, error, "connecting again at once");
                    self.set(SlotState::Replacing { reason: error });
                }
                // gRPC counts the pause from the start of the attempt, because an attempt that took
                // long to fail has already waited.
                Next::After { pause, on_demand } => {
                    tracing::debug!(address, error, ?pause, "backing off");
                    let on_demand = on_demand.map(|after| started + after);
                    turn = self
                        .back_off(error, started + pause, on_demand, &mut reconnect)
                        .await;
                }
            }
        }
    }

    /// Makes one attempt to connect, and offers the connection to calls until it accepts no more.
    /// Returns why there is none, and when to connect again.
    async fn connect_and_hold(&mut self, reconnect: &mut Reconnect) -> (String, Next) {
        let connection = match self.connect().await {
            Ok(connection) => connection,
            Err(error) => return (error, reconnect.on_failed()),
        };
        let connected = Instant::now();
        let ended = self.hold(connection).await;
        let next = self.after_end(ended.carried, connected.elapsed(), reconnect);
        (ended.reason, next)
    }

    /// Makes one attempt to connect. A panic of the connector is a failed attempt.
    async fn connect(&self) -> Result<Connection, String> {
        panics::catch(self.connector.connect(&self.endpoint.target))
            .await
            .unwrap_or_else(|text| Err(format!("the connector panicked: {text}")))
    }

    /// Offers a connection to calls until it accepts no more.
    async fn hold(&self, connection: Connection) -> Ended {
        connection.sender.set_capacity(&self.capacity);
        self.set(SlotState::Ready(connection.sender));
        connection.ended.await
    }

    /// Decides when to connect again after a connection has ended.
    fn after_end(
        &mut self,
        carried: Carried,
        lifetime: Duration,
        reconnect: &mut Reconnect,
    ) -> Next {
        let before = self.unanswered.iter().map(|ended| &ended.carried);
        if before.chain([&carried]).any(Carried::has_served) {
            self.unanswered.clear();
            return reconnect.on_answered();
        }
        // A connection without a call can carry nothing any more.
        self.unanswered.retain(|ended| {
            let may_change = ended.carried.may_change();
            if !may_change && !ended.is_counted {
                reconnect.count_unanswered();
            }
            may_change
        });
        let (had_request, has_accepted) = (carried.had_request(), carried.has_accepted());
        self.unanswered.push(Unanswered {
            carried,
            is_counted: !has_accepted,
        });
        match has_accepted {
            true => reconnect.on_accepted(lifetime),
            false => reconnect.on_unanswered(lifetime, had_request),
        }
    }

    /// Waits until a time, or shorter: for a call that waits at `on_demand` or later, or until an
    /// ended connection carries a response. Returns the turn to connect for a call.
    async fn back_off(
        &mut self,
        error: String,
        until: Instant,
        on_demand: Option<Instant>,
        reconnect: &mut Reconnect,
    ) -> Option<Turn> {
        self.set(SlotState::Backoff {
            error: error.clone(),
            on_demand: on_demand.is_some(),
        });
        let turn = tokio::select! {
            biased;
            () = wait_until_served(&self.unanswered) => {
                self.unanswered.clear();
                reconnect.on_answered();
                None
            }
            turn = self.wait_for_turn(on_demand) => {
                reconnect.on_demand();
                Some(turn)
            }
            () = tokio::time::sleep_until(until) => None,
        };
        let last_error = Some(error);
        self.set(SlotState::Connecting { last_error });
        turn
    }

    /// Waits until the connection should be made for a waiting call, at a time or later. Never
    /// resolves without a time.
    async fn wait_for_turn(&self, from: Option<Instant>) -> Turn {
        let Some(from) = from else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(from).await;
        let turn = self.demand.wait_for_turn(&self.endpoint, self.slot);
        turn.await
    }

    fn set(&self, state: SlotState) {
        self.endpoint.set_slot(self.slot, state);
        self.changed.notify_one();
    }
}

/// Resolves when one of the connections carries a response. Never resolves without connections.
async fn wait_until_served(connections: &[Unanswered]) {
    let responses = connections
        .iter()
        .map(|ended| ended.carried.wait_until_served());
    let mut responses: FuturesUnordered<_> = responses.collect();
    if responses.next().await.is_none() {
        std::future::pending().await
    }
}
