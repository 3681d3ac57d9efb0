//! An endpoint: its address, load and connections.
//!
//! ```text
//!   Connecting --> Ready --(ended, or GOAWAY)--> Replacing --> Ready ...
//!    ^      |        |                               |
//!    |      |        |                             failed
//!    |    failed   ended early, repeatedly           |
//!    |      v        v                               |
//!    +---- Backoff <---------------------------------+
//! ```
//!
//! Each connection of an endpoint has a [`SlotState`] and a task that moves it through this cycle
//! while the endpoint is in the pool. Only Ready endpoints get calls, and no call has to wait for a
//! connection to be made for it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::balance::connection::{ReservedStream, Sender, Target};
use crate::balance::pick::{Candidate, Load};
use crate::instance::Instance;

/// The state of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// The channel is connecting to the endpoint.
    Connecting,
    /// The endpoint is connected and gets calls.
    Ready,
    /// The channel waits before the next attempt to connect, because the last one failed, or its
    /// connections ended several times in a row without a response.
    Backoff,
    /// The instance is draining or has weight 0. The endpoint gets no new calls.
    Draining,
    /// The Tokio runtime on which the channel was built has ended, so the endpoint will never be
    /// connected again.
    Shutdown,
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndpointState::Connecting => "connecting",
            EndpointState::Ready => "ready",
            EndpointState::Backoff => "backing off",
            EndpointState::Draining => "draining",
            EndpointState::Shutdown => "shut down",
        })
    }
}

/// The status of one endpoint of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointStatus {
    /// The address, `host:port` or `unix:/path`.
    pub address: String,
    /// The state.
    pub state: EndpointState,
    /// How many connections to the endpoint accept calls.
    pub connections: usize,
    /// Attempts sent to the endpoint whose response body has not ended.
    pub in_flight: usize,
    /// The moving peak of the latency; `None` before the first response.
    pub latency: Option<Duration>,
    /// The share of calls, relative to the other endpoints' weights.
    pub weight: u32,
    /// Why the last connection failed or was lost; `None` while all connections are well. After a
    /// panic of the channel's [`Source`](crate::balance::Source), also that panic. After the server
    /// has closed a connection because of too many pings, what to set, for as long as the endpoint
    /// is in the channel.
    pub last_error: Option<String>,
    /// Whether the instance has disappeared in a mass deletion and the endpoint is kept while it is
    /// connected, for the time of
    /// [`mass_deletion_guard`](crate::balance::BalancedChannelBuilder::mass_deletion_guard).
    pub retained: bool,
}

/// An endpoint, shared by the pool, its connection tasks and the calls sent to it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) target: Target,
    pub(crate) load: Load,
    /// 0 while the endpoint gets no new calls.
    weight: AtomicU32,
    retained: AtomicBool,
    slots: Mutex<Vec<Slot>>,
}

/// One connection of an endpoint.
#[derive(Debug)]
struct Slot {
    state: SlotState,
    /// Whether an attempt to connect has failed since the connection was last ready. As in gRPC's
    /// policies, a slot stays failed during further attempts.
    failed: bool,
}

/// The state of one connection of an endpoint.
#[derive(Debug)]
pub(crate) enum SlotState {
    Connecting {
        /// Why the connection before was lost or could not be made.
        last_error: Option<String>,
    },
    Ready(Sender),
    /// The last connection was no failure, and another attempt follows it at once.
    Replacing {
        /// Why the last connection ended.
        reason: String,
    },
    Backoff {
        error: String,
        /// Whether a waiting call ends the pause.
        on_demand: bool,
    },
}

impl Slot {
    /// The sender, if the connection accepts calls.
    fn sender(&self) -> Option<&Sender> {
        match &self.state {
            SlotState::Ready(sender) if sender.is_open() => Some(sender),
            _ => None,
        }
    }

    /// The last error. A connection may be lost before its task has noticed.
    fn error(&self) -> Option<String> {
        match &self.state {
            SlotState::Connecting { last_error } => last_error.clone(),
            SlotState::Ready(sender) => sender.close_reason(),
            SlotState::Replacing { reason } => Some(reason.clone()),
            SlotState::Backoff { error, .. } => Some(error.clone()),
        }
    }
}

impl Endpoint {
    pub(crate) fn new(target: Target, instance: &Instance, connections: usize) -> Self {
        let connecting = || Slot {
            state: SlotState::Connecting { last_error: None },
            failed: false,
        };
        let slots = std::iter::repeat_with(connecting).take(connections);
        let endpoint = Self {
            target,
            load: Load::new(Instant::now()),
            weight: AtomicU32::new(0),
            retained: AtomicBool::new(false),
            slots: Mutex::new(slots.collect()),
        };
        endpoint.update(instance);
        endpoint
    }

    /// Applies the changes of an instance that need no new connection.
    pub(crate) fn update(&self, instance: &Instance) {
        let weight = if instance.is_eligible() {
            instance.weight
        } else {
            0
        };
        self.weight.store(weight, Ordering::Relaxed);
    }

    /// Sends the endpoint no new calls until the next [`update`](Self::update).
    pub(crate) fn stop_new_calls(&self) {
        self.weight.store(0, Ordering::Relaxed);
    }

    /// Whether the endpoint is in the pool and gets new calls.
    pub(crate) fn accepts_calls(&self) -> bool {
        self.weight.load(Ordering::Relaxed) > 0 && !self.slots.lock().is_empty()
    }

