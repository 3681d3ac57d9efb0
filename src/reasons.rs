//! Tells new reasons of a lasting fault from repeated ones.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, SystemTime};

/// How long a reason counts as known after it was last seen. Members that fail in different ways
/// are tried in turn, and a round through all of them takes some seconds each.
const KNOWN_FOR: Duration = Duration::from_secs(60);

/// How many reasons are remembered, at most.
const CAPACITY: usize = 16;

/// The words before a number that tells faults apart, as in "HTTP 502" and "os error 111".
const CODE_NAMES: [&str; 4] = ["HTTP", "status", "code", "error"];

/// The reasons that were reported for one fault, so that each is logged once and wakes watchers
/// once, even if several alternate.
///
/// Reasons are alike if they differ only in words with digits: addresses, times, ids. The number
/// after one of [`CODE_NAMES`] counts.
#[derive(Debug, Default)]
pub(crate) struct SeenReasons(VecDeque<(u64, SystemTime)>);

impl SeenReasons {
    /// Records a reason that holds at `now`. Returns whether it is new.
    pub(crate) fn insert(&mut self, reason: &str, now: SystemTime) -> bool {
        let is_known = |at: SystemTime| now.duration_since(at).unwrap_or_default() < KNOWN_FOR;
        self.0.retain(|(_, at)| is_known(*at));
        let hash = hash_without_variable_words(reason);
        if let Some((_, at)) = self.0.iter_mut().find(|(seen, _)| *seen == hash) {
            *at = now;
            return false;
        }
        if self.0.len() == CAPACITY {
            self.0.pop_front();
        }
        self.0.push_back((hash, now));
        true
    }

    /// Forgets all reasons. Called when the fault has ended.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

fn hash_without_variable_words(reason: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let mut is_code = false;
    for word in reason.split_whitespace() {
        let is_left_out = !is_code && word.contains(|c: char| c.is_ascii_digit());
        let counted = if is_left_out { "#" } else { word };
        counted.hash(&mut hasher);
        is_code = CODE_NAMES.contains(&word.trim_start_matches('('));
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn reasons_that_alternate_are_new_once() {
        let mut seen = SeenReasons::default();
        let mut new = 0;
        for round in 0..1_000 {
            for reason in ["refused", "denied", "no leader"] {
                let now = START + Duration::from_secs(round);
                new += u32::from(seen.insert(reason, now));
            }
        }
        assert_eq!(new, 3);
        assert!(seen.insert("full", START));
        seen.clear();
        assert!(seen.insert("refused", START));
    }

    #[test]
    fn reason_that_returns_after_a_minute_is_new() {
        let mut seen = SeenReasons::default();
        assert!(seen.insert("refused", START));
        assert!(!seen.insert("refused", START + KNOWN_FOR / 2));
        assert!(!seen.insert("refused", START + KNOWN_FOR));
        assert!(seen.insert("refused", START + KNOWN_FOR * 2));
    }

    #[test]
    fn numbers_make_no_difference() {
        let mut seen = SeenReasons::default();
        assert!(seen.insert("no response of 10.0.0.1:2379 within 3.33s", START));
        assert!(!seen.insert("no response of 10.0.0.2:2379 within 41ms", START));
        assert!(!seen.insert("no response of etcd-2 within 5s", START));
        assert!(seen.insert("no response of etcd-2 within 5s: denied", START));
    }

    #[test]
    fn status_codes_count() {
        let mut seen = SeenReasons::default();
        for code in ["HTTP 502", "HTTP 503", "status code 502", "(os error 111)"] {
            let reason = format!("10.0.0.1:80: got {code} with text/html");
            assert!(seen.insert(&reason, START), "{reason}");
            let reason = format!("10.0.0.2:80: got {code} with text/html");
            assert!(!seen.insert(&reason, START), "{reason}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut seen = SeenReasons::default();
        for letters in 0..100 {
            assert!(seen.insert(&"x".repeat(letters), START));
        }
        assert_eq!(seen.0.len(), CAPACITY);
    }
}
