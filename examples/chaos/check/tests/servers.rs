//! Of servers and calls.

use super::*;
use crate::schedule::Path;

const TTL: Duration = Duration::from_secs(3);

fn failure(begun: f64, ended: f64, message: &str) -> Failure {
    Failure {
        client: 0,
        begun: seconds(begun),
        ended: seconds(ended),
        status: message.to_owned(),
        sent_to: sent_to(message),
    }
}

#[test]
fn a_call_may_fail_only_in_flight_on_a_server_that_was_killed() {
    let killed = [life(Some((Ending::Killed, 5.0, 5.01)))];
    let lost = "127.0.0.1:1000: connection lost: broken pipe";
    assert!(is_allowed(&failure(4.9, 5.02, lost), &killed, &[]));
    // Sent before its end was noticed.
    assert!(is_allowed(&failure(5.2, 5.3, lost), &killed, &[]));

    // It had ended long before.
    assert!(!is_allowed(&failure(5.3, 5.31, lost), &killed, &[]));
    // It failed before the server was killed.
    assert!(!is_allowed(&failure(4.8, 4.9, lost), &killed, &[]));
    // It was in flight elsewhere.
    let elsewhere = "127.0.0.1:2000: connection lost: broken pipe";
    assert!(!is_allowed(&failure(4.9, 5.02, elsewhere), &killed, &[]));
    // It was never sent.
    let nowhere = "no instances under services/chaos/ (waited 5s)";
    assert!(!is_allowed(&failure(4.9, 5.02, nowhere), &killed, &[]));
    // The server was asked to leave, or is still there.
    let left = [life(Some((Ending::Left, 5.0, 6.0)))];
    assert!(!is_allowed(&failure(4.9, 5.02, lost), &left, &[]));
    assert!(!is_allowed(&failure(4.9, 5.02, lost), &[life(None)], &[]));

    // Unless nobody could notice: the machine stood still from 5.1 s to 5.9 s.
    let late = failure(6.0, 6.01, lost);
    assert!(!is_allowed(&late, &killed, &[]));
    assert!(is_allowed(&late, &killed, &[(seconds(5.1), seconds(5.9))]));
    assert!(!is_allowed(&late, &killed, &[(seconds(4.0), seconds(4.9))]));
}

#[test]
fn where_a_call_was_sent_is_read_from_the_beginning_of_its_message() {
    let told = sent_to("127.0.0.1:1000: connection lost: reset");
    assert_eq!(told.as_deref(), Some("127.0.0.1:1000"));
    assert_eq!(
        sent_to("2 instances under services/chaos/: 127.0.0.1:1: refused"),
        None
    );
    assert_eq!(
        sent_to("the call's time of 10s is over, without an answer"),
        None
    );
}

#[test]
fn a_server_that_lives_and_is_not_registered_as_it_should_be_is_found() {
    let id = NAMED.to_string();
    let lives = [life(None)];
    let right = || History::from(0.0).put(&id, "127.0.0.1:1000");
    assert_eq!(lost(&lives, &right().0.changes), [""; 0]);

    for (history, said) in [
        (History::from(0.0), "has no key"),
        (right().delete(&id), "has no key"),
        (right().garbage(&id), "its key has garbage"),
        (
            right().put(&id, "127.0.0.1:1"),
            "its key has {\"Op\":0,\"Addr\":\"127.0.0.1:1\"}",
        ),
        (
            right().change(&id, value("127.0.0.1:1000"), 0),
            "has no lease",
        ),
    ] {
        let found = lost(&lives, &history.0.changes);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains(said), "{said} in {found:?}");
    }
    let dead = [life(Some((Ending::Killed, 0.0, 0.0)))];
    assert_eq!(lost(&dead, &[]), [""; 0]);
}

/// The ghosts of a server that was killed at 1 s, when its last look was taken at 60 s.
fn ghosts_of(history: History, extensions: &[(f64, Option<Path>)]) -> Vec<String> {
    let lives = [life(Some((Ending::Killed, 1.0, 1.0)))];
    let extensions: Vec<Extension> = extensions
        .iter()
        .map(|(at, path)| Extension {
            at: seconds(*at),
            path: *path,
        })
        .collect();
    ghosts(&lives, &[history.0], &extensions, TTL, seconds(60.0))
}

#[test]
fn a_key_that_outlives_its_server_by_more_than_its_lease_is_found() {
    let id = NAMED.to_string();
    let registered = || History::from(0.0).put(&id, "127.0.0.1:1000");
    // Deleted at 2 s, in time.
    assert_eq!(ghosts_of(registered().delete(&id), &[]), [""; 0]);
    // Never deleted.
    let found = ghosts_of(registered(), &[]);
    assert!(found[0].contains("is there at 60.000 s"), "{found:?}");
    // Deleted at 10 s, too late.
    let late = (0..7).fold(registered(), |history, _| history.put("other", "h:1"));
    let found = ghosts_of(late.put("other", "h:2").delete(&id), &[]);
    assert!(found[0].contains("was there until 10.000 s"), "{found:?}");
}

#[test]
fn a_lease_that_a_new_leader_has_extended_may_last_longer_and_only_that_one() {
    let id = NAMED.to_string();
    let late = |until: i64| {
        let mut history = History::from(0.0).put(&id, "127.0.0.1:1000");
        while history.0.known_to < until {
            history = history.put("other", "h:1");
        }
        history.delete(&id)
    };
    // Deleted at 10 s; without an extension it would have to go by 7 s.
    assert_eq!(ghosts_of(late(10), &[]).len(), 1);
    assert_eq!(ghosts_of(late(10), &[(5.0, None)]), [""; 0]);
    assert_eq!(
        ghosts_of(late(10), &[(5.0, Some(Path::Server(0)))]),
        [""; 0]
    );
    // Not before its end, not on another path, and not when it had to be gone already.
    assert_eq!(ghosts_of(late(10), &[(0.5, None)]).len(), 1);
    assert_eq!(
        ghosts_of(late(10), &[(5.0, Some(Path::Server(1)))]).len(),
        1
    );
    assert_eq!(ghosts_of(late(10), &[(7.5, None)]).len(), 1);
}

#[test]
fn a_key_that_a_hand_has_taken_off_its_lease_is_nobodys_ghost() {
    let id = NAMED.to_string();
    let by_hand = History::from(0.0).put(&id, "127.0.0.1:1000").garbage(&id);
    assert_eq!(ghosts_of(by_hand, &[]), [""; 0]);
}

#[test]
fn whether_a_dead_server_is_still_there_is_told() {
    let id = NAMED.to_string();
    let lives = [life(Some((Ending::Killed, 1.0, 1.0)))];
    let registered = History::from(0.0).put(&id, "127.0.0.1:1000");
    assert!(any_dead(&lives, &registered.0.changes));
    assert!(!any_dead(&lives, &registered.delete(&id).0.changes));
}
