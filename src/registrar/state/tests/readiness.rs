//! Entries that are held back while their server is not ready.

use super::*;

#[test]
fn entry_follows_the_readiness_of_its_server() {
    let mut harness = Harness::new();
    let held_back = harness
        .reconciler
        .register(target(["a"]), Desired::HeldBack, harness.now);
    let handle = held_back.unwrap();
    assert_eq!(state(&handle).name(), "unready");
    assert_eq!(harness.idle(), None);
    assert!(harness.set_ready(&handle, true));
    assert_eq!(state(&handle).name(), "registering");
    assert_eq!(harness.settle(1), ["grant", "take a @1 #0"]);
    assert_eq!(state(&handle), RegistrationState::Registered);
    let other = harness.register("b");
    harness.settle(1);
    assert!(harness.set_ready(&handle, false));
    assert_eq!(harness.settle(1), ["delete a"]);
    assert_eq!(state(&handle).name(), "unready");
    assert!(harness.set_ready(&handle, true));
    assert_eq!(harness.settle(1), ["take a @1 #0"]);
    harness.deregister(&other);
    harness.settle(1);
    assert!(harness.set_ready(&handle, false));
    assert_eq!(harness.settle(1), ["revoke 1"]);
    assert_eq!(state(&handle).name(), "unready");
    harness.deregister(&handle);
    harness.idle();
    assert_eq!(state(&handle), RegistrationState::Deregistered);
    assert!(!harness.set_ready(&handle, true));
}

#[test]
fn brief_loss_keeps_the_entry_registered_and_checks_it() {
    let (mut harness, [a, b]) = Harness::with_registered(["a", "b"]);
    harness.set_ready(&a, false);
    harness.set_ready(&a, true);
    assert_eq!(state(&a), RegistrationState::Registered);
    // Changes were not reported while the entry was held back, so its key is checked.
    assert_eq!(harness.settle(1), ["put a @1 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
    harness.idle();
    // Once a deletion or a revocation is under way, the entry is registered as if new.
    for (removal, then) in [
        ("delete a", vec!["take a @1 #0"]),
        ("revoke 1", vec!["grant", "put a @2 #0"]),
    ] {
        if removal == "revoke 1" {
            harness.deregister(&b);
            harness.settle(1);
        }
        harness.set_ready(&a, false);
        let remove = harness.action();
        assert_eq!(short(&remove), removal);
        harness.set_ready(&a, true);
        assert_eq!(state(&a).name(), "registering");
        assert_eq!(a.status.borrow().written, None);
        let outcome = match remove {
            Action::Delete { .. } => harness.deleted(),
            _ => ActionOutcome::Revoked,
        };
        harness.finish(&remove, outcome);
        assert_eq!(harness.settle(2), then);
        assert_eq!(state(&a), RegistrationState::Registered);
    }
}
