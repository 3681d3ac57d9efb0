//! Registration and update.

use super::*;

#[test]
fn update_counts_once_it_is_written() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    let new = target_with_value("a", "new", true);
    let generation = harness.reconciler.update(&handle.id, new);
    assert_eq!(generation, Some(1));
    assert_eq!(handle.status.borrow().written, Some(0));
    let performed = harness.settle(1);
    assert_eq!(performed, ["put a @1 #1"]);
    assert_eq!(handle.status.borrow().written, Some(1));
    assert_eq!(state(&handle), RegistrationState::Draining);
}

#[test]
fn key_is_free_again_after_deregistration() {
    let (mut harness, [first]) = Harness::with_registered(["a"]);
    let again = harness.register_keys(["a"]);
    assert!(matches!(
        again,
        Err(Error::InstanceAlreadyRegistered { key }) if key == "a"
    ));
    harness.deregister(&first);
    let second = harness.register("a");
    assert_eq!(state(&first), RegistrationState::Deregistered);
    // The first handle is outdated, and must not deregister the second entry.
    harness.deregister(&first);
    assert_eq!(harness.settle(1), ["take a @1 #1"]);
    assert_eq!(state(&second), RegistrationState::Registered);
}
