//! The lease: shared, renewed, lost and replaced.

use super::*;

#[test]
fn shared_by_all_entries_and_renewed_at_a_third_of_its_ttl() {
    let mut harness = Harness::new();
    let (a, b) = (harness.register("a"), harness.register("b"));
    assert_eq!(state(&a).name(), "registering");
    let performed = harness.settle(1);
    assert_eq!(performed, ["grant", "take a @1 #0", "take b @1 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
    assert_eq!(state(&b), RegistrationState::Registered);
    assert_eq!(harness.idle(), Some(harness.now.instant + TTL / 3));
    harness.advance(TTL / 3);
    assert_eq!(harness.settle(1), ["renew 1"]);
}

#[test]
fn loss_rewrites_all_entries_under_a_new_lease() {
    let (mut harness, [a, b]) = Harness::with_registered(["a", "b"]);
    harness.lose_lease();
    assert!(is_recovering(&a) && is_recovering(&b));
    harness.advance(MAX_BACKOFF);
    let performed = harness.settle(2);
    assert_eq!(performed, ["grant", "put a @2 #0", "put b @2 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
}

#[test]
fn no_renewal_for_the_ttl_is_recovering_until_one_succeeds() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.advance(TTL / 3);
    let mut waited = TTL / 3;
    while waited < TTL {
        assert_eq!(state(&handle), RegistrationState::Registered);
        match harness.step() {
            Step::Perform(renew) => harness.fail(&renew),
            Step::SleepUntil(at) => {
                let wait = at.unwrap() - harness.now.instant;
                harness.advance(wait);
                waited += wait;
            }
        }
    }
    if let Step::Perform(renew) = harness.step() {
        harness.fail(&renew);
    }
    let RegistrationState::Recovering { since, reason } = state(&handle) else {
        panic!("{:?}", state(&handle));
    };
    assert_eq!(since, harness.now.wall);
    assert!(reason.contains("test"), "{reason}");
    harness.advance(MAX_BACKOFF);
    let renew = harness.action();
    // etcd was only restarted, and still has the lease and the key.
    harness.finish(&renew, harness.renewed());
    assert_eq!(state(&handle), RegistrationState::Registered);
    harness.advance(TTL / 3);
    assert_eq!(harness.settle(1), ["renew 1"]);
}

fn refusal() -> Error {
    Error::Rpc {
        operation: "test".into(),
        status: Box::new(tonic::Status::permission_denied("test")),
    }
}

/// Two entries, of which the second may not be written any more, and the lease that replaces
/// theirs.
fn with_refused_lease() -> (Harness, [EntryHandle; 2]) {
    let (mut harness, handles) = Harness::with_registered(["a", "b"]);
    harness.advance(TTL / 3);
    let renew = harness.action();
    harness.finish(&renew, ActionOutcome::LeaseRefused(refusal()));
    let grant = harness.action();
    assert_eq!(short(&grant), "grant");
    harness.finish(&grant, ActionOutcome::Granted { lease: 2, ttl: TTL });
    (harness, handles)
}

#[test]
fn refused_lease_is_replaced_before_it_ends() {
    let (mut harness, [a, b]) = with_refused_lease();
    assert!(is_recovering(&a) && is_recovering(&b));
    let put = harness.action();
    assert_eq!(short(&put), "put a @2 #0");
    harness.finish(&put, harness.ensured());
    let put = harness.action();
    assert_eq!(short(&put), "put b @2 #0");
    harness.finish(&put, ActionOutcome::Failed(refusal()));
    assert_eq!(state(&a), RegistrationState::Registered);
    assert!(is_recovering(&b));
    // The refusal of an entry may be one of the lease.
    assert_eq!(harness.settle(1), ["renew 2"]);
    assert_eq!(state(&a), RegistrationState::Registered);
}

/// The end of the present lease would not delete keys under the replaced one.
#[test]
fn keys_under_a_replaced_lease_are_deleted_singly() {
    let (mut harness, [a, b]) = with_refused_lease();
    let put = harness.action();
    harness.finish(&put, harness.ensured());
    harness.deregister(&a);
    harness.deregister(&b);
    let delete = harness.action();
    assert_eq!(short(&delete), "delete a");
    harness.finish(&delete, harness.deleted());
    let delete = harness.action();
    assert_eq!(short(&delete), "delete b");
    assert_eq!(state(&a), RegistrationState::Deregistered);
    harness.finish(&delete, ActionOutcome::Failed(refusal()));
    assert_eq!(state(&b).name(), "removing");
    harness.advance(MAX_BACKOFF);
    let delete = harness.action();
    assert_eq!(short(&delete), "delete b");
    harness.finish(&delete, harness.deleted());
    assert_eq!(harness.settle(1), ["revoke 2"]);
    assert_eq!(state(&b), RegistrationState::Deregistered);
}

/// A key that may not be deleted is gone with its lease.
#[test]
fn refused_deletion_ends_with_the_lease() {
    let (mut harness, [a, b]) = with_refused_lease();
    harness.deregister(&a);
    harness.deregister(&b);
    let mut performed = Vec::new();
    loop {
        assert!(performed.len() < 100, "{performed:?}");
        match harness.step() {
            Step::Perform(action) => {
                let outcome = match &action {
                    Action::Delete { keys, .. } if keys == &["b"] => {
                        ActionOutcome::Failed(refusal())
                    }
                    Action::Delete { .. } => harness.deleted(),
                    _ => ActionOutcome::LeaseGone,
                };
                performed.push(short(&action));
                harness.finish(&action, outcome);
            }
            Step::SleepUntil(Some(at)) => harness.advance(at - harness.now.instant),
            Step::SleepUntil(None) => break,
        }
    }
    assert_eq!(state(&b), RegistrationState::Deregistered);
    assert_eq!(performed.last().unwrap(), "revoke 2");
}

#[test]
fn keys_of_an_irrevocable_lease_are_deleted_singly() {
    let (mut harness, [a, b]) = Harness::with_registered(["a", "b"]);
    harness.deregister(&a);
    harness.deregister(&b);
    let revoke = harness.action();
    assert_eq!(short(&revoke), "revoke 1");
    harness.finish(&revoke, ActionOutcome::LeaseRefused(refusal()));
    assert_eq!(harness.settle(1), ["delete a", "delete b", "revoke 1"]);
    assert_eq!(state(&b), RegistrationState::Deregistered);
}

#[test]
fn write_under_a_lost_lease_is_repeated_under_the_next() {
    let (mut harness, [handle]) = Harness::with_lease(["a"]);
    let slow_put = harness.action();
    harness.lose_lease();
    harness.finish(&slow_put, harness.ensured());
    assert_ne!(state(&handle), RegistrationState::Registered);
    harness.advance(MAX_BACKOFF);
    assert_eq!(harness.settle(2), ["grant", "take a @2 #0"]);
    assert_eq!(state(&handle), RegistrationState::Registered);
    // The end of the old lease says nothing about the new one.
    harness.finish(&slow_put, ActionOutcome::LeaseGone);
    assert_eq!(state(&handle), RegistrationState::Registered);
}

#[test]
fn renewal_of_a_replaced_lease_is_ignored() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.advance(TTL / 3);
    let renew = harness.action();
    harness.deregister(&handle);
    harness.settle(1);
    let handle = harness.register("a");
    assert_eq!(harness.settle(2), ["grant", "take a @2 #0"]);
    harness.finish(&renew, ActionOutcome::LeaseGone);
    assert_eq!(state(&handle), RegistrationState::Registered);
    assert_eq!(harness.idle(), Some(harness.now.instant + TTL / 3));
}
