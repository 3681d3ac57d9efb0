//! Where the attempts of one call went.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The addresses that one caller's attempts at the same thing were sent to. The next attempt, made after
/// or beside them, goes to another where there is one.
///
/// It keeps away from the latest two: of three endpoints it goes to the one that was asked longest ago,
/// which may have recovered.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tried(Arc<Mutex<Latest>>);

/// The latest first.
type Latest = [Option<Arc<str>>; 2];

impl Tried {
    pub(super) fn add(&self, address: &Arc<str>) {
        let mut tried = self.lock();
        tried[1] = tried[0].replace(Arc::clone(address));
    }

    pub(super) fn contains(&self, address: &Arc<str>) -> bool {
        self.lock().iter().flatten().any(|tried| tried == address)
    }

    /// Where the latest attempt went.
    pub(crate) fn last(&self) -> Option<Arc<str>> {
        self.lock()[0].clone()
    }

    fn lock(&self) -> MutexGuard<'_, Latest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
