//! The guard against mass deletion: what vanishes from the set together with most of it, and is still
//! connected, is kept for a while.
//!
//! Registrations expire when their servers cannot reach etcd, or when etcd loses them, and neither says
//! that the servers are dead. One that vanishes alone is taken at its word.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

/// What vanishes within this time counts as vanished together. Leases that were renewed at different
/// moments end at different moments: each is renewed at a third of its time to live, and etcd looks for
/// ended ones twice a second; the rest is for those that were late.
pub(crate) fn window(ttl: Duration) -> Duration {
    ttl / 3 + MARGIN
}

/// With which the window of the default time to live, of 10 s, is 5 s.
const MARGIN: Duration = Duration::from_millis(1_667);

/// That of sources whose instances have no time to live.
pub(crate) const DEFAULT_WINDOW: Duration = Duration::from_secs(5);

/// How long they are kept unless configured: G4.
pub(crate) const DEFAULT_KEEP_FOR: Duration = Duration::from_secs(60);

/// What has vanished and is held on to: at first only in case it was one of many, out of use, and in use
/// from when it turns out that it was.
#[derive(Debug)]
pub(crate) struct MassDeletionGuard<K, M> {
    /// Zero: it is off.
    keep_for: Duration,
    /// What vanishes within this time has vanished together.
    window: Duration,
    held: BTreeMap<K, Held<M>>,
    /// When each of the last ones vanished.
    recent: VecDeque<Instant>,
}

#[derive(Debug)]
struct Held<M> {
    member: M,
    since: Instant,
    /// Until when it is in use; `None`: it is not.
    until: Option<Instant>,
}

impl<K: Ord + Clone, M> MassDeletionGuard<K, M> {
    pub(crate) fn new(keep_for: Duration, window: Duration) -> Self {
        Self {
            keep_for,
            window,
            held: BTreeMap::new(),
            recent: VecDeque::new(),
        }
    }

    /// Takes what has vanished without saying that it would; it is given back if it is not to be held.
    pub(crate) fn vanished(
        &mut self,
        key: K,
        member: M,
        is_connected: bool,
        now: Instant,
    ) -> Option<M> {
        if self.keep_for.is_zero() {
            return Some(member);
        }
        self.recent.push_back(now);
        if !is_connected {
            return Some(member);
        }
        let (since, until) = (now, None);
        let held = Held {
            member,
            since,
            until,
        };
        self.held.insert(key, held).map(|before| before.member)
    }

    /// Gives back the first that fits: it has come back.
    pub(crate) fn take(&mut self, fits: impl Fn(&K, &M) -> bool) -> Option<M> {
        let fit = |(key, held): (&K, &Held<M>)| fits(key, &held.member).then(|| key.clone());
        let key = self.held.iter().find_map(fit)?;
        self.held.remove(&key).map(|held| held.member)
    }

    /// Judges with how many there are in the set now. If more than that have vanished together, those that
    /// are held are in use from now on, for the time of the guard; returns how many vanished and which are
    /// newly in use.
    pub(crate) fn judge(&mut self, remaining: usize, now: Instant) -> (usize, Vec<&M>) {
        while self
            .recent
            .front()
            .is_some_and(|at| now >= *at + self.window)
        {
            self.recent.pop_front();
        }
        let together = self.recent.len();
        let mut kept = Vec::new();
        if together > remaining {
            for held in self.held.values_mut().filter(|held| held.until.is_none()) {
                held.until = Some(now + self.keep_for);
                kept.push(&held.member);
            }
        }
        (together, kept)
    }

    /// Gives up those that are not connected any more, and those whose time is over.
    pub(crate) fn release(&mut self, is_connected: impl Fn(&M) -> bool, now: Instant) -> Vec<M> {
        let window = self.window;
        let is_over = |held: &Held<M>| now >= held.ends(window) || !is_connected(&held.member);
        let over = self.held.iter().filter(|(_, held)| is_over(held));
        let over: Vec<K> = over.map(|(key, _)| key.clone()).collect();
        let over = over.iter().filter_map(|key| self.held.remove(key));
        over.map(|held| held.member).collect()
    }

    /// When the next one's time is over.
    pub(crate) fn ends_at(&self) -> Option<Instant> {
        self.held.values().map(|held| held.ends(self.window)).min()
    }

    /// Those in use.
    pub(crate) fn kept(&self) -> impl Iterator<Item = &M> + Clone {
        let kept = self.held.values().filter(|held| held.until.is_some());
        kept.map(|held| &held.member)
    }
}

