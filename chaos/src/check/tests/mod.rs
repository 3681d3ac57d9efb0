//! A checker that cannot fail proves nothing. These tests make up each kind of violation and expect
//! it to be found, and make up similar histories without one. Tests of directories are in this
//! file.

mod quiescence;
mod servers;
mod shutdowns;

use super::*;
use crate::record::{Disturbance, SERVICE, Scope};
use crate::schedule::Name;

const NAMED: Name = Name {
    slot: 1,
    generation: 0,
};

/// A server with a second key, of the id `s00-0-b`.
const TWICE: Name = Name {
    slot: 0,
    generation: 0,
};

const TTL: Duration = Duration::from_secs(3);

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn key(id: &str) -> String {
    range() + id
}

fn value(address: &str) -> Option<Vec<u8>> {
    Some(format!(r#"{{"Op":0,"Addr":"{address}"}}"#).into())
}

/// A history whose changes have consecutive revisions, from 2 on, one second apart.
#[derive(Default)]
struct History(Epoch);

impl History {
    fn from(began: f64) -> Self {
        Self(Epoch {
            began: seconds(began),
            known_to: 1,
            ..Epoch::default()
        })
    }

    fn change(mut self, id: &str, value: Option<Vec<u8>>, lease: i64) -> Self {
        let epoch = &mut self.0;
        epoch.known_to += 1;
        let before = epoch.changes.iter().rfind(|change| change.key == key(id));
        let created = before.filter(|before| before.value.is_some());
        epoch.changes.push(Change {
            at: epoch.began + seconds((epoch.known_to - 1) as f64),
            revision: epoch.known_to,
            key: key(id),
            create_revision: created.map_or(epoch.known_to, |before| before.create_revision),
            lease,
            value,
        });
        self
    }

    fn put(self, id: &str, address: &str) -> Self {
        self.change(id, value(address), 7)
    }

    fn drain(self, id: &str, address: &str) -> Self {
        let value = format!(r#"{{"Op":0,"Addr":"{address}","Metadata":{{"status":"draining"}}}}"#);
        self.change(id, Some(value.into()), 7)
    }

    /// Adds changes of other keys until this second.
    fn others(mut self, until: i64) -> Self {
        while self.0.known_to < until {
            self = self.put("other", "h:1");
        }
        self
    }

    fn garbage(self, id: &str) -> Self {
        self.change(id, Some(b"garbage".to_vec()), 0)
    }

    fn delete(self, id: &str) -> Self {
        self.change(id, None, 0)
    }

    fn wipe(mut self, at: f64, whole: bool) -> Self {
        self.0.ended = Some(seconds(at));
        self.0.whole = whole;
        self
    }
}

fn shown_snapshot(at: f64, revision: i64, instances: &[(&str, &str)]) -> ShownSnapshot {
    let instances = instances.iter().map(|(id, address)| {
        let instance = Instance::new(SERVICE, *address).id(*id);
        (key(id), Arc::new(instance))
    });
    ShownSnapshot {
        at: seconds(at),
        revision,
        instances: instances.collect(),
    }
}

fn divergences(shown: &[ShownSnapshot], epochs: Vec<History>) -> Vec<String> {
    let epochs: Vec<Epoch> = epochs.into_iter().map(|history| history.0).collect();
    directory(0, shown, &epochs).divergences
}

fn life(end: Option<(ExitKind, f64, f64)>) -> Life {
    Life {
        name: NAMED,
        address: "127.0.0.1:1000".to_owned(),
        started: Duration::ZERO,
        end: end.map(|(how, signalled, gone)| Exit {
            how,
            signalled: seconds(signalled),
            gone: seconds(gone),
        }),
    }
}

/// A fault with this scope.
fn disturbance(scope: Scope, from: f64, to: f64) -> Disturbance {
    Disturbance {
        from: seconds(from),
        to: seconds(to),
        scope,
    }
}

fn one_history() -> History {
    History::from(0.0)
        .put("a", "h:1")
        .put("b", "h:2")
        .delete("a")
        .put("a", "h:3")
}

#[test]
fn repeated_and_skipped_states_are_no_divergence() {
    let shown = [
        shown_snapshot(0.0, 1, &[]),
        shown_snapshot(1.0, 2, &[("a", "h:1")]),
        shown_snapshot(1.5, 2, &[("a", "h:1")]),
        shown_snapshot(4.0, 4, &[("b", "h:2")]),
        shown_snapshot(9.0, 5, &[("a", "h:3"), ("b", "h:2")]),
    ];
    assert_eq!(divergences(&shown, vec![one_history()]), [""; 0]);
}

#[test]
fn missing_extra_and_wrong_instances_are_found() {
    for (instances, said) in [
        (vec![("a", "h:1")], "services/chaos/b is missing"),
        (
            vec![("a", "h:1"), ("b", "h:2"), ("c", "h:9")],
            "services/chaos/c should not be there",
        ),
        (
            vec![("a", "h:1"), ("b", "h:8")],
            "services/chaos/b is shown at h:8",
        ),
    ] {
        let found = divergences(&[shown_snapshot(3.0, 3, &instances)], vec![one_history()]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("revision 3"), "{found:?}");
        assert!(found[0].contains(said), "{found:?}");
    }
}

#[test]
fn state_under_a_wrong_revision_is_found() {
    let found = divergences(
        &[shown_snapshot(3.0, 4, &[("a", "h:1"), ("b", "h:2")])],
        vec![one_history()],
    );
    assert_eq!(found.len(), 1);
}

#[test]
fn decreasing_revision_is_found() {
    let back = [
        shown_snapshot(3.0, 3, &[("a", "h:1"), ("b", "h:2")]),
        shown_snapshot(4.0, 2, &[("a", "h:1")]),
    ];
    let found = divergences(&back, vec![one_history()]);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("back from revision 3"), "{found:?}");
}

#[test]
fn unknown_revision_is_found() {
    let instances = [("a", "h:3"), ("b", "h:2")];
    let found = divergences(&[shown_snapshot(9.0, 6, &instances)], vec![one_history()]);
    assert!(found[0].contains("history 0 ends at 5"), "{found:?}");
}

#[test]
fn revision_may_fall_once_after_a_wipe() {
    let histories = || {
        vec![
            one_history().wipe(10.0, true),
            History::from(10.0).put("a", "h:4"),
        ]
    };
    let old = |at| shown_snapshot(at, 5, &[("a", "h:3"), ("b", "h:2")]);
    let new = |at| shown_snapshot(at, 2, &[("a", "h:4")]);
    assert_eq!(divergences(&[old(9.0), new(12.0)], histories()), [""; 0]);
    // A directory that is cut off shows the old history for longer.
    assert_eq!(
        divergences(&[old(9.0), old(20.0), new(21.0)], histories()),
        [""; 0]
    );
    assert_eq!(divergences(&[old(9.0), new(9.5)], histories()).len(), 1);
    assert_eq!(
        divergences(&[old(9.0), new(12.0), old(13.0)], histories()).len(),
        1
    );
}

#[test]
fn mixture_of_two_histories_is_found() {
    let first = one_history().wipe(10.0, true);
    let second = History::from(10.0)
        .put("x", "h:5")
        .put("x", "h:6")
        .put("x", "h:7")
        .put("x", "h:8")
        .put("x", "h:9");
    // A watch that continues in the new history on top of the old state shows this mixture.
    let mixed = shown_snapshot(16.0, 6, &[("a", "h:3"), ("b", "h:2"), ("x", "h:9")]);
    let old = shown_snapshot(9.0, 5, &[("a", "h:3"), ("b", "h:2")]);
    let found = divergences(&[old, mixed], vec![first, second]);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].contains("history 1: services/chaos/a should not be there"),
        "{found:?}"
    );
}

