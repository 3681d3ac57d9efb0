//! The handle of one registered instance.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::driver::LeaseGroup;
use super::lease_groups::LeaseGroups;
use super::readiness;
use super::state::{EntryHandle, EntryId, RegistrationState, Status, TargetRecords, Timestamp};
use super::states::RegistrationStates;
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::runtime;

/// A registered instance. Cheap to clone.
///
/// Dropping the last clone deregisters the instance, best effort: its keys are deleted as soon as
/// etcd can be reached, while the process and its registrar live, and otherwise disappear after the
/// TTL. To wait until the keys are gone, use [`deregister`](Self::deregister).
#[derive(Clone)]
#[must_use = "dropping the last clone of a registration deregisters its instance"]
pub struct Registration {
    inner: Arc<Inner>,
}

struct Inner {
    groups: Arc<LeaseGroups>,
    /// The group that has the entry.
    group: Arc<LeaseGroup>,
    id: EntryId,
    /// One key per format. The first one is the key of `id`.
    keys: Vec<String>,
    instance: Mutex<Instance>,
    /// Held during an update, so that concurrent updates run one after the other.
    updating: tokio::sync::Mutex<()>,
    status: watch::Receiver<Status>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.start_deregistration();
    }
}

impl Inner {
    fn start_deregistration(&self) {
        self.group
            .with_reconciler(|reconciler| reconciler.deregister(&self.id));
    }

    /// Rejects a target with other keys than the registered ones.
    fn check_keys(&self, target: &TargetRecords) -> Result<()> {
        let mut pairs = target.keys().zip(&self.keys);
        let Some((new, old)) = pairs.find(|(new, old)| new != old) else {
            return Ok(());
        };
        let reason = format!("the key would change from {old:?}");
        Err(Error::invalid("id", new, reason))
    }
}

/// A reference to a registration that does not keep the instance registered.
pub(super) struct WeakRegistration(Weak<Inner>);

