//! The settings of a registrar, and their validation.

use std::time::Duration;

use super::handle::Registrar;
use super::settings::RegistrarSettings;
use crate::client::Client;
use crate::error::{Error, Result};
use crate::format::{EtcdNaming, Layout};

/// The shortest TTL that etcd grants with its default election timeout of 1 s: one and a half times
/// that, rounded up to seconds (`minTTL` in etcd's `server/etcdserver/server.go`). etcd silently
/// raises a shorter one.
const MIN_TTL: Duration = Duration::from_secs(2);

/// The longest TTL that etcd grants (`MaxLeaseTTL` in etcd's `server/lease/lessor.go`).
const MAX_TTL: Duration = Duration::from_secs(9_000_000_000);

/// The default of [`RegistrarBuilder::leave_grace`]. A watch brings the draining mark to clients
/// within milliseconds; a second leaves room for slow ones.
const DEFAULT_LEAVE_GRACE: Duration = Duration::from_secs(1);

impl Registrar {
    /// A registrar with the default format, prefix (`services`) and TTL (10 s).
    pub fn new(client: &Client) -> Self {
        Self::builder(client).start()
    }

    /// A builder with the default settings.
    pub fn builder(client: &Client) -> RegistrarBuilder {
        RegistrarBuilder {
            client: client.clone(),
            prefix: None,
            ttl: None,
            layout: EtcdNaming.into(),
            more_layouts: Vec::new(),
            leave_grace: DEFAULT_LEAVE_GRACE,
        }
    }
}

/// The settings of a [`Registrar`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct RegistrarBuilder {
    client: Client,
    prefix: Option<String>,
    ttl: Option<Duration>,
    layout: Layout,
    more_layouts: Vec<Layout>,
    leave_grace: Duration,
}

impl RegistrarBuilder {
    /// The key prefix of all services. Default: the format's own (`services`).
    ///
    /// The prefix may be empty. [`format`](crate::format) says how it is joined with the service.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// The TTL of the leases, which is how long a crashed process stays registered: whole seconds,
    /// at least 2. Default: the format's own (10 s). A lease is renewed after a third of its TTL.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// The format in which instances are written. Default: [`EtcdNaming`].
    ///
    /// Accepts any [`Format`](crate::format::Format), also an `Arc<dyn Format>` chosen at run time,
    /// and a [`Layout`], which also sets the location. [`prefix`](Self::prefix) takes precedence
    /// over the layout's prefix.
    pub fn format(mut self, layout: impl Into<Layout>) -> Self {
        self.layout = layout.into();
        self
    }

    /// Adds a format in which each instance is written as well; may be called several times. The
    /// same format may be added with another prefix.
    ///
    /// All keys of an instance share one lease, and are written and deleted in one transaction. The
    /// first format determines the default TTL.
    ///
    /// ```no_run
    /// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
    /// use goo_etcd::format::{EtcdNaming, Kratos};
    /// use goo_etcd::Registrar;
    ///
    /// // For clients that still read kratos' format, and for those that read the default one.
    /// let registrar = Registrar::builder(&client)
    ///     .format(Kratos)
    ///     .and_format(EtcdNaming)
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn and_format(mut self, layout: impl Into<Layout>) -> Self {
        self.more_layouts.push(layout.into());
        self
    }

    /// How long [`Registration::leave_on`](crate::Registration::leave_on) keeps an instance in etcd
    /// after marking it as draining, so that clients can turn to others. Default: 1 s.
    pub fn leave_grace(mut self, grace: Duration) -> Self {
        self.leave_grace = grace;
        self
    }

    /// Builds the registrar. Its tasks start with the first registration, on the Tokio runtime of
    /// that call.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a TTL that etcd cannot grant.
    pub fn build(self) -> Result<Registrar> {
        let ttl = self.effective_ttl();
        let invalid = |reason| Err(Error::invalid("ttl", format!("{ttl:?}"), reason));
        if ttl < MIN_TTL {
            return invalid("etcd grants no lease of less than 2 s");
        }
        if ttl > MAX_TTL {
            return invalid("etcd grants no lease of more than 9,000,000,000 s");
        }
        if ttl.subsec_nanos() != 0 {
            return invalid("etcd counts a lease in whole seconds");
        }
        Ok(self.start())
    }

    fn effective_ttl(&self) -> Duration {
        let default_ttl = || self.layout.format.default_ttl();
        self.ttl.unwrap_or_else(default_ttl)
    }

    fn start(self) -> Registrar {
        let ttl = self.effective_ttl();
        let mut layouts = vec![self.layout.override_prefix(self.prefix)];
        layouts.extend(self.more_layouts);
        let settings = RegistrarSettings {
            ttl,
            layouts,
            leave_grace: self.leave_grace,
        };
        Registrar::from_settings(self.client, settings)
    }
}
