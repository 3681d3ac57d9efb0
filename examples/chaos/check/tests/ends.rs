//! Of servers that ended.

use super::*;
use crate::check::ends::{any_dead, expires, ghosts, stayed};
use crate::record::Extension;
use crate::schedule::{Fault, Path};

const RIGHT: &str = "127.0.0.1:1000";

fn named(name: Name, how: Ending, signalled: f64, gone: f64) -> Life {
    Life {
        name,
        ..life(Some((how, signalled, gone)))
    }
}

fn leader(at: f64) -> Extension {
    let at = seconds(at);
    Extension::Leader { at }
}

fn waited(from: f64, to: f64, path: Option<Path>) -> Extension {
    let (from, to) = (seconds(from), seconds(to));
    Extension::Waited { from, to, path }
}

fn standstill(from: f64, to: f64) -> Extension {
    let (from, to) = (seconds(from), seconds(to));
    Extension::Standstill { from, to }
}

/// By when the key must be gone of a server that was killed at 1 s.
fn limit(extensions: &[Extension]) -> f64 {
    let life = life(Some((Ending::Killed, 1.0, 1.0)));
    let limits = life.end.map(|end| expires(&life, end, TTL, extensions));
    limits.unwrap_or_default().as_secs_f64()
}

/// The ghosts of that server, when the last look was taken at 60 s.
fn ghosts_of(name: Name, history: History) -> Vec<String> {
    let lives = [named(name, Ending::Killed, 1.0, 1.0)];
    ghosts(&lives, &[history.0], &[], TTL, seconds(60.0))
}

#[test]
fn a_key_that_outlives_its_server_by_more_than_its_lease_is_found() {
    let id = NAMED.to_string();
    let registered = || History::from(0.0).put(&id, RIGHT);
    // Deleted at 2 s, in time.
    assert_eq!(ghosts_of(NAMED, registered().delete(&id)), [""; 0]);
    // Never deleted.
    let found = ghosts_of(NAMED, registered());
    assert!(found[0].contains("is there at 60.000 s"), "{found:?}");
    // Deleted at 10 s, too late.
    let found = ghosts_of(NAMED, registered().others(10).delete(&id));
    assert!(found[0].contains("was there until 10.000 s"), "{found:?}");
}

#[test]
fn either_key_of_a_server_that_registered_twice_must_go() {
    let both = || History::from(0.0).put("s00-0", RIGHT).put("s00-0-b", RIGHT);
    let lives = [named(TWICE, Ending::Killed, 1.0, 1.0)];
    for (left, gone) in [("s00-0", "s00-0-b"), ("s00-0-b", "s00-0")] {
        let history = both().delete(gone);
        assert!(any_dead(&lives, &history.0.changes));
        let found = ghosts_of(TWICE, history);
        assert_eq!(found.len(), 1);
        assert!(
            found[0].contains(&format!("{}, which", key(left))),
            "{found:?}"
        );
    }
    let history = both().delete("s00-0").delete("s00-0-b");
    assert!(!any_dead(&lives, &history.0.changes));
    assert_eq!(ghosts_of(TWICE, history), [""; 0]);
}

#[test]
fn each_new_leader_counts_a_lease_anew_from_then_on() {
    assert_eq!(limit(&[]), 7.0);
    assert_eq!(limit(&[leader(5.0)]), 11.0);
    assert_eq!(limit(&[leader(10.0), leader(5.0)]), 16.0);
    // Before its end, or when it had to be gone already.
    assert_eq!(limit(&[leader(0.5)]), 7.0);
    assert_eq!(limit(&[leader(7.5)]), 7.0);
}

#[test]
fn what_waited_while_a_server_died_extends_its_lease_once_and_no_later_wait_does() {
    let mine = NAMED.path();
    for path in [None, mine] {
        assert_eq!(limit(&[waited(0.5, 4.0, path)]), 10.0);
        // A dead server sends nothing that could wait.
        assert_eq!(limit(&[waited(1.5, 4.0, path)]), 7.0);
        assert_eq!(
            limit(&[waited(0.5, 4.0, path), waited(5.0, 9.0, path)]),
            10.0
        );
        // It was over before.
        assert_eq!(limit(&[waited(0.2, 0.9, path)]), 7.0);
        // It was gone already.
        assert_eq!(limit(&[waited(0.5, 7.5, path)]), 7.0);
    }
    assert_eq!(limit(&[waited(0.5, 4.0, Some(Path::Server(0)))]), 7.0);
}

#[test]
fn time_in_which_nobody_can_take_a_key_away_is_added_and_no_more() {
    assert_eq!(limit(&[standstill(2.0, 4.0)]), 9.0);
    // Only what is after its end, and each moment once.
    assert_eq!(limit(&[standstill(0.0, 2.0)]), 8.0);
    let apiece = [
        standstill(2.0, 3.0),
        standstill(3.0, 4.0),
        standstill(2.5, 3.5),
    ];
    assert_eq!(limit(&apiece), 9.0);
    assert_eq!(limit(&[standstill(7.5, 8.0)]), 7.0);
    // As when all members end, and start again with a new leader.
    assert_eq!(limit(&[standstill(2.0, 9.0), leader(9.2)]), 15.2);
}

