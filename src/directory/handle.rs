//! The user's handle to a directory.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio_stream::wrappers::WatchStream;

use super::service_watch::ServiceWatch;
use crate::snapshot::Snapshot;

/// The live list of a service's instances.
///
/// Cloning is cheap. Clones share one watch, and so do directories that are built from the same
/// client with the same settings, even if many channels use them. The watch ends when the last of
/// them and the last stream made from them are dropped.
///
/// ```no_run
/// # async fn example() -> goo_etcd::Result<()> {
/// use goo_etcd::{Client, Config, Directory};
///
/// let config = Config::builder().endpoints(["localhost:2379"]).build()?;
/// let client = Client::connect("main", config).await?;
/// let directory = Directory::watch(&client, "greeter").await?;
/// for instance in directory.snapshot().instances() {
///     println!("{} with weight {}", instance.address, instance.weight);
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Several formats at once
///
/// A directory may read several formats under several prefixes
/// ([`DirectoryBuilder::and_format`](crate::DirectoryBuilder::and_format)), so that a fleet can
/// move from one format to another without a flag day. Each format is listed and watched on its
/// own; if one fails, it is stale and the others go on. Their instances are merged by address:
///
/// - An address is one instance while any format has it, and the address is its key. So a server
///   that moves from one format to another keeps its connections if it writes both in between.
/// - The first named format that has an address describes it. Only the draining mark comes from the
///   entry that was written last. A server that drains does so until its entries are gone from all
///   formats, even if one of them is late. The mark of a killed server does not apply to the next
///   server at its address.
/// - If one format has several entries for an address, the entry that was written last counts.
#[derive(Clone)]
#[must_use = "dropping the last handle to a directory ends its watch"]
pub struct Directory {
    watch: Arc<ServiceWatch>,
}

impl Directory {
    pub(super) fn new(watch: Arc<ServiceWatch>) -> Self {
        Self { watch }
    }

    /// The name of the service.
    pub fn service(&self) -> &str {
        self.watch.service()
    }

    /// How long a registration usually lasts after its last renewal: the longest default TTL of the
    /// directory's formats.
    pub(crate) fn ttl(&self) -> Duration {
        self.watch.ttl()
    }

    /// The latest snapshot.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.watch.snapshots().borrow())
    }

    /// A stream of snapshots: the present one first, then each newer one.
    pub fn changes(&self) -> Snapshots {
        Snapshots {
            stream: WatchStream::new(self.watch.snapshots().clone()),
            directory: self.clone(),
        }
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory")
            .field("service", &self.service())
            .field("snapshot", &self.snapshot())
            .finish_non_exhaustive()
    }
}

/// A stream of a directory's snapshots, made by [`Directory::changes`].
///
/// A slow consumer misses snapshots in between, never the newest. The stream holds the directory,
/// and ends only when the client is closed.
#[must_use = "streams do nothing unless polled"]
pub struct Snapshots {
    stream: WatchStream<Arc<Snapshot>>,
    directory: Directory,
}

impl Stream for Snapshots {
    type Item = Arc<Snapshot>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.stream).poll_next(cx)
    }
}

impl fmt::Debug for Snapshots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshots")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}
