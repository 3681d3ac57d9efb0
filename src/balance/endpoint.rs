//! One endpoint's life.
//!
//! ```text
//!   Connecting --> Ready --> (lost, or GOAWAY) --> Connecting ...
//!       ^  |
//!       |  +-- failed --> Backoff --+
//!       +---------------------------+
//! ```
//!
//! A task for each of its connections goes round this for as long as the endpoint is in the set.
//! Only what is Ready gets calls; nothing is connected on behalf of a call.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connect::{Connector, Target};
use super::connection::{Reserved, Sender};
use super::load::Load;
use super::pick::Candidate;
use crate::backoff::Backoff;
use crate::instance::Instance;

/// gRPC's connection backoff ("GRPC Connection Backoff Protocol"): the first wait and the jitter.
const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_JITTER: Range<f64> = 0.8..1.2;

/// What an endpoint is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// A connection is being made.
    Connecting,
    /// It is connected and gets calls.
    Ready,
    /// The last attempt to connect failed; the next one is waited for.
    Backoff,
    /// Its instance is draining or has weight 0: it gets no new calls.
    Draining,
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndpointState::Connecting => "connecting",
            EndpointState::Ready => "ready",
            EndpointState::Backoff => "backing off",
            EndpointState::Draining => "draining",
        })
    }
}

/// What is known about an endpoint of a channel.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// Where it listens.
    pub address: String,
    /// What it is doing.
    pub state: EndpointState,
    /// How many connections to it can take calls.
    pub connections: usize,
    /// Calls that were sent to it and whose answers have not ended.
    pub in_flight: usize,
    /// The moving peak of its latency, once it has answered.
    pub latency: Option<Duration>,
    /// Its share of the calls, relative to the others.
    pub weight: u32,
    /// Why its connection could not be made, or was lost; `None` while all is well.
    pub last_error: Option<String>,
    /// Its instance is not in the set any more: it has vanished with most of the others, and is kept while it
    /// is connected, for the time of
    /// [`mass_deletion_guard`](super::BalancedChannelBuilder::mass_deletion_guard).
    pub kept: bool,
}

/// An endpoint, shared by its tasks, the pool and the calls on it.
#[derive(Debug)]
pub(super) struct Endpoint {
    pub(super) target: Target,
    pub(super) load: Load,
    /// 0 while the instance is not to get new calls.
    weight: AtomicU32,
    kept: AtomicBool,
    connections: Mutex<Vec<Slot>>,
}

/// One of its connections.
#[derive(Debug, Default)]
struct Slot {
    sender: Option<Sender>,
    backing_off: bool,
    last_error: Option<String>,
}

impl Slot {
    fn is_open(&self) -> bool {
        self.sender.as_ref().is_some_and(Sender::is_open)
    }

    /// Also of a connection that is lost and whose task is yet to notice.
    fn error(&self) -> Option<String> {
        let ended = || self.sender.as_ref().and_then(Sender::ended);
        self.last_error.clone().or_else(ended)
    }
}

impl Endpoint {
    fn new(target: Target, instance: &Instance, connections: usize) -> Self {
        let endpoint = Self {
            target,
            load: Load::new(Instant::now()),
            weight: AtomicU32::new(0),
            kept: AtomicBool::new(false),
            connections: Mutex::new(
                std::iter::repeat_with(Slot::default)
                    .take(connections)
                    .collect(),
            ),
        };
        endpoint.update(instance);
        endpoint
    }

    /// Takes over what may change without a new connection.
    pub(super) fn update(&self, instance: &Instance) {
        let weight = if instance.is_eligible() {
            instance.weight
        } else {
            0
        };
        self.weight.store(weight, Ordering::Relaxed);
    }

    /// It is to get no new calls, for its instance has vanished.
    pub(super) fn retire(&self) {
        self.weight.store(0, Ordering::Relaxed);
    }

    pub(super) fn set_kept(&self, kept: bool) {
        self.kept.store(kept, Ordering::Relaxed);
    }

    pub(super) fn is_kept(&self) -> bool {
        self.kept.load(Ordering::Relaxed)
    }

    /// It as something to pick, if it can be picked now.
    pub(super) fn ready(self: &Arc<Self>) -> Option<Ready> {
        let weight = self.weight.load(Ordering::Relaxed);
        if weight == 0 {
            return None;
        }
        let senders = self.senders();
        (!senders.is_empty()).then(|| Ready {
            endpoint: Arc::clone(self),
            senders,
            weight,
        })
    }

    /// How many streams its connections have in use, if that is all that the server allows.
    pub(super) fn limit_reached(&self) -> Option<usize> {
        let slots = self.lock();
        let open = slots.iter().filter(|slot| slot.is_open());
        let limits = open
            .filter_map(|slot| slot.sender.as_ref())
            .map(Sender::limit_reached);
        // None without a connection.
        limits.reduce(|sum, limit| Some(sum?.saturating_add(limit?)))?
    }

    /// Whether it is connected, whatever its weight.
    pub(super) fn is_connected(&self) -> bool {
        self.lock().iter().any(Slot::is_open)
    }

    pub(super) fn status(&self) -> EndpointStatus {
        let weight = self.weight.load(Ordering::Relaxed);
        let slots = self.lock();
        let connections = slots.iter().filter(|slot| slot.is_open()).count();
        let state = if weight == 0 {
            EndpointState::Draining
        } else if connections > 0 {
            EndpointState::Ready
        } else if slots.iter().any(|slot| !slot.backing_off) {
            EndpointState::Connecting
        } else {
            EndpointState::Backoff
        };
        EndpointStatus {
            address: self.target.address.to_string(),
            state,
            connections,
            in_flight: self.load.in_flight() as usize,
            latency: self.load.latency(Instant::now()),
            weight,
            last_error: slots.iter().find_map(Slot::error),
            kept: self.is_kept(),
        }
    }

    fn senders(&self) -> Box<[Sender]> {
        self.lock()
            .iter()
            .filter(|slot| slot.is_open())
            .filter_map(|slot| slot.sender.clone())
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An endpoint in a picker.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) endpoint: Arc<Endpoint>,
    senders: Box<[Sender]>,
    weight: u32,
}

impl Ready {
    /// A stream for one call, if it can be sent now.
    pub(super) fn reserve(&self) -> Option<Reserved> {
        if let [only] = &*self.senders {
            return only.reserve();
        }
        let start = fastrand::usize(..self.senders.len());
        let (before, after) = self.senders.split_at(start);
        after.iter().chain(before).find_map(Sender::reserve)
    }

    /// Whether it is connected, and has no room for a call.
    pub(super) fn is_full(&self) -> bool {
        !self.is_usable() && self.senders.iter().any(Sender::is_open)
    }
}

impl Candidate for Ready {
    fn load(&self) -> &Load {
        &self.endpoint.load
    }

    fn weight(&self) -> u32 {
        self.weight
    }

    fn is_usable(&self) -> bool {
        self.senders.iter().any(Sender::is_usable)
    }
}

/// Keeps an endpoint connected until it is dropped. Calls in flight on it then finish, and its
/// connections close after them.
#[derive(Debug)]
pub(super) struct Supervised {
    pub(super) endpoint: Arc<Endpoint>,
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
    pub(super) fn start(
        target: Target,
        instance: &Instance,
        connector: &Arc<Connector>,
        plan: Plan,
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
pub(super) struct Plan {
    pub(super) connections: usize,
    pub(super) max_backoff: Duration,
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
