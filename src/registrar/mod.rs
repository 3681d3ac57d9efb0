//! Keeps instances registered in etcd.
//!
//! A [`Registrar`] holds what should be in etcd and keeps making it so: it grants a lease, puts the
//! instances under it, and renews it at a third of its time to live. When the lease is lost, etcd
//! restarts or the network is cut, it starts over, with jitter, for as long as its process lives.
//!
//! One lease and one stream of renewals serve the instances of a registrar, up to a hundred keys; then the
//! next lease begins.
//!
//! # What others do to the keys
//!
//! Each key is watched. One that was deleted or overwritten by hand is put back at once. One that another
//! process has registered, under a lease of its own, is left to it, for the later registration wins:
//! this one is then [`Superseded`](RegistrationState::Superseded), and is back when the other's is gone. Two
//! that recover at the same time take nothing from each other either; the first to arrive has it.
//! Each write compares with what was read, so that one that is late undoes nothing. It takes the right to
//! read and to write the keys.
//!
//! # Leaving
//!
//! [`Registration::leave_on`] is the way for a server: on the signal the instance is marked as
//! draining, which makes clients stop choosing it; after a grace period its key goes, and then the
//! server may stop accepting. A registration that is dropped without that is withdrawn at once,
//! best effort; a process that is killed disappears with its lease, after its time to live at most.

mod driver;
mod executor;
mod key_watch;
mod readiness;
mod registration;
mod state;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::Stream;
#[cfg(feature = "health")]
pub use readiness::serving;
pub use registration::Registration;
pub use state::RegistrationState;
use state::{Claim, Pairs};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::format::{EtcdNaming, Layout};
use crate::instance::Instance;

/// The shortest time to live that etcd grants with its default election timeout of 1 s: one and a
/// half times that, in whole seconds (`minTTL` in etcd's `server/etcdserver/server.go`). It grants
/// more than asked for below it, silently.
const MIN_TTL: Duration = Duration::from_secs(2);

/// The longest time to live that etcd grants (`MaxLeaseTTL` in etcd's `server/lease/lessor.go`).
const MAX_TTL: Duration = Duration::from_secs(9_000_000_000);

/// How many keys share a lease. They go together when it ends, in one revision of etcd; what etcd does
/// in one transaction at a client's request is 128 operations (`--max-txn-ops`), and this stays below.
const KEYS_PER_LEASE: usize = 100;

/// How long a leaving instance stays in etcd, marked as draining, unless configured. A watch brings
/// the mark to clients within milliseconds; a second leaves room for slow ones.
const LEAVE_GRACE: Duration = Duration::from_secs(1);

/// Keeps instances registered. Cheap to clone; clones share one lease.
///
/// Dropping the last clone, and the last [`Registration`] made through it, withdraws what is
/// left and ends its task.
///
/// ```no_run
/// # async fn example(client: goo_etcd::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use goo_etcd::{Instance, Registrar};
///
/// let registrar = Registrar::new(&client);
/// let registration = registrar
///     .register(Instance::new("greeter", "10.0.0.5:50051"))
///     .await?;
/// // The service runs; when it is to end:
/// registration.deregister().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Registrar {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    ttl: Duration,
    /// One for each lease.
    parts: Mutex<Vec<Arc<driver::Shared>>>,
    layouts: Vec<Layout>,
    leave_grace: Duration,
    request_timeout: Duration,
}

impl Inner {
    /// The key and the value of an instance in each format.
    fn write(&self, instance: &Instance) -> Result<Pairs> {
        let pairs: Pairs = self
            .layouts
            .iter()
            .map(|layout| layout.write(instance))
            .collect::<Result<_>>()?;
        for (at, (key, _)) in pairs.iter().enumerate() {
            if pairs[..at].iter().any(|(other, _)| other == key) {
                let reason = "two of the registrar's formats write it; give one another prefix";
                return Err(Error::invalid("key", key, reason));
            }
        }
        Ok(pairs)
    }

