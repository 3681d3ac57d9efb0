//! The reasons of states: the latest one, since when the state holds, and each announced once.

use super::*;

fn refuse(harness: &mut Harness, action: &Action, message: &str) {
    let status = Box::new(tonic::Status::permission_denied(message));
    let operation = "put".into();
    let error = Error::Rpc { operation, status };
    harness.finish(action, ActionOutcome::Failed(error));
}

fn exhaust(harness: &mut Harness, action: &Action) {
    let status = Box::new(tonic::Status::resource_exhausted("database space exceeded"));
    let operation = "put".into();
    let error = Error::Rpc { operation, status };
    harness.finish(action, ActionOutcome::Failed(error));
}

fn reason(handle: &EntryHandle) -> String {
    state(handle).reason().unwrap_or_default().to_owned()
}

fn announced(handle: &EntryHandle) -> u64 {
    handle.status.borrow().announced
}

/// Performs the next mutation with `outcome`; renewals succeed.
fn next_mutation(harness: &mut Harness) -> Action {
    loop {
        match harness.step() {
            Step::Perform(renew @ Action::Renew { .. }) => {
                harness.finish(&renew, harness.renewed());
            }
            Step::Perform(action) => return action,
            Step::SleepUntil(at) => harness.advance(at.unwrap() - harness.now.instant),
        }
    }
}

#[test]
fn registering_says_the_latest_failure_and_since_when() {
    let mut harness = Harness::new();
    let handle = harness.register("a");
    let started = harness.now.wall;
    assert_eq!(reason(&handle), "not written yet");
    harness.advance(Duration::from_secs(1));
    let grant = harness.action();
    harness.fail(&grant);
    assert!(
        reason(&handle).contains("did not finish"),
        "{}",
        reason(&handle)
    );
    let grant = next_mutation(&mut harness);
    harness.finish(&grant, ActionOutcome::Granted { lease: 1, ttl: TTL });
    let put = next_mutation(&mut harness);
    refuse(&mut harness, &put, "too large");
    assert!(reason(&handle).contains("too large"), "{}", reason(&handle));
    assert_eq!(state(&handle).name(), "registering");
    assert_eq!(state(&handle).since(), Some(started));
    let put = next_mutation(&mut harness);
    harness.finish(&put, harness.ensured());
    assert_eq!(state(&handle), RegistrationState::Registered);
    assert_eq!(state(&handle).reason(), None);
}

#[test]
fn recovering_says_the_fault_and_the_latest_failure() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.key_changed("a", 11, None);
    let since = harness.now.wall;
    assert_eq!(reason(&handle), "the key was deleted");
    let put = next_mutation(&mut harness);
    exhaust(&mut harness, &put);
    let latest = reason(&handle);
    assert!(latest.starts_with("the key was deleted ("), "{latest}");
    assert!(latest.contains("space exceeded"), "{latest}");
    let put = next_mutation(&mut harness);
    refuse(&mut harness, &put, "role revoked");
    let latest = reason(&handle);
    assert!(latest.contains("role revoked"), "{latest}");
    assert_eq!(state(&handle).since(), Some(since));
}

#[test]
fn change_that_cannot_be_written_is_recovering() {
    for is_refused in [true, false] {
        let (mut harness, [handle]) = Harness::with_registered(["a"]);
        let draining = target_with_value("a", "draining", true);
        harness.reconciler.update(&handle.id, draining);
        let put = harness.action();
        match is_refused {
            true => refuse(&mut harness, &put, "denied"),
            false => exhaust(&mut harness, &put),
        }
        assert!(is_recovering(&handle), "{:?}", state(&handle));
        let expected = if is_refused { "denied" } else { "space" };
        assert!(reason(&handle).contains(expected), "{}", reason(&handle));
        let put = next_mutation(&mut harness);
        harness.finish(&put, harness.ensured());
        assert_eq!(state(&handle), RegistrationState::Draining);
    }
}

