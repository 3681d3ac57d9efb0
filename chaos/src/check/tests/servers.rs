//! Tests of calls and registrations.

use super::*;

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
fn only_calls_on_a_killed_server_may_fail() {
    let killed = [life(Some((ExitKind::Killed, 5.0, 5.01)))];
    let lost = "127.0.0.1:1000: connection lost: broken pipe";
    assert!(is_allowed(&failure(4.9, 5.02, lost), &killed, &[]));
    // Sent before its exit was noticed.
    assert!(is_allowed(&failure(5.2, 5.3, lost), &killed, &[]));

    // The server had ended long before.
    assert!(!is_allowed(&failure(5.3, 5.31, lost), &killed, &[]));
    // The call failed before the server was killed.
    assert!(!is_allowed(&failure(4.8, 4.9, lost), &killed, &[]));
    // The call was in flight on another server.
    let elsewhere = "127.0.0.1:2000: connection lost: broken pipe";
    assert!(!is_allowed(&failure(4.9, 5.02, elsewhere), &killed, &[]));
    // The call was never sent.
    let nowhere = "no instances under services/chaos/ (waited 5s)";
    assert!(!is_allowed(&failure(4.9, 5.02, nowhere), &killed, &[]));
    // The server was asked to leave, or is running.
    let left = [life(Some((ExitKind::Terminated, 5.0, 6.0)))];
    assert!(!is_allowed(&failure(4.9, 5.02, lost), &left, &[]));
    assert!(!is_allowed(&failure(4.9, 5.02, lost), &[life(None)], &[]));

    // The machine stalled from 5.1 s to 5.9 s, so nobody could notice the exit.
    let late = failure(6.0, 6.01, lost);
    assert!(!is_allowed(&late, &killed, &[]));
    assert!(is_allowed(&late, &killed, &[(seconds(5.1), seconds(5.9))]));
    assert!(!is_allowed(&late, &killed, &[(seconds(4.0), seconds(4.9))]));
}

#[test]
fn sent_to_reads_the_address_of_the_message() {
    let told = sent_to("127.0.0.1:1000: connection lost: reset");
    assert_eq!(told.as_deref(), Some("127.0.0.1:1000"));
    assert_eq!(
        sent_to("2 instances under services/chaos/: 127.0.0.1:1: refused"),
        None
    );
    assert_eq!(sent_to("deadline of 10s exceeded: no response"), None);
}

#[test]
fn wrong_registration_of_a_running_server_is_found() {
    let id = NAMED.to_string();
    let lives = [life(None)];
    let right = || History::from(0.0).put(&id, "127.0.0.1:1000");
    assert_eq!(unregistered_servers(&lives, &right().0.changes), [""; 0]);

    for (history, said) in [
        (History::from(0.0), "has no key"),
        (right().delete(&id), "has no key"),
        (
            right().garbage(&id),
            "its key services/chaos/s01-0 has garbage",
        ),
        (
            right().put(&id, "127.0.0.1:1"),
            "its key services/chaos/s01-0 has {\"Op\":0,\"Addr\":\"127.0.0.1:1\"}",
        ),
        (
            right().change(&id, value("127.0.0.1:1000"), 0),
            "has no lease",
        ),
    ] {
        let found = unregistered_servers(&lives, &history.0.changes);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains(said), "{said} in {found:?}");
    }
    let dead = [life(Some((ExitKind::Killed, 0.0, 0.0)))];
    assert_eq!(unregistered_servers(&dead, &[]), [""; 0]);
}

#[test]
fn both_keys_must_be_registered() {
    let mut twice = life(None);
    twice.name = TWICE;
    let right = "127.0.0.1:1000";
    let one = History::from(0.0).put("s00-0", right);
    let found = unregistered_servers(&[twice.clone()], &one.0.changes);
    assert_eq!(found, ["s00-0 lives and has no key services/chaos/s00-0-b"]);
    let both = one.put("s00-0-b", right);
    assert_eq!(unregistered_servers(&[twice], &both.0.changes), [""; 0]);
}