    /// Registers with the part that has to do with these keys, or with one that has room.
    fn register(
        &self,
        pairs: Pairs,
        draining: bool,
        ready: bool,
    ) -> Result<(Arc<driver::Shared>, state::Ticket)> {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut leaving, mut roomy) = (None, None);
        for part in parts.iter() {
            let reconciler = part.lock();
            match reconciler.claim(&pairs) {
                Claim::Wanted(key) => return Err(Error::InstanceAlreadyRegistered { key }),
                Claim::Leaving => leaving = Some(Arc::clone(part)),
                Claim::None if reconciler.len() + pairs.len() <= KEYS_PER_LEASE => {
                    roomy.get_or_insert_with(|| Arc::clone(part));
                }
                Claim::None => {}
            }
        }
        let part = leaving.or(roomy).unwrap_or_else(|| {
            let part = Arc::new(driver::Shared::new());
            // Owned through `abandon`, which ends it.
            let work = driver::reconcile(Arc::clone(&part), self.client.clone(), self.ttl);
            tokio::spawn(work);
            parts.push(Arc::clone(&part));
            part
        });
        let ticket = part.want(|reconciler| reconciler.register(pairs, draining, ready))?;
        Ok((part, ticket))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let parts = self.parts.get_mut().unwrap_or_else(PoisonError::into_inner);
        for part in parts {
            // Not aborted: it tries to clean up, once, and then ends by itself.
            part.abandon();
        }
    }
}

impl Registrar {
    /// A registrar with the default format, prefix (`services`) and time to live (10 s).
    pub fn new(client: &Client) -> Self {
        Self::builder(client).start()
    }

    /// A registrar with settings of its own.
    pub fn builder(client: &Client) -> RegistrarBuilder {
        RegistrarBuilder {
            client: client.clone(),
            prefix: None,
            ttl: None,
            layout: EtcdNaming.into(),
            others: Vec::new(),
            leave_grace: LEAVE_GRACE,
        }
    }

    /// Registers an instance. When this returns it is in etcd, and it is kept there for as long as
    /// the registration is held.
    ///
    /// Dropping the future withdraws the instance.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an instance that cannot be registered, or not in this format;
    /// [`Error::InstanceAlreadyRegistered`]; etcd's answer when it refuses (a missing permission,
    /// an authentication that failed); and when etcd cannot be reached within the client's request
    /// time-out, the last failure. Then it is not registered: to keep trying, use
    /// [`register_eventually`](Self::register_eventually).
    pub async fn register(&self, instance: Instance) -> Result<Registration> {
        let (registration, generation) = self.want(instance, true)?;
        registration.wait_written(generation).await?;
        Ok(registration)
    }

    /// Registers an instance as soon as etcd can be reached, however long that takes. Returns at
    /// once; [`Registration::state`] tells how far it is.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] and [`Error::InstanceAlreadyRegistered`], before anything is sent.
    pub fn register_eventually(&self, instance: Instance) -> Result<Registration> {
        self.want(instance, true)
            .map(|(registration, _)| registration)
    }

    /// Registers an instance when `ready` says `true`, withdraws it when it says `false`, and so on.
    /// Returns at once; until then it is [`Unready`](RegistrationState::Unready).
    ///
    /// When `ready` ends, the last that it said holds. The stream is dropped when the instance is
    /// withdrawn, also while etcd cannot be reached, and when the client was closed.
    ///
    /// ```no_run
    /// # async fn example(
    /// #     registrar: goo_etcd::Registrar,
    /// #     warmed_up: impl Future<Output = ()> + Send + 'static,
    /// # ) -> goo_etcd::Result<()> {
    /// use goo_etcd::Instance;
    ///
    /// // Once a future has ended.
    /// let ready = futures::stream::once(async {
    ///     warmed_up.await;
    ///     true
    /// });
    /// let registration = registrar
    ///     .register_while_ready(Instance::new("greeter", "10.0.0.5:50051"), ready)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// While the server's own `grpc.health.v1` says that it serves: `goo_etcd::serving` (feature `health`) is
    /// such a stream.
    ///
    /// # Errors
    ///
    /// As for [`register_eventually`](Self::register_eventually).
    pub fn register_while_ready(
        &self,
        instance: Instance,
        ready: impl Stream<Item = bool> + Send + 'static,
    ) -> Result<Registration> {
        let (registration, _) = self.want(instance, false)?;
        registration.follow(ready);
        Ok(registration)
    }

