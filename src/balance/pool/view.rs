//! The part of a pool that calls read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio::task::coop::consume_budget;
use tokio::time::Instant;

use super::demand::Demand;
use super::endpoint::{Endpoint, EndpointState, EndpointStatus, ReadyEndpoint};
use super::wait_queue::WaitQueue;
use super::waiting::{AssignedStream, WaitingCall};
use crate::balance::connection::{Capacity, LATE_RESPONSE_TO_PING, ReservedStream};
use crate::balance::pick::{BalancePolicy, Cursor, Picker};
use crate::snapshot::Freshness;

/// How many endpoints an error message names. A set may have thousands.
const MAX_NAMED: usize = 10;

/// Why the channel makes no more calls after its pool was dropped.
const RUNTIME_ENDED: &str = "the Tokio runtime on which the channel was built has ended; build the \
                             channel on a runtime that lives as long as the channel is used";

/// The same after a panic of the pool, which is a fault of this crate.
const POOL_PANICKED: &str = "a task of the channel has panicked, as the log says; build another \
                             channel";

/// The picker and status that the pool publishes. Calls read the picker without a lock.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) picker: ArcSwap<Picker<ReadyEndpoint>>,
    waiting: WaitQueue<WaitingCall, AssignedStream>,
    capacity: Arc<Capacity>,
    pub(super) demand: Arc<Demand>,
    /// How many waiting calls fail when all endpoints do.
    refusable: AtomicUsize,
    status: watch::Sender<Arc<PoolStatus>>,
    /// Whether the pool or the channel was dropped.
    ended: AtomicBool,
}

/// The endpoints of a pool, for status reports and error messages.
#[derive(Debug)]
pub(crate) struct PoolStatus {
    /// Where the instances come from: a key prefix, or the name of the source.
    pub(crate) range: Arc<str>,
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// How many endpoints the picker has.
    pub(crate) ready: usize,
    /// Whether there is nothing to wait for soon: the set has arrived, no endpoint is ready, and
    /// the last attempt to connect to each has failed. gRPC calls this state TRANSIENT_FAILURE.
    pub(crate) is_failing: bool,
    /// Why instances cannot be called: their addresses are invalid, or they need TLS.
    pub(crate) unusable: Vec<String>,
    pub(crate) freshness: Option<Freshness>,
    /// Why the set does not change any more.
    pub(crate) source_error: Option<String>,
    /// Why the channel makes no more calls, after the pool was dropped.
    pub(crate) ended: Option<&'static str>,
}

impl View {
    pub(crate) fn new(range: Arc<str>) -> Self {
        let picker = Picker::new(BalancePolicy::default(), vec![], &Cursor::default());
        let status = PoolStatus {
            range,
            endpoints: vec![],
            ready: 0,
            is_failing: false,
            unusable: vec![],
            freshness: None,
            source_error: None,
            ended: None,
        };
        let capacity = Arc::<Capacity>::default();
        Self {
            picker: ArcSwap::from_pointee(picker),
            waiting: WaitQueue::new(Arc::clone(&capacity)),
            demand: Arc::new(Demand::new(Arc::clone(&capacity))),
            capacity,
            refusable: AtomicUsize::new(0),
            status: watch::Sender::new(Arc::new(status)),
            ended: AtomicBool::new(false),
        }
    }

    /// Publishes a picker and the status that belongs to it.
    pub(crate) fn publish(&self, picker: Picker<ReadyEndpoint>, status: PoolStatus) {
        self.picker.store(Arc::new(picker));
        self.status.send_replace(Arc::new(status));
        self.capacity.notify();
    }

    /// Notified whenever waiting calls should be tried.
    pub(crate) fn capacity(&self) -> Arc<Capacity> {
        Arc::clone(&self.capacity)
    }

    /// Whether calls wait. A new call then has to queue.
    pub(crate) fn has_waiting_calls(&self) -> bool {
        self.capacity.is_awaited()
    }

    /// Picks an endpoint and reserves a stream on it. An endpoint that `avoid` matches is taken
    /// only if no other has room.
    pub(crate) fn reserve(
        &self,
        avoid: impl Fn(&ReadyEndpoint) -> bool,
    ) -> Option<(Arc<Endpoint>, ReservedStream)> {
        let picker = self.picker.load();
        loop {
            let ready = picker.pick(Instant::now(), &avoid)?;
            // `None` if another call took the last stream since the pick, or the connection closed.
            if let Some(stream) = ready.reserve() {
                return Some((Arc::clone(&ready.endpoint), stream));
            }
        }
    }

    /// Waits until a stream is reserved for the call. Returns `None` if all endpoints fail and the
    /// call does not wait for them, and after [`end`](Self::end).
    pub(crate) async fn wait_for_stream(
        &self,
        call: WaitingCall,
    ) -> Option<(Arc<Endpoint>, ReservedStream)> {
        // Before the call joins the queue, so that no refusal misses it.
        let _refusable = (!call.waits_for_ready).then(|| RefusableCall::new(&self.refusable));
        loop {
            let assigned = self.waiting.wait(call.started, call.clone()).await?;
            if let Some(taken) = assigned.take() {
                return Some(taken);
            }
        }
    }

