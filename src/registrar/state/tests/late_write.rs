//! Writes with a lost response, which may arrive later.

use super::*;

#[test]
fn lost_response_is_cleaned_up_on_deregistration() {
    let (mut harness, [a, _b]) = Harness::with_lease(["a", "b"]);
    let put = harness.action();
    harness.deregister(&a);
    harness.fail(&put);
    harness.advance(MAX_BACKOFF);
    assert_eq!(short(&harness.action()), "delete a");
}

#[test]
fn arrival_after_the_deletion_is_deleted_as_well() {
    let (mut harness, [a, _b]) = Harness::with_lease(["a", "b"]);
    let lost = harness.action();
    harness.fail(&lost);
    harness.deregister(&a);
    harness.advance(MAX_BACKOFF);
    assert_eq!(harness.settle(1), ["delete a", "take b @1 #0"]);
    assert_eq!(state(&a), RegistrationState::Deregistered);
    harness.key_changed("a", 11, stored_key(1, "a"));
    assert_eq!(harness.settle(1), ["delete a"]);
    // The write may also arrive while the watch is down, so a restarted watch causes a deletion.
    harness.advance(TTL * 100);
    harness.settle(1);
    harness.watch_started("a");
    assert_eq!(harness.settle(1), ["delete a"]);
    // No write can arrive under a lease that is gone, so the key is not watched any longer.
    assert_eq!(harness.reconciler.watched_keys().count(), 2);
    harness.lose_lease();
    harness.advance(MAX_BACKOFF);
    harness.settle(2);
    assert_eq!(harness.reconciler.watched_keys().count(), 1);
}

#[test]
fn arrival_during_the_deletion_is_deleted_as_well() {
    let (mut harness, [a, _b]) = Harness::with_lease(["a", "b"]);
    let lost = harness.action();
    harness.fail(&lost);
    harness.deregister(&a);
    harness.advance(MAX_BACKOFF);
    let delete = harness.action();
    assert_eq!(short(&delete), "delete a");
    // The write arrives after etcd has executed the deletion, but before its response.
    harness.key_changed("a", 11, stored_key(1, "a"));
    harness.finish(&delete, harness.deleted());
    assert_eq!(harness.settle(1), ["take b @1 #0", "delete a"]);
    assert_eq!(state(&a), RegistrationState::Deregistered);
}

#[test]
fn new_entry_of_the_key_inherits_it() {
    for is_lost_before in [true, false] {
        let mut harness = Harness::new();
        harness.register("z");
        harness.settle(1);
        let first = harness.register_keys(["a", "x/1"]).unwrap();
        let lost = harness.action();
        if is_lost_before {
            harness.fail(&lost);
        }
        harness.deregister(&first);
        let held_back = target(["b", "x/1"]);
        let second = harness
            .reconciler
            .register(held_back, Desired::HeldBack, harness.now);
        if !is_lost_before {
            harness.fail(&lost);
        }
        harness.advance(MAX_BACKOFF);
        assert_eq!(harness.settle(1), ["delete a", "delete b x/1"]);
        assert_eq!(state(&second.unwrap()).name(), "unready");
        // The write may arrive only now, while the watch is down.
        harness.watch_started("x/1");
        assert_eq!(harness.settle(1), ["delete b x/1"]);
    }
}
