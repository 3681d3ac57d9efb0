//! Where a channel's endpoints come from.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};

use crate::error::Result;
use crate::instance::{Instance, validate_address};
use crate::panics;
use crate::snapshot::Snapshot;

/// A stream of complete sets of instances. Each set replaces the set before it.
///
/// A [`Directory`](crate::Directory) converts into a `Source`. [`Source::new`] takes any stream,
/// [`Source::fixed`] a list of instances, and [`Source::addresses`] a list of addresses.
#[must_use = "a source does nothing until a channel is built from it"]
pub struct Source {
    name: Arc<str>,
    /// The TTL of the registrations in the set, which may expire while their servers live. `None`
    /// if the set does not consist of registrations.
    ttl: Option<Duration>,
    snapshots: Pin<Box<dyn Stream<Item = Arc<Snapshot>> + Send>>,
}

impl Source {
    /// Creates a source from a stream of sets. When the stream ends or panics, the last set stays in
    /// use.
    ///
    /// The instances of successive sets are matched by their id, and of several instances with one
    /// id in a set only the last counts. An instance that cannot be called, for example because its
    /// address is `0.0.0.0:50051`, is left out; a warning is logged, and errors of calls say why.
    ///
    /// Error messages contain the name: "no instances under NAME".
    pub fn new<S>(name: impl Into<String>, sets: S) -> Self
    where
        S: Stream<Item = Vec<Instance>> + Send + 'static,
    {
        let name: Arc<str> = name.into().into();
        let range = Arc::clone(&name);
        let snapshots = sets.map(move |set| Arc::new(Snapshot::of(Arc::clone(&range), set)));
        Self {
            name,
            ttl: None,
            snapshots: Box::pin(snapshots),
        }
    }

    /// Creates a source from a stream of snapshots of registrations with the given TTL.
    pub(crate) fn from_snapshots<S>(name: Arc<str>, ttl: Duration, snapshots: S) -> Self
    where
        S: Stream<Item = Arc<Snapshot>> + Send + 'static,
    {
        Self {
            name,
            ttl: Some(ttl),
            snapshots: Box::pin(snapshots),
        }
    }

    /// Creates a source of one set that never changes. The instances are checked as by
    /// [`Source::new`].
    pub fn fixed(instances: impl IntoIterator<Item = Instance>) -> Self {
        let set = instances.into_iter().collect();
        Self::new("the fixed list", futures::stream::iter([set]))
    }

    /// Creates a source of one set of addresses, `host:port` or `unix:/path`, that never changes.
    ///
    /// [`BalancedChannel::from_endpoints`](crate::BalancedChannel::from_endpoints) does the same for
    /// a channel with the default settings. An address that is listed twice is one endpoint. The
    /// list may be empty; calls then fail after
    /// [`ready_timeout`](super::BalancedChannelBuilder::ready_timeout).
    ///
    /// ```no_run
    /// # async fn example() -> goo_etcd::Result<()> {
    /// use goo_etcd::balance::Source;
    /// use goo_etcd::{BalancedChannel, TlsConfig};
    ///
    /// let source = Source::addresses(["greeter-1.example:50051", "greeter-2.example:50051"])?;
    /// let channel = BalancedChannel::builder(source)
    ///     .tls(TlsConfig::default())
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid), which quotes the address: for an address of
    /// another form, such as one with a scheme or without a port, and for one that no client can
    /// call, such as `0.0.0.0:50051`. Names are not looked up here.
    pub fn addresses<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self> {
        let instances = addresses
            .into_iter()
            .map(|address| {
                let instance = Instance::new("", address);
                validate_address(&instance.address)?;
                Ok(instance)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self::fixed(instances))
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn ttl(&self) -> Option<Duration> {
        self.ttl
    }

    /// The snapshots. A panic of the source is the last item, as its text.
    pub(super) fn into_stream(
        self,
    ) -> impl Stream<Item = Result<Arc<Snapshot>, String>> + Send + Unpin {
        let snapshots = AssertUnwindSafe(self.snapshots).catch_unwind();
        snapshots.map(|snapshot| snapshot.map_err(|payload| panics::text(&*payload)))
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
