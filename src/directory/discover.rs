//! A directory as tower's `Discover`, and as the source of tonic's own balanced channel.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::{Stream, StreamExt};
use tokio::sync::mpsc;
use tonic::transport::channel::Change as TonicChange;
use tonic::transport::{Channel, Endpoint};
use tower::discover::Change;

use super::handle::{Directory, Snapshots};
use crate::error::{Error, Result};
use crate::instance::{Instance, validate_address};
use crate::panics;
use crate::snapshot::{self, InstanceKey, Instances};

/// The number of changes that tonic's channel takes before its sender waits. Any number works,
/// because only a task of ours waits there, and computes the difference to the newest snapshot
/// afterwards.
const TONIC_BUFFER: usize = 16;

/// The caller's changes to the endpoint of an instance.
type Configure = Box<dyn Fn(&Instance, Endpoint) -> Endpoint + Send>;

impl Directory {
    /// The instances as a stream of changes, for tower's balancer or a custom one. The present
    /// instances come first.
    pub fn discover(&self) -> Discovery {
        Discovery {
            snapshots: Some(self.changes()),
            yielded: Instances::new(),
            pending: VecDeque::new(),
        }
    }

    /// Like [`discover`](Self::discover), with each instance as tonic's `Endpoint`. `configure` may
    /// change the endpoint, for example its timeouts, keep-alive and windows.
    ///
    /// For TLS, `configure` must return a new endpoint for `https://` and the instance's address.
    /// The endpoint that it receives is for `http://`, where tonic accepts a TLS configuration,
    /// ignores it and sends plaintext.
    ///
    /// An instance is left out, with a warning, if tonic cannot make an endpoint of its address, if
    /// `configure` panics, or if the instance speaks TLS and its endpoint is not for `https://`.
    pub fn discover_endpoints(
        &self,
        configure: impl Fn(&Instance, Endpoint) -> Endpoint + Send + 'static,
    ) -> EndpointChanges {
        EndpointChanges {
            discovery: self.discover(),
            configure: Box::new(configure),
        }
    }

    /// A tonic channel over the instances, through tonic's own `Channel::balance_channel`. For
    /// `configure` and for TLS see [`discover_endpoints`](Self::discover_endpoints).
    ///
    /// The channel follows the directory until the channel's last clone is dropped. tonic's
    /// balancing has limits: it picks endpoints at random, including dead ones until they leave the
    /// directory, and without an endpoint a call waits forever. So put a timeout around each call.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime, as tonic's own method.
    pub fn balance_channel(
        &self,
        configure: impl Fn(&Instance, Endpoint) -> Endpoint + Send + 'static,
    ) -> Channel {
        let (channel, sender) = Channel::balance_channel(TONIC_BUFFER);
        tokio::spawn(forward(self.discover_endpoints(configure), sender));
        channel
    }
}

/// Forwards changes to tonic's channel until it is dropped. tonic receives changes only when the
/// channel is called, so sending may wait long.
async fn forward(
    mut changes: EndpointChanges,
    sender: mpsc::Sender<TonicChange<InstanceKey, Endpoint>>,
) {
    loop {
        let change = tokio::select! {
            change = changes.next() => change,
            () = sender.closed() => return,
        };
        let change = match change {
            Some(Ok(Change::Insert(key, endpoint))) => TonicChange::Insert(key, endpoint),
            Some(Ok(Change::Remove(key))) => TonicChange::Remove(key),
            None => return,
        };
        if sender.send(change).await.is_err() {
            return;
        }
    }
}

/// A service's instances as a `tower::discover::Discover`, made by [`Directory::discover`].
///
/// The stream yields an insert for each instance that may be called. When an instance leaves,
/// drains, or gets weight 0, the stream yields a removal. An instance that changes in any way is
/// inserted again under its key.
///
/// Each item is part of the difference between the items so far and the newest snapshot. A consumer
/// may pause for any time: nothing is queued and nothing waits for it. Its next polls yield the net
/// difference. The stream never yields an error and never ends, because a single error from a
/// `Discover` breaks tower's balancer for good. The stream holds the directory.
#[must_use = "streams do nothing unless polled"]
pub struct Discovery {
    /// `None` after the client was closed.
    snapshots: Option<Snapshots>,
    /// The instances that the consumer has.
    yielded: Instances,
    /// The changes from `yielded` to the newest snapshot.
    pending: VecDeque<snapshot::Change>,
}

