//! A service's live snapshot.
//!
//! A [`Directory`] lists a service's instances in etcd and then watches them, and publishes what it
//! knows as whole, immutable [`Snapshot`]s. Consumers look at the newest and compare it with what
//! they acted on; missing one costs nothing.
//!
//! # Recovery
//!
//! When the watch is lost (etcd restarted, the network cut, the history compacted) the last
//! snapshot stays in use, marked [`Stale`](Freshness::Stale) with the time and the reason. The
//! directory lists anew, after 50 ms at first and up to a second between attempts, for as long as
//! it takes, and the whole list replaces what was known: an instance that left meanwhile is gone, one that
//! stayed is untouched. It never ends and never gives up while a handle to it is held, except when
//! its client is closed.

mod driver;
mod merge;
#[cfg(test)]
mod model;
mod snapshot;
mod state;

use std::fmt;
use std::sync::Arc;

use futures::Stream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) use snapshot::{Difference, Instances, differences};
pub use snapshot::{Freshness, InstanceKey, Snapshot};

use crate::format::{EtcdNaming, Layout};
use crate::instance::validate_service;
use crate::{Client, Result};

/// The live list of a service's instances. Cheap to clone; clones share one watch.
///
/// Dropping the last clone, and the last stream made from one, ends the watch.
///
/// ```no_run
/// # async fn example() -> goo_etcd::Result<()> {
/// use goo_etcd::{Client, Config, Directory};
///
/// let client = Client::new("main", Config::builder().endpoints(["localhost:2379"]).build()?).await?;
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
/// A directory may read several formats under several prefixes ([`DirectoryBuilder::also`]), which is
/// how a fleet moves from one to another without a flag day. Each is listed and watched on its own:
/// one that fails is stale and the others go on. What they show is put together by address:
///
/// - An address is shown once, under the address as its key, for as long as any of them has it. So a
///   server that moves from one format to another with both written in between keeps its connections.
/// - Of what they say about it, the first named format counts, except that the entry written last says
///   whether it drains. A server that leaves drains until it is gone from all of them, however
///   late one is; and what a killed one left behind says nothing of the next at its address.
/// - Within one format the entry written last counts.
#[derive(Clone)]
pub struct Directory {
    inner: Arc<Inner>,
}

struct Inner {
    service: String,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// One for each source.
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Directory {
    /// Follows `service` under the default prefix (`services`) in the default format.
    ///
    /// # Errors
    ///
    /// As [`DirectoryBuilder::build`].
    pub async fn watch(client: &Client, service: impl Into<String>) -> Result<Self> {
        Self::builder(client, service).build().await
    }

    /// A directory of `service` with settings of its own.
    pub fn builder(client: &Client, service: impl Into<String>) -> DirectoryBuilder {
        DirectoryBuilder {
            client: client.clone(),
            service: service.into(),
            prefix: None,
            layout: EtcdNaming.into(),
            others: Vec::new(),
        }
    }

    /// The service that it follows.
    pub fn service(&self) -> &str {
        &self.inner.service
    }

    /// What is known now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.inner.snapshots.borrow())
    }

    /// Snapshots as they come: the present one at once, then each newer one.
    ///
    /// A consumer that is slow misses those in between, never the newest. The stream holds the
    /// directory; it ends only when the client is closed.
    pub fn changes(&self) -> impl Stream<Item = Arc<Snapshot>> + Send + Unpin + 'static {
        let mut receiver = self.inner.snapshots.clone();
        receiver.mark_changed();
        let directory = self.clone();
        Box::pin(futures::stream::unfold(
            (receiver, directory),
            |(mut receiver, directory)| async move {
                receiver.changed().await.ok()?;
                let snapshot = Arc::clone(&receiver.borrow_and_update());
                Some((snapshot, (receiver, directory)))
            },
        ))
    }
}

impl fmt::Debug for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory")
            .field("service", &self.inner.service)
            .field("snapshot", &self.snapshot())
            .finish_non_exhaustive()
    }
}

/// Settings of a [`Directory`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build`"]
pub struct DirectoryBuilder {
    client: Client,
    service: String,
    prefix: Option<String>,
    layout: Layout,
    others: Vec<Layout>,
}

impl DirectoryBuilder {
    /// The prefix under which services stand; the format's own unless set (`services`).
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// The format that instances are read in; [`EtcdNaming`] unless set. A [`Layout`] says where as
    /// well; [`prefix`](Self::prefix) goes before its own. Any [`Format`](crate::format::Format) is one,
    /// also an `Arc<dyn Format>` that is chosen at run time.
    pub fn format(mut self, layout: impl Into<Layout>) -> Self {
        self.layout = layout.into();
        self
    }

    /// Reads another format as well, or the same one under another prefix; may be called several
    /// times. What they show is put together by address, see
    /// [several formats at once](Directory#several-formats-at-once).
    ///
    /// ```no_run
    /// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
    /// use goo_etcd::Directory;
    /// use goo_etcd::format::{GoZero, Kratos, Layout};
    ///
    /// let directory = Directory::builder(&client, "user")
    ///     .also(Kratos)
    ///     .also(Layout::new(GoZero).service("user.rpc"))
    ///     .build()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn also(mut self, layout: impl Into<Layout>) -> Self {
        self.others.push(layout.into());
        self
    }

    /// Lists the service and starts to follow it. When this returns, the first snapshot is there.
    ///
    /// Must be called within a Tokio runtime: a task for each format follows etcd. Dropping the
    /// future leaves nothing behind.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for a service name that is empty or has a `/`;
    /// whatever etcd answers to the first list of any of the formats, such as a missing permission; a
    /// time-out when it does not answer. Later failures are not errors but [`Freshness::Stale`].
    pub async fn build(self) -> Result<Directory> {
        validate_service(&self.service)?;
        let mut layouts = vec![self.layout.under(self.prefix)];
        layouts.extend(self.others);
        let several = layouts.len() > 1;
        let mut machines = Vec::with_capacity(layouts.len());
        for layout in layouts {
            let service = layout.service_here(&self.service).to_owned();
            validate_service(&service)?;
            let machine = state::Machine::new(layout.format, layout.prefix, service);
            machines.push(if several {
                machine.by_address()
            } else {
                machine
            });
        }
        let beginnings = machines
            .iter_mut()
            .map(|machine| driver::begin(&self.client, machine));
        let watches = futures::future::try_join_all(beginnings).await?;
        let first = machines.iter().map(state::Machine::snapshot).collect();
        let (sources, snapshots) = merge::Sources::begin(first);
        let tasks = machines
            .into_iter()
            .zip(watches)
            .zip(sources)
            .map(|((machine, watching), source)| {
                tokio::spawn(driver::follow(
                    self.client.clone(),
                    machine,
                    watching,
                    source,
                ))
            })
            .collect();
        Ok(Directory {
            inner: Arc::new(Inner {
                service: self.service,
                snapshots,
                tasks,
            }),
        })
    }
}