#[test]
fn unjudged_only_if_the_end_is_uncertain() {
    let late = [shown_snapshot(9.9, 6, &[("c", "h:1")])];
    for (whole, divergences, unjudged) in [(true, 1, 0), (false, 0, 1)] {
        let epochs = [one_history().wipe(10.0, whole).0, History::from(10.0).0];
        let verdict = directory(0, &late, &epochs);
        assert_eq!(verdict.divergences.len(), divergences);
        assert_eq!(verdict.unjudged, unjudged);
    }
}

#[test]
fn invalid_value_keeps_an_earlier_instance_of_the_key() {
    let history = || {
        vec![
            History::from(0.0)
                .put("a", "h:1")
                .delete("a")
                .put("a", "h:2")
                .put("a", "h:3")
                .garbage("a"),
        ]
    };
    for allowed in [&[][..], &[("a", "h:2")], &[("a", "h:3")]] {
        assert_eq!(
            divergences(&[shown_snapshot(9.0, 6, allowed)], history()),
            [""; 0]
        );
    }
    let before_it_was_deleted = shown_snapshot(9.0, 6, &[("a", "h:1")]);
    assert_eq!(divergences(&[before_it_was_deleted], history()).len(), 1);
}

#[test]
fn differences_now_names_the_missing_key() {
    let changes = one_history().0.changes;
    let truth = shown_snapshot(9.0, 5, &[("a", "h:3"), ("b", "h:2")]);
    assert_eq!(differences_now(&changes, &truth.instances), [""; 0]);
    let behind = shown_snapshot(9.0, 4, &[("b", "h:2")]);
    let found = differences_now(&changes, &behind.instances);
    assert_eq!(found, ["services/chaos/a is missing"]);
}
