//! What the pool shows to calls.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::Notify;

use super::endpoint::{Endpoint, EndpointState, EndpointStatus, ReadyEndpoint};
use crate::balance::pick::{BalancePolicy, Cursor, Picker};
use crate::snapshot::Freshness;

/// How many endpoints an error message names.
const NAMED: usize = 10;

/// What the pool shows to calls.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) picker: ArcSwap<Picker<ReadyEndpoint>>,
    /// Notified whenever the picker has something to pick.
    pub(crate) ready: Notify,
    /// Notified whenever an endpoint has room for a call after it had none: one of those that wait, which
    /// notifies the next once it has found room.
    pub(crate) freed: Arc<Notify>,
    pub(crate) known: ArcSwap<Known>,
}

/// What is known of the set, for those who ask.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) range: Arc<str>,
    pub(crate) endpoints: Vec<Arc<Endpoint>>,
    /// Instances of whose address no endpoint can be made.
    pub(crate) unusable: Vec<String>,
    pub(crate) freshness: Option<Freshness>,
}

impl View {
    pub(crate) fn new(range: Arc<str>) -> Self {
        Self {
            picker: ArcSwap::from_pointee(Picker::new(
                BalancePolicy::default(),
                vec![],
                &Cursor::default(),
            )),
            ready: Notify::new(),
            freed: Arc::default(),
            known: ArcSwap::from_pointee(Known {
                range,
                endpoints: vec![],
                unusable: vec![],
                freshness: None,
            }),
        }
    }

    pub(crate) fn endpoints(&self) -> Vec<EndpointStatus> {
        let known = self.known.load();
        known.endpoints.iter().map(|e| e.status()).collect()
    }

    /// Whether an endpoint is ready and has no room for a call.
    pub(crate) fn is_full(&self) -> bool {
        self.picker
            .load()
            .candidates()
            .iter()
            .any(ReadyEndpoint::is_full)
    }

    /// Why a call cannot be sent: no instances under the key, or each with its last error.
    pub(crate) fn describe_unavailable(&self) -> String {
        let known = self.known.load();
        let how = if self.is_full() {
            "has room for another call"
        } else {
            "is ready"
        };
        let mut text = match known.endpoints.len() {
            0 if known.unusable.is_empty() => format!("no instances under {}", known.range),
            count => format!(
                "none of {} instances under {} {how}",
                count + known.unusable.len(),
                known.range
            ),
        };
        // Each when its turn comes: of thousands, ten are named.
        let described = known.endpoints.iter().map(|endpoint| describe(endpoint));
        for (count, one) in described.chain(known.unusable.iter().cloned()).enumerate() {
            if count == NAMED {
                text.push_str(", ...");
                break;
            }
            text.push_str(if count == 0 { ": " } else { ", " });
            text.push_str(&one);
        }
        if let Some(Freshness::Stale { reason, .. }) = &known.freshness {
            let age = known
                .freshness
                .as_ref()
                .map_or_else(Default::default, Freshness::age);
            text.push_str(&format!("; last heard {} s ago ({reason})", age.as_secs()));
        }
        text
    }
}

fn describe(endpoint: &Endpoint) -> String {
    let status = endpoint.status();
    match (&status.last_error, status.state) {
        (Some(error), EndpointState::Connecting | EndpointState::Backoff) => {
            format!("{} ({}: {error})", status.address, status.state)
        }
        (_, state) => match endpoint.limit_reached() {
            Some(limit) => {
                let address = &status.address;
                format!("{address} ({state}, its limit of {limit} streams is reached)")
            }
            None => format!("{} ({state})", status.address),
        },
    }
}