impl Stream for Discovery {
    type Item = Result<Change<InstanceKey, Instance>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        // First look for a newer snapshot, which may replace pending changes.
        while let Some(snapshots) = &mut this.snapshots {
            match Pin::new(snapshots).poll_next(cx) {
                Poll::Ready(Some(snapshot)) => {
                    let mut eligible = Instances::clone(&snapshot.instances);
                    eligible.retain(|_, instance| instance.is_eligible());
                    this.pending = snapshot::diff(&this.yielded, &eligible).into();
                }
                // The client was closed. The consumer keeps its instances.
                Poll::Ready(None) => this.snapshots = None,
                Poll::Pending => break,
            }
        }
        match this.pending.pop_front() {
            Some(snapshot::Change::Upsert(key, instance)) => {
                this.yielded.insert(key.clone(), Arc::clone(&instance));
                let instance = Instance::clone(&instance);
                Poll::Ready(Some(Ok(Change::Insert(key, instance))))
            }
            Some(snapshot::Change::Remove(key)) => {
                this.yielded.remove(&key);
                Poll::Ready(Some(Ok(Change::Remove(key))))
            }
            None => Poll::Pending,
        }
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery")
            .field("yielded", &self.yielded)
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

/// A service's instances as tonic's endpoints, made by [`Directory::discover_endpoints`].
///
/// The stream behaves like [`Discovery`].
#[must_use = "streams do nothing unless polled"]
pub struct EndpointChanges {
    discovery: Discovery,
    configure: Configure,
}

impl EndpointChanges {
    /// The change of the endpoint. An instance that is left out yields a removal, because an
    /// earlier version of it may have been inserted.
    fn to_endpoint(&self, change: Change<InstanceKey, Instance>) -> Change<InstanceKey, Endpoint> {
        let (key, instance) = match change {
            Change::Remove(key) => return Change::Remove(key),
            Change::Insert(key, instance) => (key, instance),
        };
        let endpoint = match default_endpoint(&instance) {
            Ok(endpoint) => endpoint,
            Err(error) => {
                tracing::warn!(%key, %error, "ignoring an instance whose address is invalid");
                return Change::Remove(key);
            }
        };
        // A task may poll this stream, and would not follow the directory after a panic.
        let configure = || (self.configure)(&instance, endpoint);
        let endpoint = match catch_unwind(AssertUnwindSafe(configure)) {
            Ok(endpoint) => endpoint,
            Err(payload) => {
                let panic = panics::text(&*payload);
                tracing::warn!(%key, panic, "ignoring an instance for which `configure` panicked");
                return Change::Remove(key);
            }
        };
        let is_tls = endpoint.uri().scheme_str() == Some("https");
        if instance.tls == Some(true) && !is_tls {
            tracing::warn!(%key, "ignoring an instance that speaks TLS: its endpoint is plaintext");
            return Change::Remove(key);
        }
        Change::Insert(key, endpoint)
    }
}

impl Stream for EndpointChanges {
    type Item = Result<Change<InstanceKey, Endpoint>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let change = ready!(Pin::new(&mut self.discovery).poll_next(cx));
        Poll::Ready(change.map(|Ok(change)| Ok(self.to_endpoint(change))))
    }
}

impl fmt::Debug for EndpointChanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointChanges")
            .field("discovery", &self.discovery)
            .finish_non_exhaustive()
    }
}

/// The endpoint of an instance before `configure`.
fn default_endpoint(instance: &Instance) -> Result<Endpoint> {
    // A URI accepts more than an address that can be called, and takes port 80 if it has none.
    validate_address(&instance.address)?;
    let uri = if instance.address.starts_with("unix:") {
        // tonic takes the address of a Unix socket without a scheme before it.
        instance.address.clone()
    } else {
        format!("http://{}", instance.address)
    };
    Endpoint::from_shared(uri)
        .map_err(|error| Error::invalid("address", &instance.address, error.to_string()))
}
