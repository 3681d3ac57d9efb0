//! A service's live snapshot.
//!
//! A [`Directory`] lists a service's instances in etcd and then watches them, and publishes what it
//! knows as whole, immutable [`Snapshot`]s. Consumers look at the newest and compare it with what
//! they acted on; missing one costs nothing.
//!
//! # Recovery
//!
//! When the watch is lost (etcd restarted, the network cut, the history compacted) the last
//! snapshot stays in use, marked [`Stale`](crate::Freshness::Stale) with the time and the reason. The
//! directory lists anew, at a random moment of the first half second and then up to a second between
//! attempts, for as long as it takes, and the whole list replaces what was known: an instance that left meanwhile is gone, one that
//! stayed is untouched. It never ends and never gives up while a handle to it is held, except when
//! its client is closed.

mod cache;
mod channel;
mod discover;
mod driver;
mod merge;
#[cfg(test)]
mod model;
mod shared;
mod state;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::Stream;
use tokio::runtime;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

pub use discover::Discovery;

use crate::client::Client;
use crate::error::Result;
use crate::format::{EtcdNaming, Layout};
use crate::instance::validate_service;
use crate::snapshot::Snapshot;

/// The live list of a service's instances. Cheap to clone; clones share one watch, and so do directories
/// that are built of the same client with the same settings, however many channels use them.
///
/// Dropping the last of them, and the last stream made from one, ends the watch.
///
/// ```no_run
/// # async fn example() -> goo_etcd::Result<()> {
/// use goo_etcd::{Client, Config, Directory};
///
/// let client = Client::connect("main", Config::builder().endpoints(["localhost:2379"]).build()?).await?;
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
/// A directory may read several formats under several prefixes ([`DirectoryBuilder::and_format`]), which is
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
    /// The longest time to live that is usual in its formats.
    ttl: Duration,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// One for each source.
    followers: Vec<Arc<driver::Follower>>,
    /// One for each of them in each runtime that looks: one follows, and the others wait for its end.
    tasks: Mutex<HashMap<runtime::Id, Vec<AbortOnDropHandle<()>>>>,
}

impl Inner {
    /// Has etcd be followed from this runtime as well, should the one end from which it is.
    fn follow_from_here(&self) {
        let mut tasks = self.tasks();
        // Also those of a runtime that had this one's id before.
        tasks.retain(|_, tasks| !has_ended(tasks));
        tasks
            .entry(runtime::Handle::current().id())
            .or_insert_with(|| {
                let followers = self.followers.iter().map(Arc::clone);
                let tasks = followers.map(|follower| tokio::spawn(follower.follow()));
                tasks.map(AbortOnDropHandle::new).collect()
            });
    }

