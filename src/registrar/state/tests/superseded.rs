//! Keys that another process registers.

use super::*;

#[test]
fn later_registration_wins_and_earlier_returns() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.key_changed("a", 11, stored_key(9, "theirs"));
    let check = harness.action();
    assert_eq!(short(&check), "put a @1 #0");
    harness.finish(&check, ActionOutcome::Superseded { by: 9 });
    assert!(is_superseded(&handle));
    // The entry keeps saying so after an update, and after the loss of its lease.
    let draining = TargetRecords {
        draining: true,
        ..target(["a"])
    };
    harness.reconciler.update(&handle.id, draining);
    assert!(matches!(
        handle.status.borrow().error,
        Some(Error::Superseded { by: 9, .. })
    ));
    harness.lose_lease();
    harness.advance(MAX_BACKOFF);
    let grant = harness.action();
    harness.finish(&grant, ActionOutcome::Granted { lease: 2, ttl: TTL });
    let check = harness.action();
    assert_eq!(short(&check), "put a @2 #1");
    harness.finish(&check, ActionOutcome::Superseded { by: 9 });
    assert!(is_superseded(&handle));
    harness.idle();
    harness.key_changed("a", 12, None);
    assert_eq!(harness.settle(2), ["put a @2 #1"]);
    assert_eq!(state(&handle), RegistrationState::Draining);
}

#[test]
fn state_survives_a_brief_loss_of_readiness() {
    for is_known_before in [true, false] {
        let (mut harness, [a, _b]) = Harness::with_registered(["a", "b"]);
        harness.key_changed("a", 11, stored_key(9, "theirs"));
        let check = harness.action();
        if is_known_before {
            harness.finish(&check, ActionOutcome::Superseded { by: 9 });
        }
        harness.set_ready(&a, false);
        if !is_known_before {
            harness.finish(&check, ActionOutcome::Superseded { by: 9 });
        }
        harness.set_ready(&a, true);
        assert!(is_superseded(&a));
        let check = harness.action();
        assert_eq!(short(&check), "put a @1 #0");
        harness.finish(&check, ActionOutcome::Superseded { by: 9 });
        assert!(is_superseded(&a));
        harness.idle();
        // Once the entry is removed, even by the loss of the lease, readiness registers it again.
        harness.set_ready(&a, false);
        harness.advance(TTL / 3);
        let renew = harness.action();
        harness.finish(&renew, ActionOutcome::LeaseGone);
        harness.advance(MAX_BACKOFF);
        assert_eq!(short(&harness.action()), "grant");
        assert_eq!(state(&a), RegistrationState::Unready);
        harness.set_ready(&a, true);
        assert_eq!(state(&a), RegistrationState::Registering);
        assert!(a.status.borrow().error.is_none());
    }
}

#[test]
fn stale_result_is_ignored_after_reregistration() {
    let (mut harness, [a, _b]) = Harness::with_registered(["a", "b"]);
    harness.key_changed("a", 11, stored_key(9, "theirs"));
    let check = harness.action();
    harness.deregister(&a);
    let again = harness.register("a");
    harness.finish(&check, ActionOutcome::Superseded { by: 9 });
    assert_eq!(harness.settle(1), ["take a @1 #1"]);
    assert_eq!(state(&again), RegistrationState::Registered);
}

#[test]
fn write_with_a_lost_response_establishes_the_entry() {
    let (mut harness, [handle]) = Harness::with_lease(["a"]);
    let lost = harness.action();
    harness.key_changed("a", 11, stored_key(1, "a"));
    harness.key_changed("a", 12, stored_key(9, "theirs"));
    harness.fail(&lost);
    harness.advance(MAX_BACKOFF);
    let check = harness.action();
    // The entry was in etcd, so it does not take the key from the later registration.
    assert_eq!(short(&check), "put a @1 #0");
    harness.finish(&check, ActionOutcome::Superseded { by: 9 });
    assert!(is_superseded(&handle));
}
