//! Failed and refused actions.

use super::*;

#[test]
fn actions_are_retried_forever_at_most_a_second_apart() {
    let mut harness = Harness::new();
    let handle = harness.register("a");
    for _ in 0..200 {
        let action = harness.action();
        assert_eq!(action, Action::Grant);
        harness.fail(&action);
        assert!(handle.status.borrow().error.is_some());
        let wait = harness.idle().unwrap() - harness.now.instant;
        assert!(wait <= MAX_BACKOFF, "{wait:?}");
        harness.advance(wait);
    }
    harness.settle(1);
    assert_eq!(state(&handle), RegistrationState::Registered);
    assert!(handle.status.borrow().error.is_none());
}

#[test]
fn refused_entry_delays_no_other() {
    let (mut harness, [a, b]) = Harness::with_lease(["a", "b"]);
    let refused = harness.action();
    assert_eq!(short(&refused), "take a @1 #0");
    let status = Box::new(tonic::Status::permission_denied("no"));
    let operation = "put".into();
    let error = Error::Rpc { operation, status };
    harness.finish(&refused, ActionOutcome::Failed(error));
    assert!(a.status.borrow().error.is_some());
    assert_eq!(harness.settle(1), ["take b @1 #0"]);
    assert_eq!(state(&b), RegistrationState::Registered);
    assert!(b.status.borrow().error.is_none());
    // Permissions can change.
    harness.idle();
    harness.advance(MAX_BACKOFF);
    assert_eq!(short(&harness.action()), "take a @1 #0");
}

#[test]
fn full_etcd_deletes_first_and_no_entry_starves() {
    let (mut harness, [_a, z]) = Harness::with_registered(["a", "z"]);
    let fail = |harness: &mut Harness, action: &Action| {
        let status = Box::new(tonic::Status::resource_exhausted("database space exceeded"));
        let operation = "put".into();
        let error = Error::Rpc { operation, status };
        harness.finish(action, ActionOutcome::Failed(error));
        harness.advance(MAX_BACKOFF / 2);
    };
    let (c, d) = (harness.register("c"), harness.register("d"));
    let c_first = harness.action();
    assert_eq!(short(&c_first), "take c @1 #0");
    fail(&mut harness, &c_first);
    // A deletion precedes the writes, and the failed write moves to the end.
    harness.deregister(&z);
    let delete = harness.action();
    assert_eq!(short(&delete), "delete z");
    // If the deletion fails as well, it moves to the end, and is tried again after the others.
    fail(&mut harness, &delete);
    for expected in ["take d @1 #0", "take c @1 #0", "delete z"] {
        let action = harness.action();
        assert_eq!(short(&action), expected);
        fail(&mut harness, &action);
    }
    assert_eq!(
        harness.settle(1),
        ["take d @1 #0", "take c @1 #0", "delete z"]
    );
    assert_eq!(state(&z), RegistrationState::Deregistered);
    assert_eq!(state(&c), RegistrationState::Registered);
    assert_eq!(state(&d), RegistrationState::Registered);
}

#[test]
fn failure_of_a_replaced_entry_does_not_pause_its_successor() {
    let (mut harness, [a, _b]) = Harness::with_registered(["a", "b"]);
    harness.deregister(&a);
    let delete = harness.action();
    let again = harness.register("a");
    let status = Box::new(tonic::Status::permission_denied("no"));
    let operation = "delete".into();
    let error = Error::Rpc { operation, status };
    harness.finish(&delete, ActionOutcome::Failed(error));
    assert!(again.status.borrow().error.is_none());
    assert_eq!(state(&again).reason(), Some("not written yet"));
    assert_eq!(harness.settle(1), ["take a @1 #1"]);
}