    /// Whether it will still hear of changes: not when its client was closed, or the runtimes ended that
    /// it ran on.
    fn is_followed(&self) -> bool {
        self.tasks().values().any(|tasks| !has_ended(tasks))
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<runtime::Id, Vec<AbortOnDropHandle<()>>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn has_ended(tasks: &[AbortOnDropHandle<()>]) -> bool {
    tasks.iter().any(AbortOnDropHandle::is_finished)
}

impl Directory {
    /// Follows `service` under the default prefix (`services`) in the default format.
    ///
    /// # Errors
    ///
    /// As [`DirectoryBuilder::watch`].
    pub async fn watch(client: &Client, service: impl Into<String>) -> Result<Self> {
        Self::builder(client, service).watch().await
    }

    /// A directory of `service` with settings of its own.
    pub fn builder(client: &Client, service: impl Into<String>) -> DirectoryBuilder {
        DirectoryBuilder {
            client: client.clone(),
            service: service.into(),
            prefix: None,
            layout: EtcdNaming.into(),
            others: Vec::new(),
            cache_dir: None,
        }
    }

    /// The service that it follows.
    pub fn service(&self) -> &str {
        &self.inner.service
    }

    /// How long a registration usually lasts there when it is not renewed.
    pub(crate) fn ttl(&self) -> Duration {
        self.inner.ttl
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
#[must_use = "a builder does nothing until `watch`"]
pub struct DirectoryBuilder {
    client: Client,
    service: String,
    prefix: Option<String>,
    layout: Layout,
    others: Vec<Layout>,
    cache_dir: Option<PathBuf>,
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
    ///     .and_format(Kratos)
    ///     .and_format(Layout::new(GoZero).service("user.rpc"))
    ///     .watch()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn and_format(mut self, layout: impl Into<Layout>) -> Self {
        self.others.push(layout.into());
        self
    }

    /// Keeps the last known instances in a file of this folder, and begins with them when etcd does not
    /// answer: off unless set.
    ///
    /// With such a file, etcd is given half a second for the first list. Without an answer in that time
    /// the directory serves what the file has, [`Stale`](crate::Freshness::Stale) since it was written, and is
    /// live as soon as etcd is there. For that the client must not wait for etcd either:
    /// [`Client::connect_lazy`].
    ///
    /// It is written at once and after changes, at most once a second, while etcd is followed. A file that
    /// is damaged is ignored, with a warning; so is a failure to write. Files are told apart by the
    /// client's name, the format and the range of keys, so that processes may share a folder that use
    /// one name for one cluster. They hold what etcd does of the instances, readable by their owner alone.
    ///
    /// ```no_run
    /// # async fn example() -> goo_etcd::Result<()> {
    /// use goo_etcd::{BalancedChannel, Client, Config, Directory};
    ///
    /// let client = Client::connect_lazy("main", Config::default())?;
    /// let directory = Directory::builder(&client, "greeter")
    ///     .cache_dir("/var/cache/my-service")
    ///     .watch()
    ///     .await?;
    /// let channel = BalancedChannel::builder(directory).build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn cache_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(folder.into());
        self
    }

    /// Lists the service and starts to follow it. When this returns, the first snapshot is there.
    ///
    /// Where a directory of the same client with the same settings is held already, this is another handle
    /// to it: what it shows then may be stale. Settings are the same if the service, the prefixes, the
    /// formats and the cache's folder are; a format that holds values of its own is like itself and its
    /// clones alone.
    ///
    /// Must be called within a Tokio runtime: a task for each format follows etcd. When a runtime ends in
    /// which it did, another goes on in which the same directory was built; without one, what is shown is
    /// stale from then on. Dropping the future leaves nothing behind.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for a service name that is empty or has a `/`, and for
    /// a cache's folder that cannot be made;
    /// whatever etcd answers to the first list of any of the formats, such as a missing permission; a
    /// time-out when it does not answer. Later failures are not errors but [`Freshness::Stale`](crate::Freshness::Stale).
    pub async fn watch(self) -> Result<Directory> {
        validate_service(&self.service)?;
        let mut layouts = vec![self.layout.under(self.prefix)];
        layouts.extend(self.others);
        for layout in &layouts {
            validate_service(layout.service_here(&self.service))?;
        }
        let (client, service, cache_dir) = (self.client, self.service, self.cache_dir);
        let key = shared::Key::new(&client, &service, &layouts, cache_dir.as_ref());
        let inner = shared::join(key, || open(client, service, layouts, cache_dir)).await?;
        Ok(Directory { inner })
    }
}

async fn open(
    client: Client,
    service: String,
    layouts: Vec<Layout>,
    cache_dir: Option<PathBuf>,
) -> Result<Arc<Inner>> {
    let several = layouts.len() > 1;
    let ttls = layouts.iter().map(|layout| layout.format.default_ttl());
    let ttl = ttls.max().unwrap_or_default();
    let mut machines = Vec::with_capacity(layouts.len());
    let mut caches = Vec::with_capacity(layouts.len());
    for layout in layouts {
        let here = layout.service_here(&service).to_owned();
        let machine = state::Machine::new(layout.format, layout.prefix, here);
        let machine = if several {
            machine.by_address()
        } else {
            machine
        };
        let cache = cache_dir.as_ref();
        let cache = cache.map(|folder| cache::Cache::of(&machine, client.name(), folder));
        caches.push(cache.transpose()?);
        machines.push(machine);
    }
    let beginnings = machines
        .iter_mut()
        .zip(&caches)
        .map(|(machine, cache)| driver::begin_or_restore(&client, machine, cache.as_ref()));
    let watches = futures::future::try_join_all(beginnings).await?;
    let first = machines.iter_mut().map(state::Machine::snapshot).collect();
    let (sources, snapshots) = merge::Sources::begin(first);
    let followers = machines
        .into_iter()
        .zip(watches)
        .zip(sources)
        .zip(caches)
        .map(|(((machine, watching), source), cache)| {
            driver::Follower::new(client.clone(), machine, watching, source, cache)
        })
        .collect();
    Ok(Arc::new(Inner {
        service,
        ttl,
        snapshots,
        followers,
        tasks: Mutex::default(),
    }))
}
