//! Shares one watch per service among all directories of a client.
//!
//! Directories of one client with the same settings share a [`ServiceWatch`]. The first to be built
//! lists and watches, and the others join it; within a runtime they also join a watch that is still
//! being opened. Each runtime that has a handle can take over the watch when another runtime shuts
//! down.

use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Weak};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use parking_lot::Mutex;
use tokio::runtime;

use super::service_watch::ServiceWatch;
use crate::client::Client;
use crate::error::Result;
use crate::format::{Identity, Layout};

/// The settings that must be equal for two directories to share a watch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    service: String,
    /// The format, the prefix and the layout's name of the service.
    layouts: Vec<(Identity, String, String)>,
    cache_dir: Option<PathBuf>,
}

impl Key {
    pub(super) fn new(service: &str, layouts: &[Layout], cache_dir: Option<&PathBuf>) -> Self {
        let layout = |layout: &Layout| {
            let name = layout.service_name(service).to_owned();
            (layout.format.identity(), layout.prefix.clone(), name)
        };
        Self {
            service: service.to_owned(),
            layouts: layouts.iter().map(layout).collect(),
            cache_dir: cache_dir.cloned(),
        }
    }
}

/// A watch that is being opened. All callers that wait for it share the future.
type Opening = BoxFuture<'static, Result<Arc<ServiceWatch>>>;

enum Slot {
    /// Callers in one runtime are opening the watch. When the last of them is dropped, the
    /// half-opened watch is dropped too.
    Opening(runtime::Id, WeakShared<Opening>),
    Open(Weak<ServiceWatch>),
}

impl Slot {
    /// The open watch, unless it does not follow etcd any more.
    fn followed(&self) -> Option<Arc<ServiceWatch>> {
        match self {
            Slot::Opening(..) => None,
            Slot::Open(watch) => watch.upgrade().filter(|watch| watch.is_followed()),
        }
    }

    fn is_alive(&self) -> bool {
        match self {
            Slot::Opening(_, opening) => opening.upgrade().is_some(),
            Slot::Open(_) => self.followed().is_some(),
        }
    }
}

enum Lookup {
    Open(Arc<ServiceWatch>),
    Opening(Shared<Opening>),
}

/// The watches of one client. The client owns the registry, and the registry holds only weak
/// references, so neither keeps the other alive.
#[derive(Default)]
pub(super) struct Registry {
    slots: Mutex<HashMap<Key, Slot>>,
}

impl Registry {
    pub(super) fn of(client: &Client) -> Arc<Self> {
        client.extension()
    }

    /// Returns the watch for `key`, and opens it with `open` if there is none. Its tasks run on the
    /// current runtime as well from then on.
    pub(super) async fn get_or_open<F>(
        &self,
        key: Key,
        open: impl FnOnce() -> F,
    ) -> Result<Arc<ServiceWatch>>
    where
        F: Future<Output = Result<Arc<ServiceWatch>>> + Send + 'static,
    {
        let watch = match self.lookup(&key, open) {
            Lookup::Open(watch) => watch,
            Lookup::Opening(opening) => self.insert_or_get(key, opening.await?),
        };
        watch.follow_from_here();
        Ok(watch)
    }

    fn lookup<F>(&self, key: &Key, open: impl FnOnce() -> F) -> Lookup
    where
        F: Future<Output = Result<Arc<ServiceWatch>>> + Send + 'static,
    {
        let here = runtime::Handle::current().id();
        let mut slots = self.slots.lock();
        match slots.get(key) {
            Some(slot @ Slot::Open(_)) => {
                if let Some(watch) = slot.followed() {
                    return Lookup::Open(watch);
                }
            }
            // An opening of another runtime would end with that runtime.
            Some(Slot::Opening(runtime, opening)) if *runtime == here => {
                if let Some(opening) = opening.upgrade() {
                    return Lookup::Opening(opening);
                }
            }
            Some(Slot::Opening(..)) | None => {}
        }
        // Only a new slot can make the map grow, so this is often enough.
        slots.retain(|_, slot| slot.is_alive());
        let opening = open().boxed().shared();
        if let Some(weak) = opening.downgrade() {
            slots.insert(key.clone(), Slot::Opening(here, weak));
        }
        Lookup::Opening(opening)
    }

    /// Registers the watch that was just opened, or returns an earlier one of another caller or
    /// another runtime.
    fn insert_or_get(&self, key: Key, opened: Arc<ServiceWatch>) -> Arc<ServiceWatch> {
        let mut slots = self.slots.lock();
        if let Some(watch) = slots.get(&key).and_then(Slot::followed) {
            return watch;
        }
        // Before the slot is visible, because other callers ignore a watch without tasks.
        opened.follow_from_here();
        slots.insert(key, Slot::Open(Arc::downgrade(&opened)));
        opened
    }
}
