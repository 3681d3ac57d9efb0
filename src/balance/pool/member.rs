//! A member of the pool: an instance with its endpoint.

use std::sync::Arc;

use tokio::time::Instant;

use super::supervisor::{Spawner, Supervisor};
use crate::balance::connection::{Connect, Target};
use crate::instance::Instance;

/// The endpoint of an instance and, while the instance's address changes, its replacement.
pub(crate) struct Member {
    current: Supervisor,
    replacement: Option<Replacement>,
}

/// A new endpoint that takes over as soon as it is connected.
struct Replacement {
    supervisor: Supervisor,
    /// When the new endpoint takes over although it is not connected.
    deadline: Instant,
}

/// A member whose instance has disappeared, with the instance's last state.
pub(crate) struct Vanished {
    pub(crate) member: Member,
    pub(crate) instance: Arc<Instance>,
}

impl Member {
    pub(crate) fn new(current: Supervisor) -> Self {
        Self {
            current,
            replacement: None,
        }
    }

    /// The supervisor of the endpoint that calls use.
    pub(crate) fn current(&self) -> &Supervisor {
        &self.current
    }

    /// The current endpoint and the replacement, if there is one.
    pub(crate) fn supervisors(&self) -> impl Iterator<Item = &Supervisor> {
        let replacement = self.replacement.as_ref();
        let replacement = replacement.map(|replacement| &replacement.supervisor);
        std::iter::once(&self.current).chain(replacement)
    }

    pub(crate) fn into_supervisors(self) -> impl Iterator<Item = Supervisor> {
        let replacement = self.replacement.map(|replacement| replacement.supervisor);
        std::iter::once(self.current).chain(replacement)
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.current.endpoint.is_lost()
    }

    pub(crate) fn has_address(&self, address: &str) -> bool {
        *self.current.endpoint.target.address == *address
    }

    /// Applies a change of the instance. If its target has changed, a replacement starts to
    /// connect, and the current endpoint serves until the replacement takes over.
    pub(crate) fn update<C: Connect>(
        &mut self,
        target: Target,
        instance: &Instance,
        spawner: &Spawner<C>,
    ) {
        // The weight and the draining mark apply at once, also if the address changes.
        self.current.endpoint.update(instance);
        if self.current.endpoint.target == target {
            self.replacement = None;
            return;
        }
        match &self.replacement {
            Some(replacement) if replacement.supervisor.endpoint.target == target => {
                replacement.supervisor.endpoint.update(instance);
            }
            _ => {
                self.replacement = Some(Replacement {
                    supervisor: spawner.spawn(target, instance),
                    deadline: Instant::now() + spawner.connector.connect_timeout(),
                });
            }
        }
    }

    /// When the replacement takes over at the latest.
    pub(crate) fn replacement_deadline(&self) -> Option<Instant> {
        let replacement = self.replacement.as_ref()?;
        Some(replacement.deadline)
    }

    /// Lets the replacement take over if it is connected, if the current endpoint is lost anyway,
    /// or if the replacement could not connect in time: the set says that the old address is out of
    /// date. Returns the endpoint that was replaced.
    pub(crate) fn promote_replacement(&mut self, now: Instant) -> Option<Supervisor> {
        let current = &self.current.endpoint;
        let replacement = self.replacement.take_if(|replacement| {
            replacement.supervisor.endpoint.is_connected()
                || current.is_lost()
                || now >= replacement.deadline
        })?;
        Some(std::mem::replace(&mut self.current, replacement.supervisor))
    }
}
