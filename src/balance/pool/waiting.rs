//! A call that waits for a stream, and the stream that it gets.

use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;

use super::endpoint::{Endpoint, ReadyEndpoint};
use crate::balance::connection::ReservedStream;

/// A call that waits for a stream.
#[derive(Clone)]
pub(crate) struct WaitingCall {
    /// When the call started. Calls are served in this order.
    pub(crate) started: Instant,
    /// Whether the call prefers other endpoints.
    pub(crate) avoids: Arc<dyn Fn(&ReadyEndpoint) -> bool + Send + Sync>,
    /// Whether the call waits although all endpoints fail.
    pub(crate) waits_for_ready: bool,
}

impl fmt::Debug for WaitingCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WaitingCall")
            .field("started", &self.started)
            .field("waits_for_ready", &self.waits_for_ready)
            .finish_non_exhaustive()
    }
}

/// A stream that was reserved for a waiting call. Until the call takes the stream, it counts as in
/// flight on its endpoint, so that the calls served next see the endpoint's load.
pub(crate) struct AssignedStream {
    endpoint: Arc<Endpoint>,
    stream: Option<ReservedStream>,
}

impl AssignedStream {
    pub(super) fn new((endpoint, stream): (Arc<Endpoint>, ReservedStream)) -> Self {
        endpoint.load.begin();
        Self {
            endpoint,
            stream: Some(stream),
        }
    }

    /// The stream, unless its connection or its endpoint has stopped to accept calls meanwhile.
    pub(super) fn take(mut self) -> Option<(Arc<Endpoint>, ReservedStream)> {
        let stream = self.stream.take().filter(ReservedStream::is_open)?;
        if !self.endpoint.accepts_calls() {
            return None;
        }
        Some((Arc::clone(&self.endpoint), stream))
    }
}

impl fmt::Debug for AssignedStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AssignedStream")
            .field("address", &self.endpoint.target.address)
            .finish_non_exhaustive()
    }
}

impl Drop for AssignedStream {
    fn drop(&mut self) {
        self.endpoint.load.end();
    }
}
