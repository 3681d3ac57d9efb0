//! Why an operation had no response: the failures of the members that it tried, and the state of
//! those that are not connected.

use std::sync::Arc;
use std::time::Duration;

use super::members::{Addresses, describe_learner};
use crate::balance::{AttemptRecord, BalancedChannel, EndpointState, EndpointStatus};
use crate::error::Error;

/// How many members a reason names. A list of endpoints may be long.
const MAX_NAMED: usize = 10;

/// The error of an operation whose time is over.
///
/// The reason names each member that `record` says was tried, with its last failure, and each other
/// endpoint of the channel that is a learner or not connected. Without a channel, because the client
/// was closed meanwhile, it names the members of the record.
pub(in crate::client) fn timeout_error(
    operation: String,
    after: Duration,
    record: &AttemptRecord,
    channel: Option<&BalancedChannel>,
    learners: &Addresses,
) -> Error {
    let endpoints = channel.map(BalancedChannel::endpoints).unwrap_or_default();
    let reason = join(record, channel, &endpoints, learners);
    if channel.is_none() || endpoints.iter().any(|e| takes_calls(e, learners)) {
        Error::Timeout {
            operation,
            after,
            reason,
        }
    } else {
        Error::NotConnected {
            operation,
            after,
            reason,
        }
    }
}

/// Why no member responded within the time of `record`'s operation.
pub(super) fn reason(
    record: &AttemptRecord,
    channel: Option<&BalancedChannel>,
    learners: &Addresses,
) -> String {
    let endpoints = channel.map(BalancedChannel::endpoints).unwrap_or_default();
    join(record, channel, &endpoints, learners)
}

/// Whether no endpoint of the channel takes calls: none is connected, or only learners are.
///
/// After the end of the channel's runtime none is.
pub(super) fn is_disconnected(channel: &BalancedChannel, learners: &Addresses) -> bool {
    let endpoints = channel.endpoints();
    !endpoints
        .iter()
        .any(|endpoint| takes_calls(endpoint, learners))
}

fn takes_calls(endpoint: &EndpointStatus, learners: &Addresses) -> bool {
    is_connected(endpoint) && !learners.contains(&endpoint.address)
}

/// The addresses of the endpoints that take calls.
pub(super) fn ready_members(channel: &BalancedChannel, learners: &Addresses) -> Vec<Arc<str>> {
    let endpoints = channel.endpoints();
    let ready = endpoints.iter().filter(|e| takes_calls(e, learners));
    ready.map(|e| e.address.as_str().into()).collect()
}

fn is_connected(endpoint: &EndpointStatus) -> bool {
    endpoint.state == EndpointState::Ready
}

fn join(
    record: &AttemptRecord,
    channel: Option<&BalancedChannel>,
    endpoints: &[EndpointStatus],
    learners: &Addresses,
) -> String {
    let tried = record.failures();
    let is_tried = |address: &str| tried.iter().any(|(tried, _)| **tried == *address);
    let untried = endpoints
        .iter()
        .filter(|endpoint| !is_connected(endpoint) && !is_tried(&endpoint.address))
        .filter(|endpoint| !learners.contains(&endpoint.address))
        .map(|endpoint| {
            let error = endpoint.last_error.as_deref();
            let error = error.unwrap_or("not connected yet");
            format!("{}: {error}", endpoint.address)
        });
    let failures = tried
        .iter()
        .map(|(address, failure)| format!("{address}: {failure}"));
    let left_out = learners.iter().filter(|address| !is_tried(address));
    let left_out = left_out.map(|address| describe_learner(address));
    let unusable = channel.map(BalancedChannel::unusable).unwrap_or_default();
    let reasons: Vec<String> = failures
        .chain(untried)
        .chain(left_out)
        .chain(unusable)
        .collect();
    if reasons.is_empty() {
        return record
            .unsent()
            .unwrap_or_else(|| without_failure(endpoints));
    }
    let named = reasons[..reasons.len().min(MAX_NAMED)].join("; ");
    match reasons.len().saturating_sub(MAX_NAMED) {
        0 => named,
        more => format!("{named}; and {more} more members"),
    }
}

/// The reason if the time was over between two calls, or before the first one.
fn without_failure(endpoints: &[EndpointStatus]) -> String {
    let addresses: Vec<&str> = endpoints
        .iter()
        .take(MAX_NAMED)
        .map(|endpoint| endpoint.address.as_str())
        .collect();
    format!("no call has failed; connected: {}", addresses.join(", "))
}
