//! The settings of a directory.

use std::path::PathBuf;

use super::handle::Directory;
use super::open::open;
use super::registry::{WatchKey, WatchRegistry};
use crate::client::Client;
use crate::error::Result;
use crate::format::{EtcdNaming, Layout};
use crate::instance::validate_service;
use crate::runtime;

impl Directory {
    /// Watches `service` under the default prefix (`services`) in the default format,
    /// [`EtcdNaming`].
    ///
    /// # Errors
    ///
    /// Same as [`DirectoryBuilder::watch`].
    pub async fn watch(client: &Client, service: impl Into<String>) -> Result<Self> {
        Self::builder(client, service).watch().await
    }

    /// Starts the settings of a directory of `service`.
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
    /// The key prefix of the services. Default: the prefix of the format (`services` for
    /// [`EtcdNaming`]).
    ///
    /// The prefix may be empty. [`format`](crate::format) says how it is joined with the service.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// The format of the instances. Default: [`EtcdNaming`].
    ///
    /// Takes any [`Format`](crate::format::Format), also an `Arc<dyn Format>` that is chosen at run
    /// time. A [`Layout`] adds a prefix; [`prefix`](Self::prefix) takes precedence over it.
    pub fn format(mut self, layout: impl Into<Layout>) -> Self {
        self.layout = layout.into();
        self
    }

    /// Reads another format as well, or the same format under another prefix. May be called several
    /// times. The instances are merged by address, see
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

    /// Keeps the last known instances in a file in this folder, and starts with them if etcd does
    /// not respond. Default: no file.
    ///
    /// With such a file, etcd has 500 ms for the first list. If it does not respond in time, the
    /// directory serves the instances in the file, which are [`Stale`](crate::Freshness::Stale)
    /// since the file was written, and becomes live as soon as etcd responds. The client must not
    /// wait for etcd either, so create it with [`Client::connect_lazy`].
    ///
    /// While the directory is live, it writes the file at the start and after changes, at most once
    /// a second. A damaged file and a failed write cause a warning and are ignored otherwise. The
    /// name of a file depends on the client's name, the format and the range of keys, so processes
    /// that use one name for one cluster may share a folder. The file holds the same data as etcd,
    /// readable by its owner only.
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

    /// Lists the service and starts to watch it. When this returns, the first snapshot is there.
    ///
    /// If a directory of the same client with the same settings exists, the result is another
    /// handle to it, and its snapshot may be stale. Settings are the same if the service, the
    /// prefixes, the formats and the cache folder are. A format that holds values equals only
    /// itself and its clones.
    ///
    /// Must be called within a Tokio runtime, because a task per format follows etcd. When that
    /// runtime shuts down, another runtime in which the same directory was built takes over.
    /// Without another one, the snapshot is stale from then on. Dropping the future before it
    /// returns leaves nothing behind.
    ///
    /// # Errors
    ///
    /// - [`Error::Invalid`](crate::Error::Invalid) for a service name that is empty or contains a
    ///   `/`, and for a cache folder that cannot be created.
    /// - The error of the first list of any format: etcd's, such as a missing permission, or a
    ///   timeout if etcd does not respond.
    ///
    /// Later failures make the snapshot [`Stale`](crate::Freshness::Stale) instead.
    pub async fn watch(self) -> Result<Directory> {
        runtime::require(|| format!("watching {:?}", self.service))?;
        let Self {
            client,
            service,
            prefix,
            layout,
            others,
            cache_dir,
        } = self;
        validate_service(&service)?;
        let mut layouts = vec![layout.override_prefix(prefix)];
        layouts.extend(others);
        for layout in &layouts {
            validate_service(layout.service_name(&service))?;
        }
        let registry = WatchRegistry::of(&client);
        let key = WatchKey::new(&service, &layouts, cache_dir.as_ref());
        let open = || open(client, service, layouts, cache_dir);
        Ok(Directory::new(registry.get_or_open(key, open).await?))
    }
}