impl<M> Held<M> {
    fn ends(&self, window: Duration) -> Instant {
        self.until.unwrap_or(self.since + window)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const KEEP: Duration = Duration::from_secs(60);

    #[test]
    fn one_of_many_is_taken_at_its_word_and_most_of_them_together_are_not() {
        let now = Instant::now();
        let mut guard = MassDeletionGuard::new(KEEP, DEFAULT_WINDOW);
        assert_eq!(guard.vanished(1, 1, true, now), None);
        assert_eq!(guard.judge(4, now).1.len(), 0);
        assert_eq!(guard.kept().count(), 0);
        // One after the other within the window: with the third of five it is most of them.
        let later = now + DEFAULT_WINDOW / 2;
        guard.vanished(2, 2, true, later);
        assert_eq!(guard.judge(3, later).1.len(), 0);
        guard.vanished(3, 3, true, later);
        assert_eq!(guard.judge(2, later), (3, vec![&1, &2, &3]));
        assert_eq!(guard.kept().count(), 3);
        assert_eq!(guard.ends_at(), Some(later + KEEP));
        assert_eq!(guard.take(|key, _| *key == 2), Some(2));
        assert_eq!(guard.release(|member| *member != 1, later), [1]);
        assert_eq!(guard.release(|_| true, later + KEEP), [3]);
        assert_eq!(guard.ends_at(), None);
    }

    #[test]
    fn a_fleet_that_is_replaced_by_another_goes() {
        let now = Instant::now();
        let mut guard = MassDeletionGuard::new(KEEP, DEFAULT_WINDOW);
        for key in 0..3 {
            guard.vanished(key, key, true, now);
        }
        assert_eq!(guard.judge(3, now).1.len(), 0);
        assert_eq!(guard.release(|_| true, now + DEFAULT_WINDOW).len(), 3);
    }

    /// As kitex has them: renewed every 20 s, they end over 20 s.
    #[test]
    fn leases_of_a_minute_that_end_one_after_the_other_have_ended_together() {
        let begun = Instant::now();
        let mut guard = MassDeletionGuard::new(KEEP, window(Duration::from_secs(60)));
        for key in 0..10 {
            let now = begun + Duration::from_secs(2) * key;
            guard.vanished(key, key, true, now);
            guard.judge(9 - key as usize, now);
            assert_eq!(guard.release(|_| true, now).len(), 0);
        }
        assert_eq!(guard.kept().count(), 10);
        assert!(window(Duration::from_secs(10)) >= DEFAULT_WINDOW);
    }

    #[test]
    fn switched_off_it_holds_nothing() {
        let mut guard = MassDeletionGuard::new(Duration::ZERO, DEFAULT_WINDOW);
        assert_eq!(guard.vanished(1, 1, true, Instant::now()), Some(1));
        assert_eq!(guard.judge(0, Instant::now()).1.len(), 0);
    }

    #[derive(Debug, Clone)]
    enum Happening {
        Come(u8),
        Vanish(BTreeSet<u8>),
        Disconnect(u8),
        Time(u64),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        let key = 0u8..6;
        prop_oneof![
            4 => key.clone().prop_map(Happening::Come),
            3 => proptest::collection::btree_set(key.clone(), 1..6).prop_map(Happening::Vanish),
            1 => key.prop_map(Happening::Disconnect),
            3 => (0u64..20_000).prop_map(Happening::Time),
        ]
    }

    proptest! {
        #[test]
        fn none_is_held_that_is_known_or_lost_nor_for_longer_than_its_time(
            happenings in proptest::collection::vec(happening(), 0..60),
        ) {
            let mut now = Instant::now();
            let mut guard = MassDeletionGuard::new(KEEP, DEFAULT_WINDOW);
            let (mut known, mut connected) = (BTreeSet::new(), BTreeSet::new());
            let mut vanished_at = BTreeMap::new();
            for happening in happenings {
                match happening {
                    Happening::Come(key) => {
                        guard.take(|of, _| *of == key);
                        known.insert(key);
                        connected.insert(key);
                    }
                    Happening::Vanish(keys) => {
                        for key in keys {
                            if known.remove(&key) {
                                let is_connected = connected.contains(&key);
                                guard.vanished(key, key, is_connected, now);
                                vanished_at.insert(key, now);
                            }
                        }
                        let together = guard.judge(known.len(), now).0;
                        if together > known.len() {
                            // All that are connected and vanished within the window are in use.
                            for (key, at) in &vanished_at {
                                let due = !known.contains(key) && connected.contains(key)
                                    && now < *at + DEFAULT_WINDOW;
                                let kept = guard.kept().any(|kept| kept == key);
                                prop_assert!(!due || kept, "{key}");
                            }
                        }
                    }
                    Happening::Disconnect(key) => drop(connected.remove(&key)),
                    Happening::Time(millis) => now += Duration::from_millis(millis),
                }
                guard.release(|key| connected.contains(key), now);
                for key in guard.held.keys() {
                    prop_assert!(!known.contains(key) && connected.contains(key));
                    prop_assert!(now < vanished_at[key] + DEFAULT_WINDOW + KEEP);
                }
                prop_assert!(guard.ends_at().is_none_or(|at| at > now));
            }
            guard.release(|_| true, now + DEFAULT_WINDOW + KEEP);
            prop_assert!(guard.held.is_empty());
        }
    }
}
