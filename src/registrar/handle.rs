//! The handle of a registrar.

use std::fmt;
use std::sync::Arc;

use futures::Stream;
use futures::future::join_all;
use parking_lot::Mutex;

use super::lease_groups::LeaseGroups;
use super::registration::{Registration, WeakRegistration};
use super::settings::RegistrarSettings;
use super::state::{Desired, RegistrationState};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::instance::Instance;

/// Keeps instances registered in etcd. Cheap to clone; clones share their leases.
///
/// To end gracefully, use [`close`](Self::close). Dropping the last clone and the last
/// [`Registration`] made through it ends the registrar's tasks, which first try once to delete the
/// keys that are left.
///
/// ```no_run
/// # async fn example(client: goo_etcd::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use goo_etcd::{Instance, Registrar};
///
/// let registrar = Registrar::new(&client);
/// let registration = registrar
///     .register(Instance::new("greeter", "10.0.0.5:50051"))
///     .await?;
/// // The service runs. Before it ends:
/// registrar.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "a registrar registers nothing until `register` is called"]
pub struct Registrar {
    groups: Arc<LeaseGroups>,
    registrations: Arc<Mutex<Registrations>>,
}

/// The registrations made through a registrar.
#[derive(Default)]
struct Registrations {
    /// Whether the registrar was closed.
    closed: bool,
    handles: Vec<WeakRegistration>,
}

impl Registrations {
    /// The registrations that are held and not deregistered.
    fn list_held(&self) -> Vec<Registration> {
        let held = self.handles.iter().filter_map(WeakRegistration::upgrade);
        held.filter(|held| held.state() != RegistrationState::Deregistered)
            .collect()
    }

    fn add(&mut self, registration: &Registration) {
        self.handles.retain(WeakRegistration::is_held);
        self.handles.push(registration.downgrade());
    }
}

impl Registrar {
    pub(super) fn from_settings(client: Client, settings: RegistrarSettings) -> Self {
        Self {
            groups: Arc::new(LeaseGroups::new(client, settings)),
            registrations: Arc::default(),
        }
    }

    /// Registers an instance, waits until etcd has it, and keeps it there while the registration is
    /// held.
    ///
    /// Dropping the future deregisters the instance.
    ///
    /// # Errors
    ///
    /// After an error the instance is not registered. To keep trying, use
    /// [`register_eventually`](Self::register_eventually).
    ///
    /// - [`Error::Invalid`] if the instance cannot be registered, or not in one of the registrar's
    ///   formats.
    /// - [`Error::InstanceAlreadyRegistered`] if this registrar has a registration with one of the
    ///   keys.
    /// - [`Error::RegistrarClosed`] after [`close`](Self::close).
    /// - etcd's error if etcd refuses the write, for example because of a missing permission.
    /// - The last failure if etcd cannot be reached within the client's request timeout.
    pub async fn register(&self, instance: Instance) -> Result<Registration> {
        let (registration, generation) = self.add(instance, Desired::Registered)?;
        registration.wait_written(generation).await?;
        Ok(registration)
    }

    /// Registers an instance as soon as etcd can be reached, no matter how long that takes. Returns
    /// at once; [`Registration::state`] tells the progress.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], [`Error::InstanceAlreadyRegistered`] and [`Error::RegistrarClosed`],
    /// before anything is sent.
    pub fn register_eventually(&self, instance: Instance) -> Result<Registration> {
        let (registration, _) = self.add(instance, Desired::Registered)?;
        Ok(registration)
    }

    /// Registers an instance whenever `ready` yields `true`, and removes it from etcd whenever
    /// `ready` yields `false`. Returns at once; until the first item the registration is
    /// [`Unready`](crate::RegistrationState::Unready).
    ///
    /// When `ready` ends, its last item stays in effect. When `ready` panics, or the runtime ends
    /// on which this method was called, the instance is held back. The stream is dropped when the
    /// registration is deregistered, even while etcd cannot be reached, and when the client is
    /// closed.
    ///
    /// ```no_run
    /// # async fn example(
    /// #     registrar: goo_etcd::Registrar,
    /// #     warmed_up: impl Future<Output = ()> + Send + 'static,
    /// # ) -> goo_etcd::Result<()> {
    /// use goo_etcd::Instance;
    ///
    /// // Ready when a future completes.
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
    /// `goo_etcd::serving` (feature `health`) is a stream that follows the server's own
    /// `grpc.health.v1` service.
    ///
    /// # Errors
    ///
    /// As for [`register_eventually`](Self::register_eventually).
    pub fn register_while_ready(
        &self,
        instance: Instance,
        ready: impl Stream<Item = bool> + Send + 'static,
    ) -> Result<Registration> {
        let (registration, _) = self.add(instance, Desired::HeldBack)?;
        registration.follow(ready);
        Ok(registration)
    }

    /// The registrations made through this registrar and its clones that are not deregistered, in
    /// the order in which they were made.
    ///
    /// A registration is missing once its last clone was dropped. The returned clones keep their
    /// instances registered while they are held.
    pub fn registrations(&self) -> Vec<Registration> {
        self.registrations.lock().list_held()
    }

    /// Ends all registrations gracefully: [drains](Registration::drain) them at the same time, with
    /// the builder's [`leave_grace`](crate::RegistrarBuilder::leave_grace), and returns when etcd
    /// has deleted the keys and revoked the leases.
    ///
    /// After the call this registrar and its clones accept no registration, and return
    /// [`Error::RegistrarClosed`]. The client stays open. Another call waits for the registrations
    /// that are left, and returns at once if there are none.
    ///
    /// If etcd cannot be reached, this takes the grace period and up to three request timeouts of
    /// the client. Dropping the future leaves each registration as it is at that moment,
    /// registered, marked as draining or deregistered, and the registrar closed; call `close` again
    /// to continue.
    ///
    /// # Errors
    ///
    /// The first error of a registration, as for [`Registration::deregister`]; [`Error::Timeout`]
    /// if etcd does not revoke the leases within the client's request timeout. The registrations
    /// are deregistered in any case: the registrar keeps trying to delete the keys while one of its
    /// clones is held.
    pub async fn close(&self) -> Result<()> {
        let registrations = {
            let mut registrations = self.registrations.lock();
            registrations.closed = true;
            registrations.list_held()
        };
        let results = join_all(registrations.iter().map(Registration::end)).await;
        results.into_iter().collect::<Result<()>>()?;
        self.groups.wait_until_released().await
    }

    /// Adds a registration. Returns the generation to wait for.
    fn add(&self, instance: Instance, desired: Desired) -> Result<(Registration, u64)> {
        instance.validate()?;
        let target = self.groups.settings().encode(&instance)?;
        let keys = target.keys().cloned().collect();
        let mut registrations = self.registrations.lock();
        if registrations.closed {
            return Err(Error::RegistrarClosed);
        }
        let (group, handle) = self.groups.register(target, desired)?;
        let generation = handle.generation;
        let groups = Arc::clone(&self.groups);
        let registration = Registration::new(groups, group, keys, instance, handle);
        registrations.add(&registration);
        Ok((registration, generation))
    }
}

impl fmt::Debug for Registrar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registrar")
            .field("layouts", &self.groups.settings().layouts)
            .finish_non_exhaustive()
    }
}