    /// Serves waiting calls until the future is dropped.
    pub(super) async fn serve_waiting_calls(&self) {
        let capacity = self.capacity();
        let reserve = |call: &WaitingCall| {
            let reserved = self.reserve(|ready| (call.avoids)(ready));
            reserved.map(AssignedStream::new)
        };
        loop {
            capacity.notified().await;
            // Looking for such calls takes as long as the queue, so only if there are any.
            if self.refusable.load(Ordering::SeqCst) > 0 && self.is_failing() {
                self.waiting.refuse(|call| !call.waits_for_ready);
            }
            while self.waiting.serve_first(reserve) {
                // Thousands of calls may wait for the first endpoint.
                consume_budget().await;
            }
            self.demand.give_turns();
        }
    }

    /// Records that the channel is dropped, so that the end of its pool is nothing to report.
    pub(crate) fn close(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Ends every wait, because no pool keeps the view current any more. A channel that is still in
    /// use has lost its pool with its runtime.
    pub(crate) fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        let reason = if std::thread::panicking() {
            POOL_PANICKED
        } else {
            RUNTIME_ENDED
        };
        let picker = Picker::new(BalancePolicy::default(), vec![], &Cursor::default());
        self.picker.store(Arc::new(picker));
        let last = self.status();
        self.status.send_replace(Arc::new(PoolStatus {
            range: Arc::clone(&last.range),
            endpoints: last.endpoints.clone(),
            ready: 0,
            unusable: last.unusable.clone(),
            freshness: last.freshness.clone(),
            source_error: last.source_error.clone(),
            is_failing: true,
            ended: Some(reason),
        }));
        // After the status, which says why the calls end.
        self.waiting.close();
    }

    /// Whether the pool was dropped.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The current status.
    pub(crate) fn status(&self) -> Arc<PoolStatus> {
        Arc::clone(&self.status.borrow())
    }

    /// Receives each status that is published from now on, or only the latest if the receiver is
    /// slow. Calls do no work for it. The channel closes when the view is dropped.
    pub(crate) fn watch_status(&self) -> watch::Receiver<Arc<PoolStatus>> {
        self.status.subscribe()
    }

    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        self.status().endpoints()
    }

    /// Whether there is nothing that a call should wait for if it does not wait for endpoints that
    /// fail.
    pub(crate) fn is_failing(&self) -> bool {
        self.status.borrow().is_failing
    }

    /// Whether a connection is open. A call that waits nevertheless waits for a free stream.
    fn has_open_endpoint(&self) -> bool {
        let picker = self.picker.load();
        picker.candidates().iter().any(ReadyEndpoint::is_open)
    }

    /// Why no call can be sent: there are no instances, or the state of each of the first
    /// [`MAX_NAMED`].
    pub(crate) fn describe_unavailable(&self) -> String {
        self.status().describe_unavailable(self.has_open_endpoint())
    }
}

/// Counts a waiting call that fails when all endpoints do, until it is dropped.
struct RefusableCall<'a>(&'a AtomicUsize);

impl<'a> RefusableCall<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for RefusableCall<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl PoolStatus {
    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        let statuses = self.endpoints.iter().map(|endpoint| endpoint.status());
        let with_source_error = statuses.map(|mut status| {
            if let Some(reason) = self.ended {
                status.state = EndpointState::Shutdown;
                status.connections = 0;
                status.last_error = Some(reason.to_owned());
                return status;
            }
            if let Some(error) = &self.source_error {
                let own = status.last_error.take().map(|own| format!("{own}; "));
                status.last_error = Some(format!("{}{error}", own.unwrap_or_default()));
            }
            status
        });
        with_source_error.collect()
    }

    fn describe_unavailable(&self, has_open_endpoint: bool) -> String {
        if let Some(reason) = self.ended {
            return reason.to_owned();
        }
        let lacking = if has_open_endpoint {
            "has room for another call"
        } else {
            "is ready"
        };
        let range = &self.range;
        let mut text = match self.endpoints.len() + self.unusable.len() {
            0 => format!("no instances under {range}"),
            count => format!("none of {count} instances under {range} {lacking}"),
        };
        let endpoints = self.endpoints.iter().map(|endpoint| describe(endpoint));
        for (index, described) in endpoints.chain(self.unusable.iter().cloned()).enumerate() {
            if index == MAX_NAMED {
                text.push_str(", ...");
                break;
            }
            text.push_str(if index == 0 { ": " } else { ", " });
            text.push_str(&described);
        }
        if let Some(freshness @ Freshness::Stale { reason, .. }) = &self.freshness {
            let age = freshness.age().as_secs();
            text.push_str(&format!("; not updated for {age} s ({reason})"));
        }
        if let Some(error) = &self.source_error {
            text.push_str(&format!("; {error}"));
        }
        text
    }
}

fn describe(endpoint: &Endpoint) -> String {
    let status = endpoint.status();
    let (address, state) = (&status.address, status.state);
    match (&status.last_error, state) {
        (Some(error), EndpointState::Connecting | EndpointState::Backoff) => {
            format!("{address} ({state}: {error})")
        }
        _ if endpoint.is_suspect() => format!("{address} ({state}, {LATE_RESPONSE_TO_PING})"),
        _ => match endpoint.limit_reached() {
            Some(limit) => {
                format!("{address} ({state}, its limit of {limit} streams is reached)")
            }
            None => format!("{address} ({state})"),
        },
    }
}
