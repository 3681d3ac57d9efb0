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
pub(super) struct WatchKey {
    service: String,
    /// The format, the prefix and the layout's name of the service.
    layouts: Vec<(Identity, String, String)>,
    cache_dir: Option<PathBuf>,
}

impl WatchKey {
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
    fn open_watch(&self) -> Option<Arc<ServiceWatch>> {
        match self {
            Slot::Opening(..) => None,
            Slot::Open(watch) => watch.upgrade().filter(|watch| watch.is_followed()),
        }
    }

    fn is_alive(&self) -> bool {
        match self {
            Slot::Opening(_, opening) => opening.upgrade().is_some(),
            Slot::Open(_) => self.open_watch().is_some(),
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
pub(super) struct WatchRegistry {
    slots: Mutex<HashMap<WatchKey, Slot>>,
}

impl WatchRegistry {
    pub(super) fn of(client: &Client) -> Arc<Self> {
        client.extension()
    }

    /// Returns the watch for `key`, and opens it with `open` if there is none. Its tasks run on the
    /// current runtime as well from then on.
    pub(super) async fn get_or_open<F>(
        &self,
        key: WatchKey,
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

    fn lookup<F>(&self, key: &WatchKey, open: impl FnOnce() -> F) -> Lookup
    where
        F: Future<Output = Result<Arc<ServiceWatch>>> + Send + 'static,
    {
        let here = runtime::Handle::current().id();
        let mut slots = self.slots.lock();
        match slots.get(key) {
            Some(slot @ Slot::Open(_)) => {
                if let Some(watch) = slot.open_watch() {
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
    fn insert_or_get(&self, key: WatchKey, opened: Arc<ServiceWatch>) -> Arc<ServiceWatch> {
        let mut slots = self.slots.lock();
        if let Some(watch) = slots.get(&key).and_then(Slot::open_watch) {
            return watch;
        }
        // Before the slot is visible, because other callers ignore a watch without tasks.
        opened.follow_from_here();
        slots.insert(key, Slot::Open(Arc::downgrade(&opened)));
        opened
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use tokio::sync::{oneshot, watch};

    use super::*;
    use crate::error::Error;
    use crate::format::{EtcdNaming, Kratos};
    use crate::snapshot::Snapshot;

    fn key(format: impl Into<Layout>) -> WatchKey {
        WatchKey::new("greeter", &[format.into()], None)
    }

    /// A watch without layouts, which counts as followed once it has tasks.
    fn service_watch() -> Arc<ServiceWatch> {
        let snapshot = Snapshot::of("greeter".into(), []);
        let (_, snapshots) = watch::channel(Arc::new(snapshot));
        let watch = ServiceWatch::new("greeter".into(), Duration::ZERO, snapshots, Vec::new());
        Arc::new(watch)
    }

    /// Counts how often a watch is opened.
    #[derive(Default)]
    struct Openings(Arc<AtomicUsize>);

    impl Openings {
        fn count(&self) -> usize {
            self.0.load(Ordering::Relaxed)
        }

        fn open(&self) -> impl Future<Output = Result<Arc<ServiceWatch>>> + Send + 'static {
            self.0.fetch_add(1, Ordering::Relaxed);
            async {
                tokio::task::yield_now().await;
                Ok(service_watch())
            }
        }
    }

    #[tokio::test]
    async fn callers_with_one_key_share_the_watch() {
        let (registry, openings) = (WatchRegistry::default(), Openings::default());
        let (first, second) = tokio::try_join!(
            registry.get_or_open(key(EtcdNaming), || openings.open()),
            registry.get_or_open(key(EtcdNaming), || openings.open()),
        )
        .unwrap();
        let later = registry.get_or_open(key(EtcdNaming), || openings.open());
        assert!(Arc::ptr_eq(&first, &second));
        assert!(Arc::ptr_eq(&first, &later.await.unwrap()));
        assert_eq!(openings.count(), 1);

        let other = registry.get_or_open(key(Kratos), || openings.open());
        assert!(!Arc::ptr_eq(&first, &other.await.unwrap()));
        assert_eq!(openings.count(), 2);
    }

    #[tokio::test]
    async fn dropped_watch_is_opened_again() {
        let (registry, openings) = (WatchRegistry::default(), Openings::default());
        for count in 1..=3 {
            let watch = registry.get_or_open(key(EtcdNaming), || openings.open());
            drop(watch.await.unwrap());
            assert_eq!(openings.count(), count);
        }
        // The slot of a dropped watch goes with the next opening.
        let _other = registry.get_or_open(key(Kratos), || openings.open()).await;
        assert_eq!(registry.slots.lock().len(), 1);
    }

    #[tokio::test]
    async fn failure_is_shared_and_then_forgotten() {
        let (registry, openings) = (WatchRegistry::default(), Openings::default());
        let fail = || async {
            tokio::task::yield_now().await;
            Err(Error::invalid("service", "greeter", "a test"))
        };
        let (first, second) = tokio::join!(
            registry.get_or_open(key(EtcdNaming), fail),
            registry.get_or_open(key(EtcdNaming), || openings.open()),
        );
        assert!(first.is_err() && second.is_err());
        assert_eq!(openings.count(), 0);
        let again = registry.get_or_open(key(EtcdNaming), || openings.open());
        assert!(again.await.is_ok());
    }

    #[tokio::test]
    async fn cancelled_caller_does_not_stop_the_others() {
        let registry = WatchRegistry::default();
        let (finish, finished) = oneshot::channel();
        let mut first = Box::pin(registry.get_or_open(key(EtcdNaming), || async {
            finished.await.unwrap();
            Ok(service_watch())
        }));
        assert!(futures::poll!(&mut first).is_pending());
        let unused = Openings::default();
        let mut second = Box::pin(registry.get_or_open(key(EtcdNaming), || unused.open()));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        finish.send(()).unwrap();
        assert!(second.await.is_ok());
        assert_eq!(unused.count(), 0);
    }
}
