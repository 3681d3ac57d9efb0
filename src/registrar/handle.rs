//! The handle of a registrar.

use std::fmt;
use std::sync::Arc;

use futures::Stream;

use super::lease_groups::LeaseGroups;
use super::registration::Registration;
use super::settings::Settings;
use super::state::Desired;
use crate::client::Client;
use crate::error::Result;
use crate::instance::Instance;

/// Keeps instances registered in etcd. Cheap to clone; clones share their leases.
///
/// Dropping the last clone and the last [`Registration`] made through it ends the registrar's task,
/// which first tries once to delete the keys that are left.
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
/// registration.deregister().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Registrar {
    groups: Arc<LeaseGroups>,
}

impl Registrar {
    pub(super) fn from_settings(client: Client, settings: Settings) -> Self {
        Self {
            groups: Arc::new(LeaseGroups::new(client, settings)),
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
    /// - [`Error::Invalid`](crate::Error::Invalid) if the instance cannot be registered, or not in
    ///   one of the registrar's formats.
    /// - [`Error::InstanceAlreadyRegistered`](crate::Error::InstanceAlreadyRegistered) if this
    ///   registrar has a registration with one of the keys.
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
    /// [`Error::Invalid`](crate::Error::Invalid) and
    /// [`Error::InstanceAlreadyRegistered`](crate::Error::InstanceAlreadyRegistered), before
    /// anything is sent.
    pub fn register_eventually(&self, instance: Instance) -> Result<Registration> {
        let (registration, _) = self.add(instance, Desired::Registered)?;
        Ok(registration)
    }

    /// Registers an instance whenever `ready` yields `true`, and removes it from etcd whenever
    /// `ready` yields `false`. Returns at once; until the first item the registration is
    /// [`Unready`](crate::RegistrationState::Unready).
    ///
    /// When `ready` ends, its last item stays in effect. The stream is dropped when the
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

    /// Adds a registration. Returns the generation to wait for.
    fn add(&self, instance: Instance, desired: Desired) -> Result<(Registration, u64)> {
        instance.validate()?;
        let target = self.groups.settings().encode(&instance)?;
        let keys = target.keys().cloned().collect();
        let (group, handle) = self.groups.register(target, desired)?;
        let generation = handle.generation;
        let groups = Arc::clone(&self.groups);
        let registration = Registration::new(groups, group, keys, instance, handle);
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
