//! A directory as tower's `Discover`, and into tonic's own balanced channel.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use tonic::transport::channel::Change as TonicChange;
use tonic::transport::{Channel, Endpoint};
use tower::discover::Change;

use super::Directory;
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::instance::validate_address;
use crate::snapshot::{self, InstanceKey, Instances, Snapshot};

/// How many changes tonic's channel takes before its sender waits. Any number does: a task of our
/// own waits there, and sends what is new by then.
const TONIC_BUFFER: usize = 16;

type Snapshots = Pin<Box<dyn Stream<Item = Arc<Snapshot>> + Send>>;

/// A service's instances as a `tower::discover::Discover`: a stream of changes.
///
/// It yields an insert for each instance that may be called and a removal for each that may not any
/// more: one that left, drains, or has weight 0. An instance that changes in any way is inserted
/// anew under its key.
///
/// What it yields is the difference between what it has yielded so far and the newest snapshot, so
/// that a consumer may stop polling for as long as it likes: nothing is queued meanwhile, nobody
/// waits for it, and then it gets the net difference. It never yields an error and never ends, for
/// one error from a `Discover` poisons tower's balancer for ever, whatever happens to etcd. It holds
/// its directory.
pub struct Discovery {
    /// `None` after the client was closed.
    snapshots: Option<Snapshots>,
    /// What the consumer has.
    told: Instances,
    /// What turns that into what it should have.
    pending: VecDeque<snapshot::Change>,
}

impl Directory {
    /// The instances as a stream of changes, for a balancer of your own; the present ones come
    /// first.
    pub fn discover(&self) -> Discovery {
        Discovery {
            snapshots: Some(Box::pin(self.changes())),
            told: Instances::new(),
            pending: VecDeque::new(),
        }
    }

    /// As [`discover`](Self::discover), each instance as tonic's `Endpoint`, which `configure` may
    /// change: time-outs, keep-alive, windows.
    ///
    /// For TLS, `configure` must return an endpoint of its own, of `https://` and the instance's
    /// address. The one that it is given is of `http://`, and on such a one tonic takes a TLS
    /// configuration, ignores it, and talks plaintext.
    ///
    /// An instance whose address no endpoint can be made of is left out with a warning, and so is one that
    /// says that it speaks TLS, for as long as its endpoint is not of `https://`.
    pub fn discover_endpoints(
        &self,
        configure: impl Fn(&Instance, Endpoint) -> Endpoint + Send + 'static,
    ) -> impl Stream<Item = Result<Change<InstanceKey, Endpoint>, Infallible>> + Send + Unpin + 'static
    {
        use futures::StreamExt;
        self.discover().filter_map(move |change| {
            let Ok(change) = change;
            let change = match change {
                Change::Remove(key) => Some(Change::Remove(key)),
                Change::Insert(key, instance) => match endpoint_of(&instance) {
                    Ok(endpoint) => {
                        let endpoint = configure(&instance, endpoint);
                        let is_tls = endpoint.uri().scheme_str() == Some("https");
                        if instance.tls == Some(true) && !is_tls {
                            tracing::warn!(
                                %key,
                                "an instance that speaks TLS is left out: its endpoint is plaintext"
                            );
                            Some(Change::Remove(key))
                        } else {
                            Some(Change::Insert(key, endpoint))
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%key, %error, "an instance cannot be called and is left out");
                        // It may have been there before, under an address that could be called.
                        Some(Change::Remove(key))
                    }
                },
            };
            futures::future::ready(change.map(Ok))
        })
    }

    /// A tonic channel over the instances, through tonic's own `Channel::balance_channel`;
    /// `configure` as in [`discover_endpoints`](Self::discover_endpoints), also for TLS.
    ///
    /// It follows the directory for as long as the channel, or a clone of it, is held. Its balancing
    /// is tonic's: endpoints are picked at random, dead ones among them until they leave the
    /// directory, and with no endpoint a call waits without end, so give your requests a time-out
    /// around the call.
    ///
    /// Must be called within a Tokio runtime.
    pub fn balance_channel(
        &self,
        configure: impl Fn(&Instance, Endpoint) -> Endpoint + Send + 'static,
    ) -> Channel {
        use futures::StreamExt;
        let (channel, changes) = Channel::balance_channel(TONIC_BUFFER);
        let mut discovery = self.discover_endpoints(configure);
        // tonic looks at its changes only when it is called, so the sender may wait for long. That
        // is this task's alone: the difference is made anew after each wait.
        tokio::spawn(async move {
            loop {
                let change = tokio::select! {
                    change = discovery.next() => change,
                    () = changes.closed() => break,
                };
                let Some(Ok(change)) = change else { break };
                // tonic has a type of its own for the same thing.
                let change = match change {
                    Change::Insert(key, endpoint) => TonicChange::Insert(key, endpoint),
                    Change::Remove(key) => TonicChange::Remove(key),
                };
                if changes.send(change).await.is_err() {
                    break;
                }
            }
        });
        channel
    }
}

fn endpoint_of(instance: &Instance) -> Result<Endpoint> {
    // A URI would take more than can be called, an address without a port for port 80.
    validate_address(&instance.address)?;
    let uri = if instance.address.starts_with("unix:") {
        // tonic has its own notation for these, and takes no other form of it.
        instance.address.clone()
    } else {
        format!("http://{}", instance.address)
    };
    Endpoint::from_shared(uri)
        .map_err(|error| Error::invalid("address", &instance.address, error.to_string()))
}

impl Stream for Discovery {
    type Item = Result<Change<InstanceKey, Instance>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        // Newer snapshots first: what is still pending may be outdated by one.
        while let Some(snapshots) = &mut this.snapshots {
            match snapshots.as_mut().poll_next(cx) {
                Poll::Ready(Some(snapshot)) => {
                    let mut wanted = Instances::clone(&snapshot.instances);
                    wanted.retain(|_, instance| instance.is_eligible());
                    this.pending = snapshot::diff(&this.told, &wanted).into();
                }
                // Nothing will change any more; that is no reason to end.
                Poll::Ready(None) => this.snapshots = None,
                Poll::Pending => break,
            }
        }
        match this.pending.pop_front() {
            Some(snapshot::Change::Upsert(key, instance)) => {
                this.told.insert(key.clone(), Arc::clone(&instance));
                let instance = Instance::clone(&instance);
                Poll::Ready(Some(Ok(Change::Insert(key, instance))))
            }
            Some(snapshot::Change::Remove(key)) => {
                this.told.remove(&key);
                Poll::Ready(Some(Ok(Change::Remove(key))))
            }
            None => Poll::Pending,
        }
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery")
            .field("told", &self.told)
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}
