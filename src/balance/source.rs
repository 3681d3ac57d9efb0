//! Where a channel's endpoints come from.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};

use crate::error::Result;
use crate::instance::{Instance, validate_address};
use crate::snapshot::Snapshot;

/// A stream of whole sets of instances, each replacing the one before.
///
/// A [`Directory`](crate::Directory) is one; [`Source::new`] takes any stream, and [`Source::fixed`] a list.
pub struct Source {
    name: Arc<str>,
    /// How long a registration in it lasts when it is not renewed: it may end though its server lives.
    /// `None`: its sets are not made of such.
    ttl: Option<Duration>,
    snapshots: Pin<Box<dyn Stream<Item = Arc<Snapshot>> + Send>>,
}

impl Source {
    /// A source of sets that come from anywhere. The name appears in errors: "no instances under
    /// NAME". When the stream ends, the last set stays.
    ///
    /// Instances are told apart by their id.
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

    /// A source of snapshots. `ttl` is how long a registration lasts when it is not renewed.
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

    /// A set that does not change.
    pub fn fixed(instances: impl IntoIterator<Item = Instance>) -> Self {
        let set = instances.into_iter().collect();
        Self::new("the fixed list", futures::stream::iter([set]))
    }

    /// The addresses of a set that does not change: `host:port` or `unix:/path`.
    pub(super) fn addresses<A: Into<String>>(
        addresses: impl IntoIterator<Item = A>,
    ) -> Result<Self> {
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

    pub(super) fn into_stream(self) -> impl Stream<Item = Arc<Snapshot>> + Send + Unpin {
        self.snapshots
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
