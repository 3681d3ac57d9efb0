//! Streams that were cancelled before their end arrived.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// How many are remembered. The end of a cancelled stream arrives within a round trip or never.
const REMEMBERED: usize = 1_000;

/// The ids of cancelled streams. The peer may end such a stream before it reads the reset, and that
/// end belongs to no stream in use.
#[derive(Debug, Default)]
pub(super) struct CancelledStreams {
    /// Whether there are any, so that a stream that ends costs no lock usually.
    any: AtomicBool,
    ids: Mutex<VecDeque<u32>>,
}

impl CancelledStreams {
    pub(super) fn insert(&self, stream: u32) {
        let mut ids = self.ids.lock();
        if ids.len() == REMEMBERED {
            ids.pop_front();
        }
        ids.push_back(stream);
        self.any.store(true, Ordering::Release);
    }

    /// Forgets a stream. Returns whether it was cancelled.
    pub(super) fn remove(&self, stream: u32) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let mut ids = self.ids.lock();
        let found = ids.iter().position(|id| *id == stream);
        if let Some(index) = found {
            ids.remove(index);
        }
        self.any.store(!ids.is_empty(), Ordering::Release);
        found.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_found_once() {
        let cancelled = CancelledStreams::default();
        assert!(!cancelled.remove(1));
        cancelled.insert(1);
        cancelled.insert(3);
        assert!(cancelled.remove(3) && !cancelled.remove(3));
        assert!(cancelled.remove(1) && !cancelled.remove(1));
    }

    #[test]
    fn number_is_bounded() {
        let cancelled = CancelledStreams::default();
        for stream in 0..2 * REMEMBERED as u32 {
            cancelled.insert(stream);
        }
        assert!(!cancelled.remove(0) && cancelled.remove(REMEMBERED as u32));
        assert_eq!(cancelled.ids.lock().len(), REMEMBERED - 1);
    }
}
