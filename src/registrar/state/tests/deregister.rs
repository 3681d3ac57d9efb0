//! Deregistration, and the end of the lease.

use super::*;

#[test]
fn last_entry_revokes_the_lease_and_earlier_ones_delete() {
    let (mut harness, [a, b]) = Harness::with_registered(["a", "b"]);
    harness.deregister(&a);
    assert_eq!(harness.settle(1), ["delete a"]);
    assert_eq!(state(&a), RegistrationState::Deregistered);
    assert_eq!(state(&b), RegistrationState::Registered);
    harness.deregister(&b);
    assert_eq!(harness.settle(1), ["revoke 1"]);
    assert_eq!(state(&b), RegistrationState::Deregistered);
    assert!(harness.reconciler.is_empty());
}

#[test]
fn idle_reconciler_sleeps() {
    let mut harness = Harness::new();
    let handle = harness.register("a");
    let grant = harness.action();
    harness.deregister(&handle);
    harness.fail(&grant);
    harness.advance(MAX_BACKOFF);
    assert_eq!(harness.idle(), None);
    // The same while a revocation is under way, or waits for its next attempt.
    let handle = harness.register("a");
    harness.settle(1);
    harness.deregister(&handle);
    harness.advance(TTL / 2);
    let revoke = harness.action();
    harness.idle();
    harness.advance(TTL);
    harness.idle();
    harness.fail(&revoke);
    harness.idle();
}

#[test]
fn entry_is_terminal_at_once_even_before_its_keys_are_gone() {
    let (mut harness, [a, b]) = Harness::with_registered(["a", "b"]);
    let is_terminal = |handle: &EntryHandle| handle.status.borrow().terminal;
    harness.deregister(&a);
    let delete = harness.action();
    harness.fail(&delete);
    assert_ne!(state(&a), RegistrationState::Deregistered);
    assert!(is_terminal(&a) && !is_terminal(&b));
    harness.close_client();
    assert!(is_terminal(&b));
}