impl WeakRegistration {
    /// Whether a handle of the registration is left.
    pub(super) fn is_held(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// The registration, unless its last handle was dropped.
    pub(super) fn upgrade(&self) -> Option<Registration> {
        self.0.upgrade().map(|inner| Registration { inner })
    }
}

impl Registration {
    pub(super) fn new(
        groups: Arc<LeaseGroups>,
        group: Arc<LeaseGroup>,
        keys: Vec<String>,
        instance: Instance,
        handle: EntryHandle,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                groups,
                group,
                id: handle.id,
                keys,
                instance: Mutex::new(instance),
                updating: tokio::sync::Mutex::default(),
                status: handle.status,
            }),
        }
    }

    pub(super) fn downgrade(&self) -> WeakRegistration {
        WeakRegistration(Arc::downgrade(&self.inner))
    }

    /// The instance's key in etcd, in the first format.
    pub fn key(&self) -> &str {
        &self.inner.id.key
    }

    /// The instance's keys in etcd, one per format.
    pub fn keys(&self) -> &[String] {
        &self.inner.keys
    }

    /// The instance as it should be in etcd.
    pub fn instance(&self) -> Instance {
        self.inner.instance.lock().clone()
    }

    /// The current state.
    pub fn state(&self) -> RegistrationState {
        self.inner.status.borrow().state.clone()
    }

    /// A stream of states: the current one at once, then each change of the state or its reason. A
    /// reason that was reported within the last minute, as when the members of etcd fail in
    /// different ways in turn, is no change; [`state`](Self::state) has the latest one.
    ///
    /// A slow consumer misses intermediate states, but never the latest one. The stream does not
    /// keep the instance registered. The stream ends after
    /// [`Deregistered`](RegistrationState::Deregistered), or when the registrar's task ends.
    pub fn states(&self) -> RegistrationStates {
        RegistrationStates::new(self.inner.status.clone())
    }

    /// Changes the instance, and waits until etcd has the change. Returns at once while the
    /// instance is held back because its server is not ready; the change then takes effect when it
    /// is ready.
    ///
    /// Dropping the future does not undo the change.
    ///
    /// # Errors
    ///
    /// The instance is unchanged after these errors:
    ///
    /// - [`Error::Invalid`] if the changed instance cannot be registered, or if its key would
    ///   change. The service and the id cannot be changed, and neither can the address if a format
    ///   has it in the key; register a new instance instead.
    /// - [`Error::Deregistered`] if the instance was deregistered.
    ///
    /// After these errors the registrar keeps trying to write the change:
    ///
    /// - etcd's error if etcd refuses the change.
    /// - The last failure if etcd cannot be reached within the client's request timeout.
    /// - [`Error::Superseded`] while another process owns the key.
    pub async fn update(&self, change: impl FnOnce(&mut Instance)) -> Result<()> {
        runtime::require(|| format!("update of {:?}", self.key()))?;
        let generation = self.apply(change).await?;
        self.wait_written(generation).await
    }

    /// Changes the desired value. Returns the generation that has the change.
    async fn apply(&self, change: impl FnOnce(&mut Instance)) -> Result<u64> {
        let inner = &self.inner;
        let _one_at_a_time = inner.updating.lock().await;
        // `instance` is not locked while code of the caller and of the formats runs.
        let mut changed = self.instance();
        change(&mut changed);
        changed.validate()?;
        let target = inner.groups.settings().encode(&changed)?;
        inner.check_keys(&target)?;
        let generation = inner
            .group
            .with_reconciler(|reconciler| reconciler.update(&inner.id, target))
            .ok_or_else(|| self.deregistered_error())?;
        *inner.instance.lock() = changed;
        Ok(generation)
    }

    /// Deregisters gracefully: marks the instance as draining, so that clients stop choosing it,
    /// waits for `grace`, and deregisters.
    ///
    /// If a format cannot express the mark, this method deregisters first, and then waits for
    /// `grace` so that clients notice the deletion. An instance that is held back because its
    /// server is not ready is deregistered without a wait, because no client knows it.
    ///
    /// Clients of this crate honour the mark, and so do those of dubbo-go. The clients of other
    /// frameworks turn away only when the key is deleted, so a server with such clients should
    /// serve for a moment longer, as a graceful shutdown does.
    ///
    /// If etcd cannot be reached, this takes `grace` and up to two request timeouts. Dropping the
    /// future leaves the instance as it is at that moment: marked as draining, or deregistered.
    ///
    /// # Errors
    ///
    /// As for [`deregister`](Self::deregister). A failure to set the mark is only logged.
    pub async fn drain(&self, grace: Duration) -> Result<()> {
        let can_wait = runtime::require(String::new).is_ok();
        let is_unready = matches!(self.state(), RegistrationState::Unready { .. });
        if !can_wait || is_unready {
            return self.deregister().await;
        }
        if let Err(error) = self.update(|instance| instance.draining = true).await {
            // The deletion of the key also turns clients away, only less gently.
            tracing::warn!(key = self.key(), %error, "could not mark the instance as draining");
        }
        let settings = self.inner.groups.settings();
        if settings.can_mark_draining(&self.instance()) {
            sleep(grace).await;
            self.deregister().await
        } else {
            let result = self.deregister().await;
            sleep(grace).await;
            result
        }
    }

    /// Deregisters the instance, and waits until its keys are gone from etcd.
    ///
    /// Dropping the future does not undo the deregistration.
    ///
    /// # Errors
    ///
    /// The instance is deregistered in any case: the registrar keeps trying to delete the keys
    /// while it lives, and does not keep a lease alive for them.
    ///
    /// - etcd's error if etcd refuses the deletion.
    /// - The last failure if etcd cannot be reached within the client's request timeout.
    /// - [`Error::Closed`] after the client was closed.
    /// - [`Error::NoRuntime`] outside of a Tokio runtime, where nobody can wait.
    pub async fn deregister(&self) -> Result<()> {
        self.inner.start_deregistration();
        let is_gone = |status: &Status| {
            let is_gone = status.state == RegistrationState::Deregistered;
            is_gone.then_some(Ok(()))
        };
        self.wait(is_gone, "deregistration").await
    }

    /// Drains the registration, or waits for a deregistration that was started before.
    pub(super) async fn end(&self) -> Result<()> {
        if self.inner.status.borrow().terminal {
            return self.deregister().await;
        }
        let grace = self.inner.groups.settings().leave_grace;
        self.drain(grace).await
    }

    /// Waits for `signal`, and then [drains](Self::drain) the registration with the registrar's
    /// [`leave_grace`](super::RegistrarBuilder::leave_grace). Made for tonic's
    /// `serve_with_shutdown`: when the future resolves, the server stops accepting connections and
    /// finishes the calls in flight.
    ///
    /// The future resolves even if draining fails, because a server must stop when asked to; the
    /// error is logged. Dropping the future before the signal changes nothing. Dropping it later
    /// acts as for [`drain`](Self::drain). The future holds a clone of the registration.
    pub fn leave_on<S: Future>(&self, signal: S) -> impl Future<Output = ()> + use<S> {
        let registration = self.clone();
        async move {
            signal.await;
            let grace = registration.inner.groups.settings().leave_grace;
            if let Err(error) = registration.drain(grace).await {
                tracing::warn!(key = registration.key(), %error, "could not deregister");
            }
        }
    }

    /// Holds the instance back whenever the last item of `ready` was `false`.
    pub(super) fn follow(&self, ready: impl Stream<Item = bool> + Send + 'static) {
        let inner = &self.inner;
        // The task holds no strong reference, so that it does not keep the registration alive.
        let group = Arc::downgrade(&inner.group);
        let id = inner.id.clone();
        let set_ready = move |readiness| {
            let Some(group) = Weak::upgrade(&group) else {
                return false;
            };
            let now = Timestamp::now();
            group.with_reconciler(|reconciler| reconciler.set_ready(&id, readiness, now))
        };
        tokio::spawn(readiness::forward(ready, inner.status.clone(), set_ready));
    }

    /// Waits until etcd has the generation, or the instance is held back.
    pub(super) async fn wait_written(&self, generation: u64) -> Result<()> {
        let outcome = |status: &Status| {
            let is_written = status.written.is_some_and(|written| written >= generation);
            if is_written || (status.held_back && !status.terminal) {
                return Some(Ok(()));
            }
            // Another handle deregistered the instance, or the client was closed.
            status.terminal.then(|| {
                let closed = status.error.clone().filter(is_final);
                Err(closed.unwrap_or_else(|| self.deregistered_error()))
            })
        };
        self.wait(outcome, "registration").await
    }

    fn deregistered_error(&self) -> Error {
        let key = self.inner.id.key.clone();
        Error::Deregistered { key }
    }

    /// Waits until `outcome` has a result, for up to the client's request timeout. Fails earlier
    /// with an error that a retry within that time would not resolve.
    async fn wait(
        &self,
        outcome: impl Fn(&Status) -> Option<Result<()>>,
        operation: &str,
    ) -> Result<()> {
        runtime::require(|| format!("{operation} of {:?}", self.key()))?;
        let final_outcome = |status: &Status| {
            let failed = || status.error.clone().filter(is_final).map(Err);
            outcome(status).or_else(failed)
        };
        let limit = self.inner.groups.request_timeout();
        let mut receiver = self.inner.status.clone();
        let waiting = receiver.wait_for(|status| final_outcome(status).is_some());
        if let Ok(Ok(status)) = timeout(limit, waiting).await
            && let Some(result) = final_outcome(&status)
        {
            return result;
        }
        let error = self.inner.status.borrow().error.clone();
        Err(error.unwrap_or_else(|| {
            let operation = format!("{operation} of {:?}", self.key());
            let attempts = self.inner.group.attempts();
            self.inner.groups.timeout_error(operation, &attempts)
        }))
    }
}

/// Whether an error is final for a caller that waits.
fn is_final(error: &Error) -> bool {
    error.is_permanent() || matches!(error, Error::Closed { .. } | Error::Superseded { .. })
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("key", &self.key())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
