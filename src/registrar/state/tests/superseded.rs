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
        assert_eq!(state(&a).name(), "unready");
        harness.set_ready(&a, true);
        assert_eq!(state(&a).name(), "registering");
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

/// etcd was restored from a snapshot that was taken while another process held the key.
#[test]
fn older_key_in_a_restored_history_is_no_successor() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.watch_started("a");
    let check = harness.action();
    let Action::Ensure(ensure) = &check else {
        panic!("{check:?}");
    };
    let found_at = |mod_revision| {
        let key = stored_key(9, "theirs").map(|key| StoredKey {
            mod_revision,
            ..key
        });
        ensure.plan(&[key], &[])
    };
    let (put, delete) = (vec![0], Vec::new());
    assert_eq!(found_at(10), WritePlan::Write { put, delete });
    assert_eq!(found_at(11), WritePlan::Superseded { by: 9 });
    // A superseded registration takes the key from no other one, whatever the revisions are.
    harness.finish(&check, ActionOutcome::Superseded { by: 9 });
    harness.watch_started("a");
    let Action::Ensure(ensure) = harness.action() else {
        panic!("no check");
    };
    let key = stored_key(9, "theirs").map(|key| StoredKey {
        mod_revision: 1,
        ..key
    });
    assert_eq!(ensure.plan(&[key], &[]), WritePlan::Superseded { by: 9 });
    assert!(is_superseded(&handle));
}

/// Keys that were deleted after the snapshot are back under the lease, which must expire.
#[test]
fn lease_is_replaced_after_a_restore() {
    let (mut harness, [a, b]) = Harness::with_registered(["a", "b"]);
    harness.revision = 9;
    harness.watch_started("a");
    let check = harness.action();
    harness.deregister(&b);
    harness.finish(&check, harness.ensured());
    assert_eq!(state(&a), RegistrationState::Registered);
    harness.advance(MAX_BACKOFF);
    assert_eq!(harness.settle(2), ["delete b", "grant", "put a @2 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
    harness.advance(TTL / 3);
    assert_eq!(harness.settle(2), ["renew 2"]);
}

/// The write after the restore reaches the revision that was known before.
#[test]
fn lease_is_replaced_after_a_write_to_a_restored_etcd() {
    let (mut harness, [_a]) = Harness::with_registered(["a"]);
    let known = harness.revision;
    harness.watch_started("a");
    let check = harness.action();
    let ensured = ActionOutcome::Ensured {
        read_at: known - 1,
        revision: known,
    };
    harness.finish(&check, ensured);
    harness.advance(MAX_BACKOFF);
    assert_eq!(harness.settle(2), ["grant", "put a @2 #0"]);
}

/// A wiped etcd counts from 1 again, and the registrar notices by its lease.
#[test]
fn lease_is_granted_once_after_a_wipe() {
    let (mut harness, [a]) = Harness::with_registered(["a"]);
    harness.lose_lease();
    harness.revision = 1;
    harness.advance(MAX_BACKOFF);
    assert_eq!(harness.settle(2), ["grant", "put a @2 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
    harness.advance(TTL / 3);
    assert_eq!(harness.settle(2), ["renew 2"]);
}
