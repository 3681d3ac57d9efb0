//! Changes of the keys by other clients.

use super::*;

#[test]
fn manual_change_is_restored() {
    for (change, wait) in [
        (stored_key(0, "a"), Duration::ZERO),
        (stored_key(0, "else"), Duration::ZERO),
        // The lease may have expired, so the restoration is jittered.
        (None, MAX_RECOVERY_JITTER),
    ] {
        let (mut harness, [handle]) = Harness::with_registered(["a"]);
        harness.key_changed("a", 11, change);
        assert!(is_recovering(&handle));
        harness.advance(wait);
        assert_eq!(harness.settle(1), ["put a @1 #0"]);
        assert_eq!(state(&handle), RegistrationState::Registered);
        // An event older than the last read, and one with the desired value, cause nothing.
        harness.key_changed("a", 10, None);
        harness.key_changed("a", 11, stored_key(1, "a"));
        harness.idle();
        assert_eq!(state(&handle), RegistrationState::Registered);
    }
}

#[test]
fn change_during_a_check_causes_another_check() {
    let (mut harness, [handle]) = Harness::with_lease(["a"]);
    let put = harness.action();
    harness.key_changed("a", 11, None);
    harness.finish(&put, harness.ensured());
    // The caller of `register` gets its confirmation.
    assert_eq!(handle.status.borrow().written, Some(0));
    assert_eq!(harness.settle(1), ["put a @1 #0"]);
    // A restarted watch causes a check as well, because it may have missed a change.
    harness.watch_started("a");
    assert_eq!(harness.settle(1), ["put a @1 #0"]);
    harness.idle();
}

#[test]
fn repeated_conflicts_back_off_and_delay_no_other() {
    let (mut harness, [_a, b]) = Harness::with_registered(["a", "b"]);
    let (mut conflicts, started) = (0, harness.now.instant);
    let mut revision = 11;
    while harness.now.instant < started + Duration::from_secs(20) {
        harness.key_changed("a", revision, stored_key(0, "theirs"));
        revision += 1;
        if conflicts == 5 {
            let new = target_with_value("b", "new", false);
            harness.reconciler.update(&b.id, new);
            assert_eq!(harness.settle(1), ["put b @1 #1"]);
        }
        loop {
            match harness.step() {
                Step::SleepUntil(at) => harness.advance(at.unwrap() - harness.now.instant),
                Step::Perform(renew @ Action::Renew { .. }) => {
                    harness.finish(&renew, harness.renewed());
                }
                Step::Perform(action) => {
                    assert_eq!(short(&action), "put a @1 #0");
                    harness.finish(&action, harness.ensured());
                    revision += 1;
                    break;
                }
            }
        }
        conflicts += 1;
    }
    assert!((20..60).contains(&conflicts), "{conflicts} times in 20 s");
}

#[test]
fn recovery_is_jittered_once() {
    let mut waits = Vec::new();
    for _ in 0..50 {
        let (mut harness, _handles) = Harness::with_registered(["a", "b"]);
        harness.key_changed("a", 11, None);
        harness.key_changed("b", 11, None);
        let wait = harness.idle().unwrap() - harness.now.instant;
        assert!(wait <= MAX_RECOVERY_JITTER, "{wait:?}");
        waits.push(wait);
        harness.advance(wait);
        let check = harness.action();
        harness.finish(&check, ActionOutcome::LeaseGone);
        assert_eq!(harness.settle(2), ["grant", "put b @2 #0", "put a @2 #0"]);
    }
    waits.sort();
    assert!(waits[0] < MAX_RECOVERY_JITTER / 4);
    assert!(waits[49] > MAX_RECOVERY_JITTER / 4 * 3);
}