    fn want(&self, instance: Instance, ready: bool) -> Result<(Registration, u64)> {
        instance.validate()?;
        let pairs = self.inner.write(&instance)?;
        let keys = pairs.iter().map(|(key, _)| key.clone()).collect();
        let (part, ticket) = self.inner.register(pairs, instance.draining, ready)?;
        let generation = ticket.generation;
        let registration = Registration::new(self.clone(), part, keys, instance, ticket);
        Ok((registration, generation))
    }
}

impl fmt::Debug for Registrar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registrar")
            .field("layouts", &self.inner.layouts)
            .finish_non_exhaustive()
    }
}

/// Settings of a [`Registrar`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct RegistrarBuilder {
    client: Client,
    prefix: Option<String>,
    ttl: Option<Duration>,
    layout: Layout,
    others: Vec<Layout>,
    leave_grace: Duration,
}

impl RegistrarBuilder {
    /// The prefix under which services stand; the format's own unless set (`services`).
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// How long a crashed process stays registered; the format's own unless set (10 s). Whole
    /// seconds, 2 at least. It is renewed at a third of it.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// The format that instances are written in; [`EtcdNaming`] unless set. A [`Layout`] says where as
    /// well; [`prefix`](Self::prefix) goes before its own. Any [`Format`](crate::format::Format) is one,
    /// also an `Arc<dyn Format>` that is chosen at run time.
    pub fn format(mut self, layout: impl Into<Layout>) -> Self {
        self.layout = layout.into();
        self
    }

    /// Writes each instance in another format as well, or in the same one under another prefix; may be
    /// called several times. All of an instance's keys are under one lease, and are put, changed and
    /// deleted in one transaction.
    ///
    /// The time to live is the first format's unless set.
    ///
    /// ```no_run
    /// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
    /// use goo_etcd::format::{EtcdNaming, Kratos};
    /// use goo_etcd::Registrar;
    ///
    /// // For clients that read kratos' format still, and for those that read the default one.
    /// let registrar = Registrar::builder(&client)
    ///     .format(Kratos)
    ///     .and_format(EtcdNaming)
    ///     .build()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn and_format(mut self, layout: impl Into<Layout>) -> Self {
        self.others.push(layout.into());
        self
    }

    /// How long [`Registration::leave_on`] leaves an instance in etcd marked as draining, for clients
    /// to turn away from it. Default 1 s.
    pub fn leave_grace(mut self, grace: Duration) -> Self {
        self.leave_grace = grace;
        self
    }

    /// The registrar. Its tasks begin with its first registration, on the Tokio runtime of that call.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a time to live that etcd cannot grant.
    pub fn build(self) -> Result<Registrar> {
        let ttl = self.ttl.unwrap_or_else(|| self.layout.format.default_ttl());
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

    fn start(self) -> Registrar {
        let ttl = self.ttl.unwrap_or_else(|| self.layout.format.default_ttl());
        let request_timeout = self.client.request_timeout();
        let mut layouts = vec![self.layout.under(self.prefix)];
        layouts.extend(self.others);
        Registrar {
            inner: Arc::new(Inner {
                client: self.client,
                ttl,
                parts: Mutex::default(),
                layouts,
                leave_grace: self.leave_grace,
                request_timeout,
            }),
        }
    }
}