#[test]
fn a_member_that_is_killed_restarted_or_replaced_makes_no_lease_last_longer() {
    let by = |fault: Fault| Extension::by(&fault, seconds(0.5), seconds(4.0));
    for fault in [
        Fault::KillMember(0),
        Fault::RestartMember(0),
        Fault::WipeMember(0),
    ] {
        assert!(by(fault.clone()).is_none(), "{fault}");
    }
    let limit_by = |fault| limit(&by(fault).into_iter().collect::<Vec<_>>());
    let path = Path::Server(NAMED.place);
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
fn a_key_that_a_hand_has_taken_off_its_lease_is_nobodys_ghost() {
    let id = NAMED.to_string();
    let by_hand = History::from(0.0).put(&id, RIGHT).garbage(&id);
    assert_eq!(ghosts_of(NAMED, by_hand), [""; 0]);
}

#[test]
fn whether_a_dead_server_is_still_there_is_told() {
    let id = NAMED.to_string();
    let lives = [life(Some((Ending::Killed, 1.0, 1.0)))];
    let registered = History::from(0.0).put(&id, RIGHT);
    assert!(any_dead(&lives, &registered.0.changes));
    assert!(!any_dead(&lives, &registered.delete(&id).0.changes));
}

/// What is said of a server that was asked to leave at 4.5 s and ended at 6.5 s.
fn said_of(name: Name, history: History, disturbances: &[Disturbance]) -> Vec<String> {
    let lives = [named(name, Ending::Left, 4.5, 6.5)];
    stayed(&lives, &[history.0], disturbances, &[]).violations
}

#[test]
fn a_server_that_was_asked_to_leave_must_drain_and_delete_its_key_before_it_ends() {
    let id = NAMED.to_string();
    let registered = || History::from(0.0).put(&id, RIGHT).others(5);
    // Draining at 5 s, deleted at 6 s.
    let right = registered().drain(&id, RIGHT).delete(&id);
    assert_eq!(said_of(NAMED, right, &[]), [""; 0]);
    // Again, after a hand has deleted it.
    let again = History::from(0.0).put(&id, RIGHT).others(4);
    let again = again.delete(&id).drain(&id, RIGHT).delete(&id);
    assert_eq!(said_of(NAMED, again, &[]), [""; 0]);

    for (history, said) in [
        (registered(), "was never draining"),
        (registered().delete(&id), "was never draining"),
        (registered().drain(&id, RIGHT), "was never deleted"),
        (
            registered().drain(&id, RIGHT).delete(&id).put(&id, RIGHT),
            "was never deleted",
        ),
        // Long within the time to live, which is for those that were killed.
        (
            registered().drain(&id, RIGHT).others(7).delete(&id),
            "was deleted at 7.000 s only",
        ),
    ] {
        let found = said_of(NAMED, history, &[]);
        assert_eq!(found.len(), 1, "{said}");
        assert!(found[0].contains(said), "{said} in {found:?}");
    }
}

#[test]
fn leaving_is_judged_unless_something_was_in_the_way() {
    let history = || History::from(0.0).put(&NAMED.to_string(), RIGHT);
    let said = |whom, from, to| said_of(NAMED, history(), &[disturbed(whom, from, to)]).len();
    let mine = Whom::Path(Path::Server(NAMED.place));
    for whom in [Whom::Everybody, mine, Whom::Server(NAMED)] {
        assert_eq!(said(whom, 4.0, 5.0), 0);
        assert_eq!(said(whom, 6.0, 9.0), 0);
        assert_eq!(said(whom, 1.0, 4.0), 1);
        assert_eq!(said(whom, 7.0, 9.0), 1);
    }
    assert_eq!(said(Whom::Path(Path::Server(0)), 4.0, 5.0), 1);
    assert_eq!(said(Whom::Path(Path::Client(0)), 4.0, 5.0), 1);
    assert_eq!(said(Whom::Server(TWICE), 4.0, 5.0), 1);

    // Those that were killed do not leave, and one that was asked before it had a key has none to delete.
    let killed = [named(NAMED, Ending::Killed, 4.5, 6.5)];
    let judged = stayed(&killed, &[history().0], &[], &[]);
    assert!(judged.violations.is_empty() && judged.windows.is_empty());
    assert_eq!(said_of(NAMED, History::from(0.0), &[]), [""; 0]);
}

#[test]
fn both_keys_of_a_server_that_registered_twice_must_be_seen_to_leave() {
    let start = History::from(0.0).put("s00-0", RIGHT).put("s00-0-b", RIGHT);
    // The second goes with the lease that both are under, and never was draining.
    let half = start
        .others(5)
        .drain("s00-0", RIGHT)
        .delete("s00-0")
        .delete("s00-0-b");
    let found = said_of(TWICE, half, &[]);
    assert!(found[0].contains("s00-0-b was never draining"), "{found:?}");
}
