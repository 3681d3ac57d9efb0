//! The guard against mass deletion: if most instances disappear together, it keeps their connected
//! endpoints for a while.
//!
//! Registrations also expire when servers cannot reach etcd, or when etcd loses its data. Neither
//! means that the servers are dead. An instance that disappears alone is removed at once.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

/// The window for leases of a given TTL. Instances that disappear within one window count as having
/// disappeared together.
///
/// Leases renewed at different moments expire at different moments. Each is renewed after a third
/// of its TTL, so that expiries spread over that time. etcd looks for expired leases twice a
/// second; the rest of the margin is for late renewals.
pub(crate) fn window_for_ttl(ttl: Duration) -> Duration {
    ttl / 3 + WINDOW_MARGIN
}

/// Makes the window of the default TTL, 10 s, [`DEFAULT_WINDOW`].
const WINDOW_MARGIN: Duration = Duration::from_millis(1_667);

/// The window for sources whose instances have no TTL.
pub(crate) const DEFAULT_WINDOW: Duration = Duration::from_secs(5);

/// How long retained endpoints serve unless configured otherwise.
pub(crate) const DEFAULT_KEEP_FOR: Duration = Duration::from_secs(60);

/// Decides which of the vanished members stay in service.
///
/// A vanished member first waits one window, out of service. If the guard finds a mass deletion in
/// that time, the member serves again for `keep_for`.
#[derive(Debug)]
pub(crate) struct MassDeletionGuard<K, M> {
    /// Zero disables the guard.
    keep_for: Duration,
    window: Duration,
    held: BTreeMap<K, Retained<M>>,
    /// When the instances of the last window vanished, the oldest first.
    recent: VecDeque<Instant>,
}

#[derive(Debug)]
struct Retained<M> {
    member: M,
    stage: Stage,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    /// Out of service, in case others vanish too.
    Waiting { until: Instant },
    /// Back in service.
    Serving { until: Instant },
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

    /// Takes a member whose instance vanished without having been draining. Returns the member if
    /// the guard does not hold it, because the guard is disabled or the member is not connected.
    pub(crate) fn on_vanished(
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
        let until = now + self.window;
        let stage = Stage::Waiting { until };
        let before = self.held.insert(key, Retained { member, stage });
        before.map(|before| before.member)
    }

    /// Returns the first member that matches, because its instance has come back.
    pub(crate) fn reclaim(&mut self, matches: impl Fn(&K, &M) -> bool) -> Option<M> {
        let mut held = self.held.iter();
        let (key, _) = held.find(|(key, held)| matches(key, &held.member))?;
        let key = key.clone();
        self.held.remove(&key).map(|held| held.member)
    }

    /// Decides whether the recent removals are a mass deletion: within the window more instances
    /// have vanished than remain. If so, puts the waiting members back into service. Returns how
    /// many instances vanished, and the members that serve again.
    pub(crate) fn evaluate(&mut self, remaining: usize, now: Instant) -> (usize, Vec<&M>) {
        let is_old = |vanished_at: &Instant| now >= *vanished_at + self.window;
        while self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
        let vanished = self.recent.len();
        let mut serving = Vec::new();
        if vanished > remaining {
            for held in self.held.values_mut() {
                if let Stage::Waiting { .. } = held.stage {
                    let until = now + self.keep_for;
                    held.stage = Stage::Serving { until };
                    serving.push(&held.member);
                }
            }
        }
        (vanished, serving)
    }

    /// Releases the members that lost their connection or reached the end of their time.
    pub(crate) fn release(&mut self, is_connected: impl Fn(&M) -> bool, now: Instant) -> Vec<M> {
        let is_over = |held: &Retained<M>| now >= held.until() || !is_connected(&held.member);
        let over = self.held.iter().filter(|(_, held)| is_over(held));
        let over: Vec<K> = over.map(|(key, _)| key.clone()).collect();
        let over = over.iter().filter_map(|key| self.held.remove(key));
        over.map(|held| held.member).collect()
    }

    /// When the time of the next member is over.
    pub(crate) fn next_release_at(&self) -> Option<Instant> {
        self.held.values().map(Retained::until).min()
    }

    /// The members in service.
    pub(crate) fn retained_members(&self) -> impl Iterator<Item = &M> + Clone {
        let is_serving = |held: &&Retained<M>| matches!(held.stage, Stage::Serving { .. });
        let serving = self.held.values().filter(is_serving);
        serving.map(|held| &held.member)
    }
}

