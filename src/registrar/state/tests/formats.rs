//! Entries with several keys, one per format.

use super::*;

#[test]
fn all_keys_are_written_and_deleted_together() {
    let mut harness = Harness::new();
    let a = harness.register_keys(["a", "x/a"]).unwrap();
    harness.register("b");
    let performed = harness.settle(1);
    assert_eq!(performed[1], "take a x/a @1 #0");
    harness.deregister(&a);
    assert_eq!(harness.settle(1), ["delete a x/a"]);
}

#[test]
fn key_of_another_entry_is_refused_until_it_is_deregistered() {
    let mut harness = Harness::new();
    let first = harness.register_keys(["a", "x/1"]).unwrap();
    let again = harness.register_keys(["b", "x/1"]);
    assert!(matches!(
        again,
        Err(Error::InstanceAlreadyRegistered { key }) if key == "x/1"
    ));
    harness.settle(1);
    // The new entry overwrites the key, so the deregistered one does not delete it.
    harness.deregister(&first);
    let second = harness.register_keys(["b", "x/1"]).unwrap();
    let performed = harness.settle(1);
    assert_eq!(performed[0], "delete a");
    assert_eq!(performed[1..], ["take b x/1 @1 #0"]);
    assert_eq!(state(&second), RegistrationState::Registered);
}

#[test]
fn keys_of_the_replaced_entry_are_deleted() {
    let mut harness = Harness::new();
    let first = harness.register_keys(["a", "x/1"]).unwrap();
    harness.settle(1);
    harness.deregister(&first);
    let second = harness.register_keys(["a", "x/2"]).unwrap();
    let put = harness.action();
    assert!(matches!(&put, Action::Ensure(put) if put.stale_keys == ["x/1"]));
    // The write may have been applied or not, so a deregistration deletes both keys.
    harness.fail(&put);
    harness.register("b");
    harness.deregister(&second);
    harness.advance(MAX_BACKOFF);
    let performed = harness.settle(1);
    assert_eq!(performed[0], "delete a x/2 x/1");
}