    pub(crate) fn set_retained(&self, retained: bool) {
        self.retained.store(retained, Ordering::Relaxed);
    }

    pub(crate) fn is_retained(&self) -> bool {
        self.retained.load(Ordering::Relaxed)
    }

    /// The endpoint as a candidate of the picker, if it can be picked now.
    pub(crate) fn as_ready(self: &Arc<Self>) -> Option<ReadyEndpoint> {
        let weight = self.weight.load(Ordering::Relaxed);
        if weight == 0 {
            return None;
        }
        let slots = self.slots.lock();
        let senders: Box<[Sender]> = slots.iter().filter_map(Slot::sender).cloned().collect();
        (!senders.is_empty()).then(|| ReadyEndpoint {
            endpoint: Arc::clone(self),
            senders,
            weight,
        })
    }

    /// Whether all connections take no calls until the server responds to a ping; false without a
    /// connection.
    pub(crate) fn is_suspect(&self) -> bool {
        let slots = self.slots.lock();
        let mut open = slots.iter().filter_map(Slot::sender).peekable();
        open.peek().is_some() && open.all(Sender::is_suspect)
    }

    /// The sum of the stream limits of the connections that take calls, if all of them are reached;
    /// `None` without such a connection.
    pub(crate) fn limit_reached(&self) -> Option<usize> {
        let slots = self.slots.lock();
        let open = slots.iter().filter_map(Slot::sender);
        let limits = open
            .filter(|sender| !sender.is_suspect())
            .map(Sender::limit_reached);
        limits.reduce(|sum, limit| Some(sum?.saturating_add(limit?)))?
    }

    /// Whether all streams of one connection are in use. The limit is 0 until h2 has read it.
    pub(super) fn is_slot_full(&self, index: usize) -> bool {
        let slots = self.slots.lock();
        let sender = slots.get(index).and_then(Slot::sender);
        let limit = sender.and_then(Sender::limit_reached);
        limit.is_some_and(|limit| limit > 0)
    }

    /// Whether a connection is open. The weight does not matter.
    pub(crate) fn is_connected(&self) -> bool {
        self.slots.lock().iter().any(|slot| slot.sender().is_some())
    }

    /// Whether no connection is open, and none was a moment ago. A server that ends a connection
    /// which worked, for example after a number of requests, is not lost.
    pub(crate) fn is_lost(&self) -> bool {
        let slots = self.slots.lock();
        slots.iter().all(|slot| match slot.state {
            SlotState::Connecting { .. } | SlotState::Backoff { .. } => true,
            SlotState::Ready(_) | SlotState::Replacing { .. } => false,
        })
    }

    /// Whether no call should wait for the endpoint: the last attempt of each connection failed,
    /// or the endpoint gets no calls.
    pub(crate) fn is_failing(&self) -> bool {
        let is_draining = self.weight.load(Ordering::Relaxed) == 0;
        is_draining || self.slots.lock().iter().all(|slot| slot.failed)
    }

    pub(crate) fn status(&self) -> EndpointStatus {
        let weight = self.weight.load(Ordering::Relaxed);
        let slots = self.slots.lock();
        let connections = slots.iter().filter_map(Slot::sender).count();
        let is_backing_off = |slot: &Slot| matches!(slot.state, SlotState::Backoff { .. });
        let state = if weight == 0 {
            EndpointState::Draining
        } else if connections > 0 {
            EndpointState::Ready
        } else if slots.iter().all(is_backing_off) {
            EndpointState::Backoff
        } else {
            EndpointState::Connecting
        };
        EndpointStatus {
            address: self.target.address.to_string(),
            state,
            connections,
            in_flight: self.load.in_flight() as usize,
            latency: self.load.latency(Instant::now()),
            weight,
            last_error: slots
                .iter()
                .find_map(Slot::error)
                .or_else(|| self.target.ping_advice()),
            retained: self.is_retained(),
        }
    }

    /// Sets the state of one connection. Does nothing after [`close`](Self::close).
    pub(crate) fn set_slot(&self, index: usize, state: SlotState) {
        if let Some(slot) = self.slots.lock().get_mut(index) {
            slot.failed = match state {
                SlotState::Connecting { .. } => slot.failed,
                SlotState::Ready(_) | SlotState::Replacing { .. } => false,
                // A call that waits makes an attempt.
                SlotState::Backoff { on_demand, .. } => !on_demand,
            };
            slot.state = state;
        }
    }

    /// Drops the connections, and refuses new ones from tasks that have not ended yet.
    ///
    /// A call in flight keeps its connection open by itself. The call also holds the endpoint,
    /// which without this would keep the other connections open.
    pub(crate) fn close(&self) {
        self.slots.lock().clear();
    }
}

/// A Ready endpoint, as the picker holds it.
#[derive(Debug)]
pub(crate) struct ReadyEndpoint {
    pub(crate) endpoint: Arc<Endpoint>,
    senders: Box<[Sender]>,
    weight: u32,
}

impl ReadyEndpoint {
    /// Reserves a stream for one call on any connection that has a free one.
    pub(crate) fn reserve(&self) -> Option<ReservedStream> {
        if let [only] = &*self.senders {
            return only.reserve();
        }
        let start = fastrand::usize(..self.senders.len());
        let (before, after) = self.senders.split_at(start);
        after.iter().chain(before).find_map(Sender::reserve)
    }

    /// Whether a connection is open. The connection may have no free stream.
    pub(crate) fn is_open(&self) -> bool {
        self.senders.iter().any(Sender::is_open)
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
