//! The endpoints that the attempts of one operation were sent to.

use std::sync::Arc;

use parking_lot::Mutex;

/// The addresses to which one caller's attempts at the same operation were sent. Further attempts,
/// made after these or beside them, prefer other endpoints.
///
/// Only the latest two addresses are kept. With three endpoints the next attempt therefore goes to
/// the endpoint that was called longest ago, which may have recovered since.
#[derive(Debug, Clone, Default)]
pub(crate) struct AttemptedEndpoints {
    latest: Arc<Mutex<[Option<Arc<str>>; 2]>>,
    /// Avoided from the beginning.
    others: Arc<[Arc<str>]>,
}

impl AttemptedEndpoints {
    /// Avoids these endpoints as well, to which another operation was sent.
    pub(crate) fn avoiding(others: impl IntoIterator<Item = Arc<str>>) -> Self {
        Self {
            latest: Arc::default(),
            others: others.into_iter().collect(),
        }
    }

    pub(in crate::balance) fn add(&self, address: &Arc<str>) {
        let mut latest = self.latest.lock();
        latest[1] = latest[0].replace(Arc::clone(address));
    }

    pub(super) fn contains(&self, address: &Arc<str>) -> bool {
        let latest = self.latest.lock();
        let mut avoided = latest.iter().flatten().chain(self.others.iter());
        avoided.any(|attempted| attempted == address)
    }

    /// The address of the latest attempt.
    pub(crate) fn last(&self) -> Option<Arc<str>> {
        self.latest.lock()[0].clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_latest_two_addresses() {
        let [a, b, c] = ["a:1", "b:1", "c:1"].map(Arc::<str>::from);
        let attempted = AttemptedEndpoints::default();
        assert_eq!(attempted.last(), None);
        for address in [&a, &b, &c] {
            attempted.add(address);
        }
        assert_eq!(attempted.last(), Some(Arc::clone(&c)));
        assert!(!attempted.contains(&a));
        assert!(attempted.contains(&b));
        assert!(attempted.contains(&c));
    }

    #[test]
    fn others_are_avoided_but_not_attempted() {
        let [a, b] = ["a:1", "b:1"].map(Arc::<str>::from);
        let attempted = AttemptedEndpoints::avoiding([Arc::clone(&a)]);
        assert_eq!(attempted.last(), None);
        assert!(attempted.contains(&a) && !attempted.contains(&b));
        attempted.add(&b);
        assert!(attempted.contains(&a) && attempted.contains(&b));
    }
}