#[test]
fn removal_that_fails_says_why_until_it_succeeds() {
    for is_deregistered in [true, false] {
        let (mut harness, [a, _b]) = Harness::with_registered(["a", "b"]);
        if is_deregistered {
            harness.deregister(&a);
        } else {
            harness.set_ready(&a, false);
        }
        let delete = harness.action();
        harness.fail(&delete);
        assert_eq!(state(&a).name(), "removing");
        assert!(reason(&a).contains("did not finish"), "{}", reason(&a));
        let delete = next_mutation(&mut harness);
        refuse(&mut harness, &delete, "denied");
        assert!(reason(&a).contains("denied"), "{}", reason(&a));
        assert_eq!(state(&a).since(), Some(SystemTime::UNIX_EPOCH));
        let delete = next_mutation(&mut harness);
        harness.finish(&delete, harness.deleted());
        harness.idle();
        let settled = if is_deregistered {
            "deregistered"
        } else {
            "unready"
        };
        assert_eq!(state(&a).name(), settled);
    }
}

#[test]
fn ready_again_after_a_failed_removal_is_registered() {
    let (mut harness, [a, _b]) = Harness::with_registered(["a", "b"]);
    harness.set_ready(&a, false);
    let delete = harness.action();
    harness.fail(&delete);
    harness.set_ready(&a, true);
    assert_eq!(state(&a).name(), "registering");
    let put = next_mutation(&mut harness);
    harness.finish(&put, harness.ensured());
    assert_eq!(state(&a), RegistrationState::Registered);
}

#[test]
fn superseded_says_why_it_cannot_be_checked() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.key_changed("a", 11, stored_key(9, "theirs"));
    let check = harness.action();
    harness.finish(&check, ActionOutcome::Superseded { by: 9 });
    let superseded = reason(&handle);
    harness.key_changed("a", 12, None);
    let put = next_mutation(&mut harness);
    exhaust(&mut harness, &put);
    assert!(is_superseded(&handle));
    let latest = reason(&handle);
    assert!(latest.starts_with(&superseded), "{latest}");
    assert!(latest.contains("space exceeded"), "{latest}");
    let put = next_mutation(&mut harness);
    refuse(&mut harness, &put, "denied");
    assert!(reason(&handle).contains("denied"), "{}", reason(&handle));
    // A caller that waits still learns that the registration is superseded.
    assert!(matches!(
        handle.status.borrow().error,
        Some(Error::Superseded { by: 9, .. })
    ));
    let put = next_mutation(&mut harness);
    harness.finish(&put, harness.ensured());
    assert_eq!(state(&handle), RegistrationState::Registered);
}

#[test]
fn unready_says_why_it_is_held_back() {
    let mut harness = Harness::new();
    let target = target(["a"]);
    let registered = harness
        .reconciler
        .register(target, Desired::HeldBack, harness.now);
    let handle = registered.unwrap();
    assert!(
        reason(&handle).contains("has not reported"),
        "{}",
        reason(&handle)
    );
    harness.set_ready(&handle, false);
    assert_eq!(reason(&handle), "the server is not ready");
    harness
        .reconciler
        .set_ready(&handle.id, Readiness::NotFollowed, harness.now);
    assert!(
        reason(&handle).contains("not followed"),
        "{}",
        reason(&handle)
    );
    harness.close_client();
    assert!(reason(&handle).contains("closed"), "{}", reason(&handle));
}

#[test]
fn reasons_that_alternate_are_announced_once() {
    let (mut harness, [handle]) = Harness::with_lease(["a"]);
    for attempt in 0..500 {
        let put = next_mutation(&mut harness);
        match attempt % 3 {
            0 => exhaust(&mut harness, &put),
            1 => refuse(&mut harness, &put, &format!("denied in {attempt} ms")),
            _ => harness.fail(&put),
        }
    }
    assert_eq!(announced(&handle), 3);
    // The latest one is shown all the same.
    assert!(
        reason(&handle).contains("denied in 499 ms"),
        "{}",
        reason(&handle)
    );
}
