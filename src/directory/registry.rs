//! One watch per service and process, however many look.
//!
//! Directories of one client with the same settings are the same directory: the first to be built lists
//! and watches, the others join it, in the same runtime also while it is still being built. Each runtime
//! that has it can go on with the watch when the one ends that did.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use tokio::runtime;

use super::Inner;
use crate::client::Client;
use crate::error::Result;
use crate::format::{Format, Layout};

/// What makes two directories the same one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    client: usize,
    service: String,
    /// Format, prefix, and the service's name there.
    sources: Vec<(Identity, String, String)>,
    cache_dir: Option<PathBuf>,
}

impl Key {
    pub(super) fn new(
        client: &Client,
        service: &str,
        layouts: &[Layout],
        cache_dir: Option<&PathBuf>,
    ) -> Self {
        let source = |layout: &Layout| {
            let here = layout.service_here(service).to_owned();
            (Identity::of(&*layout.format), layout.prefix.clone(), here)
        };
        Self {
            client: client.identity(),
            service: service.to_owned(),
            sources: layouts.iter().map(source).collect(),
            cache_dir: cache_dir.cloned(),
        }
    }
}

/// What tells formats apart, without asking them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Identity {
    /// A type whose values hold nothing are all alike.
    Type(TypeId),
    /// A value that holds something is like itself alone; its address, which is nobody else's while the
    /// directory lives.
    Value(usize),
}

impl Identity {
    fn of(format: &dyn Format) -> Self {
        let any: &dyn Any = format;
        // Chosen at run time: what is behind.
        if let Some(behind) = any.downcast_ref::<Arc<dyn Format>>() {
            return Self::of(&**behind);
        }
        if let Some(behind) = any.downcast_ref::<Box<dyn Format>>() {
            return Self::of(&**behind);
        }
        if size_of_val(format) == 0 {
            Self::Type(any.type_id())
        } else {
            Self::Value(std::ptr::from_ref(format).addr())
        }
    }
}

type Opening = BoxFuture<'static, Result<Arc<Inner>>>;

enum Slot {
    /// It is being built by those who wait for it, in one runtime: what is half built ends with that. When
    /// they are gone, nobody builds it any more.
    Opening(runtime::Id, WeakShared<Opening>),
    Open(Weak<Inner>),
}

impl Slot {
    fn is_alive(&self) -> bool {
        match self {
            Slot::Opening(_, opening) => opening.upgrade().is_some(),
            Slot::Open(inner) => inner.upgrade().is_some_and(|inner| inner.is_followed()),
        }
    }
}

static OPEN: LazyLock<Mutex<HashMap<Key, Slot>>> = LazyLock::new(Mutex::default);

fn open() -> std::sync::MutexGuard<'static, HashMap<Key, Slot>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The directory of this key: the one that is there, or what `build` comes to.
pub(super) async fn join<F>(key: Key, build: impl FnOnce() -> F) -> Result<Arc<Inner>>
where
    F: Future<Output = Result<Arc<Inner>>> + Send + 'static,
{
    let inner = match find(&key, build) {
        Found::Open(inner) => inner,
        Found::Opening(opening) => there_first(key, opening.await?),
    };
    inner.follow_from_here();
    Ok(inner)
}

/// What was built, unless another is there by now: all of those who waited have the same, and so have those
/// of another runtime, who built another.
fn there_first(key: Key, built: Arc<Inner>) -> Arc<Inner> {
    let mut open = open();
    if let Some(Slot::Open(inner)) = open.get(&key)
        && let Some(inner) = inner.upgrade().filter(|inner| inner.is_followed())
    {
        return inner;
    }
    // Before anybody asks whether it is followed.
    built.follow_from_here();
    open.insert(key, Slot::Open(Arc::downgrade(&built)));
    built
}

enum Found {
    Open(Arc<Inner>),
    Opening(Shared<Opening>),
}

fn find<F>(key: &Key, build: impl FnOnce() -> F) -> Found
where
    F: Future<Output = Result<Arc<Inner>>> + Send + 'static,
{
    let here = runtime::Handle::current().id();
    let mut open = open();
    match open.get(key) {
        Some(Slot::Open(inner)) => {
            if let Some(inner) = inner.upgrade().filter(|inner| inner.is_followed()) {
                return Found::Open(inner);
            }
        }
        Some(Slot::Opening(runtime, opening)) if *runtime == here => {
            if let Some(opening) = opening.upgrade() {
                return Found::Opening(opening);
            }
        }
        Some(Slot::Opening(..)) | None => {}
    }
    // Now and then is enough, and this is when there may be more of them.
    open.retain(|_, slot| slot.is_alive());
    let opening = build().boxed().shared();
    if let Some(weak) = opening.downgrade() {
        open.insert(key.clone(), Slot::Opening(here, weak));
    }
    Found::Opening(opening)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{EtcdNaming, Kratos};

    #[derive(Debug)]
    struct Flavoured(#[allow(dead_code, reason = "it is what makes it a value")] u8);

    impl Format for Flavoured {
        fn name(&self) -> &'static str {
            EtcdNaming.name()
        }
        fn default_prefix(&self) -> &'static str {
            EtcdNaming.default_prefix()
        }
        fn default_ttl(&self) -> std::time::Duration {
            EtcdNaming.default_ttl()
        }
        fn key(&self, prefix: &str, instance: &crate::instance::Instance) -> String {
            EtcdNaming.key(prefix, instance)
        }
        fn range(&self, prefix: &str, service: &str) -> crate::format::KeyRange {
            EtcdNaming.range(prefix, service)
        }
        fn encode(&self, instance: &crate::instance::Instance) -> Result<Vec<u8>> {
            EtcdNaming.encode(instance)
        }
        fn decode(
            &self,
            prefix: &str,
            service: &str,
            key: &[u8],
            value: &[u8],
        ) -> Result<Vec<crate::instance::Instance>, crate::format::DecodeError> {
            EtcdNaming.decode(prefix, service, key, value)
        }
    }

    #[test]
    fn formats_are_alike_that_cannot_differ_however_they_were_chosen() {
        let of = |format: &dyn Format| Identity::of(format);
        let chosen: Arc<dyn Format> = Arc::new(EtcdNaming);
        let boxed: Box<dyn Format> = Box::new(EtcdNaming);
        assert_eq!(of(&EtcdNaming), of(&chosen));
        assert_eq!(of(&EtcdNaming), of(&boxed));
        assert_ne!(of(&EtcdNaming), of(&Kratos));
        let (one, other) = (Flavoured(1), Flavoured(1));
        assert_eq!(of(&one), of(&one));
        assert_ne!(of(&one), of(&other));
        let (chosen, same): (Arc<dyn Format>, _) = {
            let chosen: Arc<dyn Format> = Arc::new(Flavoured(1));
            (Arc::clone(&chosen), chosen)
        };
        assert_eq!(of(&chosen), of(&same));
    }
}
