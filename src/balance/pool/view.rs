//! The part of a pool that calls read.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{Notify, watch};

use super::endpoint::{Endpoint, EndpointState, EndpointStatus, ReadyEndpoint};
use crate::balance::pick::{BalancePolicy, Cursor, Picker};
use crate::snapshot::Freshness;

/// How many endpoints an error message names. A set may have thousands.
const MAX_NAMED: usize = 10;

/// The picker and status that the pool publishes. Calls read the picker without a lock.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) picker: ArcSwap<Picker<ReadyEndpoint>>,
    /// Notifies all waiting calls whenever a picker with endpoints is published.
    pub(crate) ready: Notify,
    /// Notified whenever a connection has a free stream after it had none. A notification wakes one
    /// waiting call, which wakes the next after it has found a stream.
    pub(crate) capacity: Arc<Notify>,
    status: watch::Sender<Arc<PoolStatus>>,
}

/// The endpoints of a pool, for status reports and error messages.
#[derive(Debug)]
pub(crate) struct PoolStatus {
    /// Where the instances come from: a key prefix, or the name of the source.
    pub(crate) range: Arc<str>,
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// How many endpoints the picker has.
    pub(crate) ready: usize,
    /// Why instances cannot be called: their addresses are invalid, or they need TLS.
    pub(crate) unusable: Vec<String>,
    pub(crate) freshness: Option<Freshness>,
    /// Why the set does not change any more.
    pub(crate) source_error: Option<String>,
}

impl View {
    pub(crate) fn new(range: Arc<str>) -> Self {
        let picker = Picker::new(BalancePolicy::default(), vec![], &Cursor::default());
        let status = PoolStatus {
            range,
            endpoints: vec![],
            ready: 0,
            unusable: vec![],
            freshness: None,
            source_error: None,
        };
        Self {
            picker: ArcSwap::from_pointee(picker),
            ready: Notify::new(),
            capacity: Arc::default(),
            status: watch::Sender::new(Arc::new(status)),
        }
    }

    /// Publishes a picker and the status that belongs to it.
    pub(crate) fn publish(&self, picker: Picker<ReadyEndpoint>, status: PoolStatus) {
        let has_endpoints = !picker.is_empty();
        self.picker.store(Arc::new(picker));
        if has_endpoints {
            self.ready.notify_waiters();
        }
        self.status.send_replace(Arc::new(status));
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

    /// Whether an endpoint is ready but has no free stream.
    pub(crate) fn is_full(&self) -> bool {
        let picker = self.picker.load();
        picker.candidates().iter().any(ReadyEndpoint::is_full)
    }

    /// Why no call can be sent: there are no instances, or the state of each of the first
    /// [`MAX_NAMED`].
    pub(crate) fn describe_unavailable(&self) -> String {
        self.status().describe_unavailable(self.is_full())
    }
}

impl PoolStatus {
    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        let statuses = self.endpoints.iter().map(|endpoint| endpoint.status());
        let with_source_error = statuses.map(|mut status| {
            if let Some(error) = &self.source_error {
                let own = status.last_error.take().map(|own| format!("{own}; "));
                status.last_error = Some(format!("{}{error}", own.unwrap_or_default()));
            }
            status
        });
        with_source_error.collect()
    }

    fn describe_unavailable(&self, is_full: bool) -> String {
        let lacking = if is_full {
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
        _ => match endpoint.limit_reached() {
            Some(limit) => {
                format!("{address} ({state}, its limit of {limit} streams is reached)")
            }
            None => format!("{address} ({state})"),
        },
    }
}
