//! Tests of the keys of ended servers.

use super::*;
use crate::check::shutdowns::{any_dead_registered, key_deadline, leftover_keys, overdue_keys};
use crate::record::Extension;
use crate::schedule::{Fault, Path};

const RIGHT: &str = "127.0.0.1:1000";

fn named_life(name: Name, how: ExitKind, signalled: f64, gone: f64) -> Life {
    Life {
        name,
        ..life(Some((how, signalled, gone)))
    }
}

fn leader(at: f64) -> Extension {
    let at = seconds(at);
    Extension::Leader { at }
}

fn delayed_extension(from: f64, to: f64, path: Option<Path>) -> Extension {
    let (from, to) = (seconds(from), seconds(to));
    Extension::Delayed { from, to, path }
}

fn standstill(from: f64, to: f64) -> Extension {
    let (from, to) = (seconds(from), seconds(to));
    Extension::Standstill { from, to }
}

/// The time by which the key of a server killed at 1 s must be gone.
fn limit(extensions: &[Extension]) -> f64 {
    let life = life(Some((ExitKind::Killed, 1.0, 1.0)));
    let limits = life
        .end
        .map(|end| key_deadline(&life, end, TTL, extensions));
    limits.unwrap_or_default().as_secs_f64()
}

/// The overdue keys of that server, last observed at 60 s.
fn overdue_keys_of(name: Name, history: History) -> Vec<String> {
    let lives = [named_life(name, ExitKind::Killed, 1.0, 1.0)];
    overdue_keys(&lives, &[history.0], &[], TTL, seconds(60.0))
}

#[test]
fn key_that_outlives_its_lease_is_found() {
    let id = NAMED.to_string();
    let registered = || History::from(0.0).put(&id, RIGHT);
    // Deleted at 2 s, in time.
    assert_eq!(overdue_keys_of(NAMED, registered().delete(&id)), [""; 0]);
    // Never deleted.
    let found = overdue_keys_of(NAMED, registered());
    assert!(found[0].contains("is still there at 60.000 s"), "{found:?}");
    // Deleted at 10 s, too late.
    let found = overdue_keys_of(NAMED, registered().others(10).delete(&id));
    assert!(found[0].contains("was there until 10.000 s"), "{found:?}");
}

#[test]
fn both_keys_must_expire() {
    let both = || History::from(0.0).put("s00-0", RIGHT).put("s00-0-b", RIGHT);
    let lives = [named_life(TWICE, ExitKind::Killed, 1.0, 1.0)];
    for (left, gone) in [("s00-0", "s00-0-b"), ("s00-0-b", "s00-0")] {
        let history = both().delete(gone);
        assert!(any_dead_registered(&lives, &history.0.changes));
        let found = overdue_keys_of(TWICE, history);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains(&format!("{}, which", key(left))),
            "{found:?}"
        );
    }
    let history = both().delete("s00-0").delete("s00-0-b");
    assert!(!any_dead_registered(&lives, &history.0.changes));
    assert_eq!(overdue_keys_of(TWICE, history), [""; 0]);
}

#[test]
fn each_new_leader_restarts_the_ttl() {
    assert_eq!(limit(&[]), 7.0);
    assert_eq!(limit(&[leader(5.0)]), 11.0);
    assert_eq!(limit(&[leader(10.0), leader(5.0)]), 16.0);
    // A leader before the exit, or after the key had to be gone, changes nothing.
    assert_eq!(limit(&[leader(0.5)]), 7.0);
    assert_eq!(limit(&[leader(7.5)]), 7.0);
}

#[test]
fn message_delayed_across_the_exit_extends_once() {
    let mine = NAMED.path();
    for path in [None, mine] {
        assert_eq!(limit(&[delayed_extension(0.5, 4.0, path)]), 10.0);
        // A dead server sends no message that could be delayed.
        assert_eq!(limit(&[delayed_extension(1.5, 4.0, path)]), 7.0);
        assert_eq!(
            limit(&[
                delayed_extension(0.5, 4.0, path),
                delayed_extension(5.0, 9.0, path)
            ]),
            10.0
        );
        // The delay ended before the exit.
        assert_eq!(limit(&[delayed_extension(0.2, 0.9, path)]), 7.0);
        // The key had to be gone before the delay ended.
        assert_eq!(limit(&[delayed_extension(0.5, 7.5, path)]), 7.0);
    }
    assert_eq!(
        limit(&[delayed_extension(0.5, 4.0, Some(Path::Server(0)))]),
        7.0
    );
}

#[test]
fn standstill_is_added_once() {
    assert_eq!(limit(&[standstill(2.0, 4.0)]), 9.0);
    // Only the time after the exit counts, and each moment once.
    assert_eq!(limit(&[standstill(0.0, 2.0)]), 8.0);
    let apiece = [
        standstill(2.0, 3.0),
        standstill(3.0, 4.0),
        standstill(2.5, 3.5),
    ];
    assert_eq!(limit(&apiece), 9.0);
    assert_eq!(limit(&[standstill(7.5, 8.0)]), 7.0);
    // All members end and start again with a new leader.
    assert_eq!(limit(&[standstill(2.0, 9.0), leader(9.2)]), 15.2);
}