impl<M> Retained<M> {
    fn until(&self) -> Instant {
        match self.stage {
            Stage::Waiting { until } | Stage::Serving { until } => until,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const KEEP: Duration = Duration::from_secs(60);

    #[test]
    fn only_a_majority_that_vanishes_together_is_retained() {
        let now = Instant::now();
        let mut guard = MassDeletionGuard::new(KEEP, DEFAULT_WINDOW);
        assert_eq!(guard.on_vanished(1, 1, true, now), None);
        assert_eq!(guard.evaluate(4, now).1.len(), 0);
        assert_eq!(guard.retained_members().count(), 0);
        // With the third of five within the window, most have vanished.
        let later = now + DEFAULT_WINDOW / 2;
        guard.on_vanished(2, 2, true, later);
        assert_eq!(guard.evaluate(3, later).1.len(), 0);
        guard.on_vanished(3, 3, true, later);
        assert_eq!(guard.evaluate(2, later), (3, vec![&1, &2, &3]));
        assert_eq!(guard.retained_members().count(), 3);
        assert_eq!(guard.next_release_at(), Some(later + KEEP));
        assert_eq!(guard.reclaim(|key, _| *key == 2), Some(2));
        assert_eq!(guard.release(|member| *member != 1, later), [1]);
        assert_eq!(guard.release(|_| true, later + KEEP), [3]);
        assert_eq!(guard.next_release_at(), None);
    }

    #[test]
    fn replaced_fleet_is_released() {
        let now = Instant::now();
        let mut guard = MassDeletionGuard::new(KEEP, DEFAULT_WINDOW);
        for key in 0..3 {
            guard.on_vanished(key, key, true, now);
        }
        assert_eq!(guard.evaluate(3, now).1.len(), 0);
        assert_eq!(guard.release(|_| true, now + DEFAULT_WINDOW).len(), 3);
    }

    /// kitex's leases of 60 s are renewed every 20 s, so that they expire over 20 s.
    #[test]
    fn window_covers_the_expiries_of_one_ttl() {
        let start = Instant::now();
        let mut guard = MassDeletionGuard::new(KEEP, window_for_ttl(Duration::from_secs(60)));
        for key in 0..10 {
            let now = start + Duration::from_secs(2) * key;
            guard.on_vanished(key, key, true, now);
            guard.evaluate(9 - key as usize, now);
            assert_eq!(guard.release(|_| true, now).len(), 0);
        }
        assert_eq!(guard.retained_members().count(), 10);
        assert!(window_for_ttl(Duration::from_secs(10)) >= DEFAULT_WINDOW);
    }

    #[test]
    fn disabled_guard_holds_nothing() {
        let mut guard = MassDeletionGuard::new(Duration::ZERO, DEFAULT_WINDOW);
        assert_eq!(guard.on_vanished(1, 1, true, Instant::now()), Some(1));
        assert_eq!(guard.evaluate(0, Instant::now()).1.len(), 0);
    }

    #[derive(Debug, Clone)]
    enum Op {
        Add(u8),
        Vanish(BTreeSet<u8>),
        Disconnect(u8),
        Advance(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let key = 0u8..6;
        prop_oneof![
            4 => key.clone().prop_map(Op::Add),
            3 => proptest::collection::btree_set(key.clone(), 1..6).prop_map(Op::Vanish),
            1 => key.prop_map(Op::Disconnect),
            3 => (0u64..20_000).prop_map(Op::Advance),
        ]
    }

    proptest! {
        #[test]
        fn held_members_are_absent_connected_and_within_their_time(
            ops in proptest::collection::vec(op(), 0..60),
        ) {
            let mut now = Instant::now();
            let mut guard = MassDeletionGuard::new(KEEP, DEFAULT_WINDOW);
            let (mut known, mut connected) = (BTreeSet::new(), BTreeSet::new());
            let mut vanished_at = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Add(key) => {
                        guard.reclaim(|of, _| *of == key);
                        known.insert(key);
                        connected.insert(key);
                    }
                    Op::Vanish(keys) => {
                        for key in keys {
                            if known.remove(&key) {
                                let is_connected = connected.contains(&key);
                                guard.on_vanished(key, key, is_connected, now);
                                vanished_at.insert(key, now);
                            }
                        }
                        let vanished = guard.evaluate(known.len(), now).0;
                        if vanished > known.len() {
                            // Every connected member that vanished within the window serves.
                            for (key, at) in &vanished_at {
                                let due = !known.contains(key) && connected.contains(key)
                                    && now < *at + DEFAULT_WINDOW;
                                let is_retained = guard.retained_members().any(|of| of == key);
                                prop_assert!(!due || is_retained, "{key}");
                            }
                        }
                    }
                    Op::Disconnect(key) => drop(connected.remove(&key)),
                    Op::Advance(millis) => now += Duration::from_millis(millis),
                }
                guard.release(|key| connected.contains(key), now);
                for key in guard.held.keys() {
                    prop_assert!(!known.contains(key) && connected.contains(key));
                    prop_assert!(now < vanished_at[key] + DEFAULT_WINDOW + KEEP);
                }
                prop_assert!(guard.next_release_at().is_none_or(|at| at > now));
            }
            guard.release(|_| true, now + DEFAULT_WINDOW + KEEP);
            prop_assert!(guard.held.is_empty());
        }
    }
}
