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
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::balance::connection::{Reserved, Sender, Target};
use crate::balance::pick::{Candidate, Load};
use crate::instance::Instance;

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
    /// [`mass_deletion_guard`](crate::balance::BalancedChannelBuilder::mass_deletion_guard).
    pub retained: bool,
}

/// An endpoint, shared by its tasks, the pool and the calls on it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) target: Target,
    pub(crate) load: Load,
    /// 0 while the instance is not to get new calls.
    weight: AtomicU32,
    retained: AtomicBool,
    connections: Mutex<Vec<Slot>>,
}

/// One of its connections.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    pub(crate) sender: Option<Sender>,
    pub(crate) backing_off: bool,
    pub(crate) last_error: Option<String>,
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
    pub(crate) fn new(target: Target, instance: &Instance, connections: usize) -> Self {
        let endpoint = Self {
            target,
            load: Load::new(Instant::now()),
            weight: AtomicU32::new(0),
            retained: AtomicBool::new(false),
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
    pub(crate) fn update(&self, instance: &Instance) {
        let weight = if instance.is_eligible() {
            instance.weight
        } else {
            0
        };
        self.weight.store(weight, Ordering::Relaxed);
    }

    /// It is to get no new calls, for its instance has vanished.
    pub(crate) fn retire(&self) {
        self.weight.store(0, Ordering::Relaxed);
    }

    pub(crate) fn set_retained(&self, retained: bool) {
        self.retained.store(retained, Ordering::Relaxed);
    }

    pub(crate) fn is_retained(&self) -> bool {
        self.retained.load(Ordering::Relaxed)
    }

    /// It as something to pick, if it can be picked now.
    pub(crate) fn ready(self: &Arc<Self>) -> Option<ReadyEndpoint> {
        let weight = self.weight.load(Ordering::Relaxed);
        if weight == 0 {
            return None;
        }
        let senders = self.senders();
        (!senders.is_empty()).then(|| ReadyEndpoint {
            endpoint: Arc::clone(self),
            senders,
            weight,
        })
    }

    /// How many streams its connections have in use, if that is all that the server allows.
    pub(crate) fn limit_reached(&self) -> Option<usize> {
        let slots = self.lock();
        let open = slots.iter().filter(|slot| slot.is_open());
        let limits = open
            .filter_map(|slot| slot.sender.as_ref())
            .map(Sender::limit_reached);
        // None without a connection.
        limits.reduce(|sum, limit| Some(sum?.saturating_add(limit?)))?
    }

    /// Whether it is connected, whatever its weight.
    pub(crate) fn is_connected(&self) -> bool {
        self.lock().iter().any(Slot::is_open)
    }

    pub(crate) fn status(&self) -> EndpointStatus {
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
            retained: self.is_retained(),
        }
    }

    fn senders(&self) -> Box<[Sender]> {
        self.lock()
            .iter()
            .filter(|slot| slot.is_open())
            .filter_map(|slot| slot.sender.clone())
            .collect()
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An endpoint in a picker.
#[derive(Debug)]
pub(crate) struct ReadyEndpoint {
    pub(crate) endpoint: Arc<Endpoint>,
    senders: Box<[Sender]>,
    weight: u32,
}

impl ReadyEndpoint {
    /// A stream for one call, if it can be sent now.
    pub(crate) fn reserve(&self) -> Option<Reserved> {
        if let [only] = &*self.senders {
            return only.reserve();
        }
        let start = fastrand::usize(..self.senders.len());
        let (before, after) = self.senders.split_at(start);
        after.iter().chain(before).find_map(Sender::reserve)
    }

    /// Whether it is connected, and has no room for a call.
    pub(crate) fn is_full(&self) -> bool {
        !self.is_usable() && self.senders.iter().any(Sender::is_open)
    }
}

impl Candidate for ReadyEndpoint {
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
