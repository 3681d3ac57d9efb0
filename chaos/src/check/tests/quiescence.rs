//! Tests of the quiet periods.

use super::*;
use crate::check::quiescence;
use crate::schedule::Path;

#[test]
fn server_registered_too_late_is_found() {
    let id = NAMED.to_string();
    let right = "127.0.0.1:1000";
    let registered = || History::from(0.0).put(&id, right);
    // Deleted at 2 s.
    let back = |at: i64| registered().delete(&id).others(at).put(&id, right);
    let unregistered = |history: History, disturbances: &[Disturbance], life: Life| {
        quiescence::unregistered_servers(&[life], &[history.0], disturbances, seconds(30.0))
            .violations
    };
    let manual_edits = disturbance(Scope::Server(NAMED), 2.0, 2.0);
    let next = |scope, at| [manual_edits, disturbance(scope, at, at + 1.0)];

    let found = unregistered(back(12), &next(Scope::All, 8.0), life(None));
    assert_eq!(found.len(), 1);
    let said = "has no key services/chaos/s01-0, from 2.000 s to 7.000 s";
    assert!(found[0].contains(said), "{found:?}");
    let mine = Scope::Path(Path::Server(1));
    assert_eq!(
        unregistered(back(12), &next(mine, 8.0), life(None)).len(),
        1
    );
    // The key returns at the end of the quiet period, after more than 5 s.
    assert_eq!(unregistered(back(12), &[manual_edits], life(None)).len(), 1);

    // The key returns in time, or the period is too short.
    assert_eq!(unregistered(back(6), &[manual_edits], life(None)), [""; 0]);
    let soon = next(Scope::All, 6.9);
    assert_eq!(unregistered(back(12), &soon, life(None)), [""; 0]);
    // A fault of another server does not shorten the period.
    let another = Scope::Path(Path::Server(2));
    assert_eq!(
        unregistered(back(12), &next(another, 6.9), life(None)).len(),
        1
    );
    // The server ended in between.
    let killed = life(Some((ExitKind::Killed, 6.0, 6.0)));
    assert_eq!(unregistered(back(12), &[manual_edits], killed), [""; 0]);

    // The key disappears without a fault, in a period that began correctly.
    let gone = registered().others(4).delete(&id);
    assert_eq!(unregistered(gone, &[manual_edits], life(None)).len(), 1);
}

#[test]
fn second_key_is_checked() {
    let right = "127.0.0.1:1000";
    let mut twice = life(None);
    twice.name = TWICE;
    let one = || History::from(0.0).put("s00-0", right);
    let unregistered = |history: History| {
        quiescence::unregistered_servers(&[twice.clone()], &[history.0], &[], seconds(9.0))
    };
    let found = unregistered(one()).violations;
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("s00-0-b"), "{found:?}");
    assert_eq!(
        unregistered(one().put("s00-0-b", right)).violations,
        [""; 0]
    );
}

#[test]
fn directory_that_converges_too_late_is_found() {
    // "a" at 1 s, "b" at 2 s.
    let epochs = [History::from(0.0).put("a", "h:1").put("b", "h:2").0];
    let first = || shown_snapshot(1.1, 2, &[("a", "h:1")]);
    let second = |at| shown_snapshot(at, 3, &[("a", "h:1"), ("b", "h:2")]);
    let diverged = |shown: &[ShownSnapshot], scope| {
        let next = disturbance(scope, 8.0, 9.0);
        quiescence::diverged_directories(0, shown, &epochs, &[next], seconds(13.0)).violations
    };
    let found = diverged(&[first(), second(8.5)], Scope::All);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("from 2.000 s to 7.000 s"), "{found:?}");
    assert!(
        found[0].contains("services/chaos/b is missing"),
        "{found:?}"
    );
    let mine = Scope::Path(Path::Client(0));
    assert_eq!(diverged(&[first(), second(8.5)], mine).len(), 1);

    assert_eq!(diverged(&[first(), second(6.9)], Scope::All), [""; 0]);
}

#[test]
fn directory_that_stops_updating_is_found() {
    // "a" at 1 s, "b" at 6 s, in a time of calm from 2 s on.
    let epochs = [History::from(0.0)
        .put("a", "h:1")
        .others(6)
        .put("b", "h:2")
        .0];
    let others = [("other", "h:1"), ("a", "h:1")];
    let first = || shown_snapshot(5.1, 6, &others);
    let diverged = |shown: &[ShownSnapshot], until| {
        let faults = [
            disturbance(Scope::All, 1.0, 2.0),
            disturbance(Scope::All, until, 30.0),
        ];
        quiescence::diverged_directories(0, shown, &epochs, &faults, seconds(30.0)).violations
    };
    let found = diverged(&[first()], 12.0);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("from 6.000 s to 11.000 s"), "{found:?}");
    // The directory shows the change within 5 s, or the period ends before that.
    let second = shown_snapshot(10.9, 7, &[("other", "h:1"), ("a", "h:1"), ("b", "h:2")]);
    assert_eq!(diverged(&[first(), second], 12.0), [""; 0]);
    assert_eq!(diverged(&[first()], 10.9), [""; 0]);
}

#[test]
fn coverage_is_counted_and_none_is_insufficient() {
    let epochs = [History::from(0.0).put("a", "h:1").others(6).0];
    let shown = [shown_snapshot(0.5, 1, &[])];
    let windows = |disturbances: &[Disturbance]| {
        let judged =
            quiescence::diverged_directories(0, &shown, &epochs, disturbances, seconds(20.0));
        (judged.until(seconds(20.0)), judged.until(seconds(7.0)))
    };
    // Windows begin at 0.5 s and after each change from 1 s to 5 s; three of them end by 7 s.
    assert_eq!(windows(&[]), (6, 3));
    // The machine stalled too often.
    let stalls = [4.0, 8.0, 12.0, 16.0].map(|at| disturbance(Scope::All, at, at + 1.0));
    assert_eq!(windows(&stalls), (0, 0));

    let said = |seconds, [directories, registrations, leavings]: [usize; 3]| {
        let coverage = Coverage {
            directories,
            registrations,
            leavings,
        };
        insufficient_coverage(Duration::from_secs(seconds), coverage).is_some()
    };
    assert!(said(60, [0, 9, 9]) && said(60, [9, 0, 9]) && said(60, [9, 9, 0]));
    assert!(!said(60, [1, 1, 1]));
    // A short run may have no quiet period.
    assert!(!said(59, [0, 0, 0]));
}
