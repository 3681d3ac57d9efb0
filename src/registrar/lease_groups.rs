//! Distributes the registrations of a registrar over leases.

use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::driver::{self, LeaseGroup};
use super::settings::RegistrarSettings;
use super::state::{Desired, EntryHandle, Overlap, TargetRecords, Timestamp};
use crate::client::{AttemptRecord, Client};
use crate::error::{Error, Result};
use crate::runtime;

/// The number of keys per lease. When a lease ends, etcd deletes its keys in one revision. etcd
/// limits a client's transaction to 128 operations (`--max-txn-ops`); 100 keys stay below that.
const KEYS_PER_LEASE: usize = 100;

/// The lease groups of a registrar. Dropped when no handle is left, which ends their drivers.
#[derive(Debug)]
pub(super) struct LeaseGroups {
    client: Client,
    settings: RegistrarSettings,
    groups: Mutex<Vec<Arc<LeaseGroup>>>,
}

impl LeaseGroups {
    pub(super) fn new(client: Client, settings: RegistrarSettings) -> Self {
        Self {
            client,
            settings,
            groups: Mutex::default(),
        }
    }

    pub(super) fn settings(&self) -> &RegistrarSettings {
        &self.settings
    }

    /// The client's request timeout, which limits how long a handle waits for etcd.
    pub(super) fn request_timeout(&self) -> Duration {
        self.client.request_timeout()
    }

    /// Registers with the group that is still deregistering one of the keys; otherwise with the
    /// first group with room for the keys, or with a new group.
    pub(super) fn register(
        &self,
        target: TargetRecords,
        desired: Desired,
    ) -> Result<(Arc<LeaseGroup>, EntryHandle)> {
        runtime::require(|| "register an instance".to_owned())?;
        let mut groups = self.groups.lock();
        // The runtime of their drivers has ended, and their leases expire.
        groups.retain(|group| {
            let reconciler = group.lock();
            !matches!(
                reconciler.close_error(),
                Some(Error::RuntimeEnded {
                    what: "the registrar",
                    ..
                })
            )
        });
        let (mut deregistering, mut roomy) = (None, None);
        for group in groups.iter() {
            let reconciler = group.lock();
            match reconciler.find_overlap(&target) {
                Overlap::Active(key) => return Err(Error::InstanceAlreadyRegistered { key }),
                Overlap::Deregistering => deregistering = Some(Arc::clone(group)),
                Overlap::None if reconciler.len() + target.records.len() <= KEYS_PER_LEASE => {
                    roomy.get_or_insert_with(|| Arc::clone(group));
                }
                Overlap::None => {}
            }
        }
        let group = deregistering.or(roomy).unwrap_or_else(|| {
            let group = self.start_group();
            groups.push(Arc::clone(&group));
            group
        });
        let now = Timestamp::now();
        let handle =
            group.with_reconciler(|reconciler| reconciler.register(target, desired, now))?;
        Ok((group, handle))
    }

    /// Waits until etcd has none of the keys and leases any more, for up to the client's request
    /// timeout, and ends the drivers.
    pub(super) async fn wait_until_released(&self) -> Result<()> {
        runtime::require(|| "release of the registrar's leases".to_owned())?;
        let groups = self.groups.lock().clone();
        let limit = self.request_timeout();
        let all_empty = try_join_all(groups.iter().map(|group| group.wait_until_empty()));
        match timeout(limit, all_empty).await {
            Ok(result) => drop(result?),
            Err(_) => return Err(self.release_timeout(&groups)),
        }
        for group in &groups {
            group.abandon();
        }
        Ok(())
    }

    /// The error of handles that have waited for etcd for the client's request timeout.
    pub(super) fn timeout_error(&self, operation: String, attempts: &AttemptRecord) -> Error {
        let limit = self.request_timeout();
        self.client.timeout_error(operation, limit, attempts)
    }

    /// The error of [`wait_until_released`](Self::wait_until_released), with the attempts of the
    /// first group that has not released its lease.
    fn release_timeout(&self, groups: &[Arc<LeaseGroup>]) -> Error {
        let unreleased = groups.iter().find(|group| !group.lock().is_empty());
        let attempts = unreleased.map(|group| group.attempts()).unwrap_or_default();
        self.timeout_error("release of the registrar's leases".to_owned(), &attempts)
    }

    /// Starts the driver of a new group. Dropping the `LeaseGroups` ends the driver.
    fn start_group(&self) -> Arc<LeaseGroup> {
        let group = Arc::new(LeaseGroup::new());
        let client = self.client.clone();
        tokio::spawn(driver::run(Arc::clone(&group), client, self.settings.ttl));
        group
    }
}

impl Drop for LeaseGroups {
    fn drop(&mut self) {
        for group in self.groups.get_mut() {
            // Not aborted, because the driver first tries once to delete the keys.
            group.abandon();
        }
    }
}
