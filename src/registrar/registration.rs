//! The handle of one registered instance.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::Stream;
use tokio::sync::watch;

use super::driver::Shared;
use super::state::{RegistrationState, Status, Ticket};
use super::{Registrar, readiness};
use crate::error::{Error, Result};
use crate::instance::Instance;

/// An instance that is kept registered. Cheap to clone.
///
/// Dropping the last clone withdraws it, best effort: the key is deleted as soon as etcd can be
/// reached while the process and its registrar live, and after the time to live otherwise. To know
/// that it is gone, [`deregister`](Self::deregister).
#[derive(Clone)]
#[must_use = "dropping the last clone of a registration deregisters its instance"]
pub struct Registration {
    inner: Arc<Inner>,
}

struct Inner {
    registrar: Registrar,
    /// The part of the registrar that keeps it.
    part: Arc<Shared>,
    key: String,
    /// One for each format that it is written in, the first is `key`.
    keys: Vec<String>,
    token: u64,
    instance: Mutex<Instance>,
    /// Held while a change is made, so that one is made after the other.
    changing: tokio::sync::Mutex<()>,
    status: watch::Receiver<Status>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.withdraw();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Instance> {
        self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn withdraw(&self) {
        self.part
            .want(|reconciler| reconciler.withdraw(&self.key, self.token));
    }
}

impl Registration {
    pub(super) fn new(
        registrar: Registrar,
        part: Arc<Shared>,
        keys: Vec<String>,
        instance: Instance,
        ticket: Ticket,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                registrar,
                part,
                key: keys.first().cloned().unwrap_or_default(),
                keys,
                token: ticket.token,
                instance: Mutex::new(instance),
                changing: tokio::sync::Mutex::default(),
                status: ticket.status,
            }),
        }
    }

    /// The instance's key in etcd; in the first format, if it is written in several.
    pub fn key(&self) -> &str {
        &self.inner.key
    }

    /// The instance's key in etcd in each format that it is written in.
    pub fn keys(&self) -> &[String] {
        &self.inner.keys
    }

    /// The instance as it should be in etcd.
    pub fn instance(&self) -> Instance {
        self.inner.lock().clone()
    }

    /// Where it stands now.
    pub fn state(&self) -> RegistrationState {
        self.inner.status.borrow().state.clone()
    }

    /// The states as they come: the present one at once, then each newer one.
    ///
    /// A consumer that is slow misses those in between, never the newest. The stream does not keep
    /// the instance registered; it ends when the registration has.
    pub fn states(&self) -> impl Stream<Item = RegistrationState> + Send + Unpin + 'static {
        let mut status = self.inner.status.clone();
        status.mark_changed();
        Box::pin(futures::stream::unfold(
            (status, None),
            |(mut status, mut last)| async move {
                loop {
                    status.changed().await.ok()?;
                    let state = status.borrow_and_update().state.clone();
                    if last.as_ref() != Some(&state) {
                        last = Some(state.clone());
                        return Some((state, (status, last)));
                    }
                }
            },
        ))
    }

    /// Changes the instance, and waits until etcd has the change. While the instance is held back, for
    /// its server is not ready, there is nothing to wait for: it comes into etcd changed.
    ///
    /// Dropping the future does not take the change back.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if it cannot be registered any more, or if its key would change: the
    /// service and the id cannot be changed, nor the address where a format has it in the key; register
    /// a new one for that. [`Error::Deregistered`] after it was. Nothing is changed then.
    ///
    /// etcd's answer when it refuses the change; when it cannot be reached within the client's request
    /// time-out, the last failure; [`Error::Superseded`] while another has the key. The change stays wanted.
    pub async fn update(&self, change: impl FnOnce(&mut Instance)) -> Result<()> {
        let inner = &self.inner;
        let registrar = &inner.registrar.inner;
        let generation = {
            let _one_at_a_time = inner.changing.lock().await;
            // The lock is not held over what the caller and the format do.
            let mut changed = self.instance();
            change(&mut changed);
            changed.validate()?;
            let pairs = registrar.write(&changed)?;
            let moved = pairs
                .iter()
                .zip(&inner.keys)
                .find(|((to, _), of)| to != *of);
            if let Some(((to, _), of)) = moved {
                let reason = format!("the key would change from {of:?}");
                return Err(Error::invalid("id", to, reason));
            }
            let draining = changed.draining;
            let generation = inner
                .part
                .want(|reconciler| reconciler.update(&inner.key, inner.token, pairs, draining))
                .ok_or_else(|| Error::Deregistered {
                    key: inner.key.clone(),
                })?;
            *inner.lock() = changed;
            generation
        };
        self.wait_written(generation).await
    }

    /// Leaves gracefully: marks the instance as draining, so that clients stop choosing it, waits
    /// for `grace`, and deregisters. Where a format has no place for the mark, it deregisters first and
    /// waits then, for clients to notice that. When it is out already, for its server is not ready, there is
    /// nobody to wait for.
    ///
    /// The mark is for clients of this crate. Of the frameworks' own, dubbo-go's look at it; the others
    /// turn away when the key is gone, so that a server that they call should go on serving for a
    /// moment after this, as one that shuts down gracefully does.
    ///
    /// With etcd unreachable this takes `grace` and at most two request time-outs. Dropping the future
    /// leaves it where it was: marked as draining, or withdrawn.
    ///
    /// # Errors
    ///
    /// As [`deregister`](Self::deregister).
    pub async fn drain(&self, grace: Duration) -> Result<()> {
        if self.state() == RegistrationState::Unready {
            // Nobody has been told of it.
            return self.deregister().await;
        }
        if let Err(error) = self.update(|instance| instance.draining = true).await {
            // Leaving goes on: the key's deletion says the same, only less gently.
            tracing::warn!(key = self.key(), %error, "could not mark as draining");
        }
        if self.draining_shows() {
            tokio::time::sleep(grace).await;
            self.deregister().await
        } else {
            let result = self.deregister().await;
            tokio::time::sleep(grace).await;
            result
        }
    }

    /// Whether every format that it is written in has a place for draining.
    fn draining_shows(&self) -> bool {
        let registrar = &self.inner.registrar.inner;
        let written = |draining| registrar.write(&self.instance().draining(draining));
        match (written(true), written(false)) {
            (Ok(leaving), Ok(staying)) => leaving.iter().zip(&staying).all(|(a, b)| a != b),
            _ => false,
        }
    }

    /// Withdraws the instance, and waits until it is gone from etcd. Dropping the future does not take
    /// that back.
    ///
    /// # Errors
    ///
    /// etcd's answer when it refuses; when it cannot be reached within the client's request time-out,
    /// the last failure; [`Error::Closed`] after the client was closed. It stays withdrawn: the registrar keeps trying to delete the key while it lives, and does not renew
    /// the lease for it.
    pub async fn deregister(&self) -> Result<()> {
        self.inner.withdraw();
        let gone = |status: &Status| status.state == RegistrationState::Deregistered;
        self.wait(gone, "deregistration").await
    }

    /// Waits for `signal`, leaves gracefully with the registrar's
    /// [`leave_grace`](super::RegistrarBuilder::leave_grace), and resolves: for tonic's
    /// `serve_with_shutdown`, which stops accepting then and finishes what is in flight.
    ///
    /// It resolves even if leaving fails, with a warning in the log: a server that is asked to stop
    /// must stop. Dropping the future before the signal leaves the instance registered for as long
    /// as another clone is held; after it, as [`drain`](Self::drain) says.
    pub fn leave_on<S: Future>(&self, signal: S) -> impl Future<Output = ()> + use<S> {
        let registration = self.clone();
        async move {
            signal.await;
            let grace = registration.inner.registrar.inner.leave_grace;
            if let Err(error) = registration.drain(grace).await {
                tracing::warn!(key = registration.key(), %error, "could not deregister");
            }
        }
    }

    /// Lets `ready` say when it is to be in etcd.
    pub(super) fn follow(&self, ready: impl Stream<Item = bool> + Send + 'static) {
        let inner = &self.inner;
        // It keeps nothing alive: what it waits for is told by the part, or by that being gone.
        let part = Arc::downgrade(&inner.part);
        let (key, token) = (inner.key.clone(), inner.token);
        let status = inner.status.clone();
        tokio::spawn(readiness::follow(ready, status, move |ready| {
            part.upgrade().is_some_and(|part| {
                part.want(|reconciler| reconciler.set_ready(&key, token, ready))
            })
        }));
    }

    pub(super) async fn wait_written(&self, generation: u64) -> Result<()> {
        let settled = |status: &Status| {
            status.written.is_some_and(|up_to| up_to >= generation)
                || (status.held_back && !status.over)
        };
        self.wait(settled, "registration").await
    }

    /// Waits for a status, for at most the client's request time-out; less if etcd refuses what it takes
    /// to get there, for trying again within this call makes no sense then.
    async fn wait(&self, reached: impl Fn(&Status) -> bool, what: &str) -> Result<()> {
        let hopeless = |error: &Error| {
            error.is_permanent() || matches!(error, Error::Closed { .. } | Error::Superseded { .. })
        };
        let mut status = self.inner.status.clone();
        let limit = self.inner.registrar.inner.request_timeout;
        let waited = tokio::time::timeout(limit, async {
            status
                .wait_for(|status| reached(status) || status.error.as_ref().is_some_and(hopeless))
                .await
                .map(|status| {
                    if reached(&status) {
                        None
                    } else {
                        status.error.clone()
                    }
                })
        })
        .await;
        let timeout = || Error::Timeout {
            operation: format!("{what} of {:?}", self.inner.key),
            after: limit,
        };
        match waited {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(error))) => Err(error),
            Ok(Err(_)) | Err(_) => {
                let status = self.inner.status.borrow();
                Err(status.error.clone().unwrap_or_else(timeout))
            }
        }
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("key", &self.inner.key)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