#[test]
fn restart_of_one_member_extends_nothing() {
    let by = |fault: Fault| Extension::by(&fault, seconds(0.5), seconds(4.0));
    for fault in [
        Fault::KillMember(0),
        Fault::RestartMember(0),
        Fault::WipeMember(0),
    ] {
        assert!(by(fault.clone()).is_none(), "{fault}");
    }
    let limit_by = |fault| limit(&by(fault).into_iter().collect::<Vec<_>>());
    let path = Path::Server(NAMED.slot);
    for fault in [
        Fault::PauseMember(0),
        Fault::PauseAll,
        Fault::Cut(path),
        Fault::Blackhole(path),
    ] {
        assert_eq!(limit_by(fault), 10.0);
    }
}

#[test]
fn key_overwritten_without_a_lease_is_ignored() {
    let id = NAMED.to_string();
    let manual_edits = History::from(0.0).put(&id, RIGHT).garbage(&id);
    assert_eq!(overdue_keys_of(NAMED, manual_edits), [""; 0]);
}

#[test]
fn any_dead_registered_follows_the_last_change() {
    let id = NAMED.to_string();
    let lives = [life(Some((ExitKind::Killed, 1.0, 1.0)))];
    let registered = History::from(0.0).put(&id, RIGHT);
    assert!(any_dead_registered(&lives, &registered.0.changes));
    assert!(!any_dead_registered(
        &lives,
        &registered.delete(&id).0.changes
    ));
}

/// The violations of a server that was asked to leave at 4.5 s and exited at 6.5 s.
fn leaving_problems(name: Name, history: History, disturbances: &[Disturbance]) -> Vec<String> {
    let lives = [named_life(name, ExitKind::Terminated, 4.5, 6.5)];
    leftover_keys(&lives, &[history.0], disturbances, &[]).violations
}

#[test]
fn leaving_must_drain_and_then_delete() {
    let id = NAMED.to_string();
    let registered = || History::from(0.0).put(&id, RIGHT).others(5);
    // Draining at 5 s, deleted at 6 s.
    let right = registered().drain(&id, RIGHT).delete(&id);
    assert_eq!(leaving_problems(NAMED, right, &[]), [""; 0]);
    // The key was deleted by hand before; the registrar writes and removes it again.
    let again = History::from(0.0).put(&id, RIGHT).others(4);
    let again = again.delete(&id).drain(&id, RIGHT).delete(&id);
    assert_eq!(leaving_problems(NAMED, again, &[]), [""; 0]);

    for (history, said) in [
        (registered(), "was never draining"),
        (registered().delete(&id), "was never draining"),
        (registered().drain(&id, RIGHT), "was never deleted"),
        (
            registered().drain(&id, RIGHT).delete(&id).put(&id, RIGHT),
            "was never deleted",
        ),
        // Within the TTL, which only counts for killed servers.
        (
            registered().drain(&id, RIGHT).others(7).delete(&id),
            "was deleted at 7.000 s only",
        ),
    ] {
        let found = leaving_problems(NAMED, history, &[]);
        assert_eq!(found.len(), 1, "{said}");
        assert!(found[0].contains(said), "{said} in {found:?}");
    }
}

#[test]
fn leaving_with_a_fault_in_the_way_is_skipped() {
    let history = || History::from(0.0).put(&NAMED.to_string(), RIGHT);
    let said =
        |scope, from, to| leaving_problems(NAMED, history(), &[disturbance(scope, from, to)]).len();
    let mine = Scope::Path(Path::Server(NAMED.slot));
    for scope in [Scope::All, mine, Scope::Server(NAMED)] {
        assert_eq!(said(scope, 4.0, 5.0), 0);
        assert_eq!(said(scope, 6.0, 9.0), 0);
        assert_eq!(said(scope, 1.0, 4.0), 1);
        assert_eq!(said(scope, 7.0, 9.0), 1);
    }
    assert_eq!(said(Scope::Path(Path::Server(0)), 4.0, 5.0), 1);
    assert_eq!(said(Scope::Path(Path::Client(0)), 4.0, 5.0), 1);
    assert_eq!(said(Scope::Server(TWICE), 4.0, 5.0), 1);

    // A killed server does not leave, and a server that never had a key has none to delete.
    let killed = [named_life(NAMED, ExitKind::Killed, 4.5, 6.5)];
    let judged = leftover_keys(&killed, &[history().0], &[], &[]);
    assert!(judged.violations.is_empty() && judged.windows.is_empty());
    assert_eq!(leaving_problems(NAMED, History::from(0.0), &[]), [""; 0]);
}

#[test]
fn both_keys_must_drain_and_be_deleted() {
    let start = History::from(0.0).put("s00-0", RIGHT).put("s00-0-b", RIGHT);
    // The second key goes with the shared lease and was never marked as draining.
    let half = start
        .others(5)
        .drain("s00-0", RIGHT)
        .delete("s00-0")
        .delete("s00-0-b");
    let found = leaving_problems(TWICE, half, &[]);
    assert!(found[0].contains("s00-0-b was never draining"), "{found:?}");
}
