//! The step function, driven by hand: a clock that moves only when told, and no etcd.

use std::time::SystemTime;

use super::*;

const TTL: Duration = Duration::from_secs(9);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A reconciler, a clock that moves only by hand, and an etcd that is only what the test says.
struct Bench {
    reconciler: Reconciler,
    now: Now,
}

impl Bench {
    fn new() -> Self {
        Self {
            reconciler: Reconciler::new(),
            now: Now {
                instant: Instant::now(),
                wall: SystemTime::UNIX_EPOCH,
            },
        }
    }

    fn register(&mut self, key: &str) -> Ticket {
        self.reconciler.register(pairs([key]), false, true).unwrap()
    }

    fn pass(&mut self, time: Duration) {
        self.now.instant += time;
        self.now.wall += time;
    }

    fn next(&mut self) -> Next {
        self.reconciler.next(self.now)
    }

    fn action(&mut self) -> Action {
        match self.next() {
            Next::Do(action) => action,
            other => panic!("expected something to do, got {other:?}"),
        }
    }

    fn idle(&mut self) -> Option<Instant> {
        match self.next() {
            Next::WaitUntil(at) => {
                assert!(at.is_none_or(|at| at > self.now.instant), "it would spin");
                at
            }
            other => panic!("expected nothing to do, got {other:?}"),
        }
    }

    fn finish(&mut self, action: &Action, outcome: Outcome) {
        self.reconciler.finished(action, outcome, self.now);
    }

    fn fail(&mut self, action: &Action) {
        let operation = "test".into();
        let after = Duration::ZERO;
        let error = Error::Timeout { operation, after };
        self.finish(action, Outcome::Failed(error));
    }

    /// Lets everything succeed that is to be done now.
    fn settle(&mut self, lease: i64) -> Vec<String> {
        let mut done = Vec::new();
        while let Next::Do(action) = self.next() {
            let outcome = match action {
                Action::Grant => Outcome::Granted { lease, ttl: TTL },
                Action::Renew { .. } => Outcome::Renewed,
                Action::Ensure(_) => ENSURED,
                _ => Outcome::Done,
            };
            self.finish(&action, outcome);
            done.push(short(&action));
        }
        done
    }

    fn hears(&mut self, key: &str, revision: i64, held: Option<Held>) {
        let heard = Heard::Changed { revision, held };
        self.reconciler.heard(key, &heard, self.now);
    }
}

const ENSURED: Outcome = Outcome::Ensured { revision: 10 };

/// An action in a few words: of a put the keys, the lease and the generation.
fn short(action: &Action) -> String {
    match action {
        Action::Grant => "grant".into(),
        Action::Renew { lease } => format!("renew {lease}"),
        Action::Revoke { lease } => format!("revoke {lease}"),
        Action::Delete { keys, .. } => format!("delete {}", keys.join(" ")),
        Action::Ensure(ensure) => {
            let keys: Vec<_> = ensure.pairs.iter().map(|(key, _)| key.as_str()).collect();
            let take = if ensure.take { "take" } else { "put" };
            let (lease, generation) = (ensure.lease, ensure.generation);
            format!("{take} {} @{lease} #{generation}", keys.join(" "))
        }
    }
}

fn held(lease: i64, value: &str) -> Option<Held> {
    Some(Held {
        lease,
        mod_revision: 11,
        value: value.into(),
    })
}

fn state(ticket: &Ticket) -> RegistrationState {
    ticket.status.borrow().state.clone()
}

fn is_recovering(ticket: &Ticket) -> bool {
    matches!(state(ticket), RegistrationState::Recovering { .. })
}

/// Each key with itself as its value.
fn pairs<const N: usize>(keys: [&str; N]) -> Pairs {
    keys.map(|key| (key.to_owned(), key.into())).into()
}

#[test]
fn instances_share_one_lease_which_is_renewed_at_a_third_of_its_time() {
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    assert_eq!(state(&a), RegistrationState::Registering);
    let done = bench.settle(1);
    assert_eq!(done, ["grant", "take a @1 #0", "take b @1 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
    assert_eq!(state(&b), RegistrationState::Registered);
    assert_eq!(bench.idle(), Some(bench.now.instant + TTL / 3));
    bench.pass(TTL / 3);
    assert_eq!(bench.settle(1), ["renew 1"]);
}

#[test]
fn a_lost_lease_brings_every_instance_back_under_a_new_one() {
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    bench.pass(TTL / 3);
    let renew = bench.action();
    bench.finish(&renew, Outcome::LeaseGone);
    assert!(is_recovering(&a) && is_recovering(&b));
    bench.pass(LONGEST_WAIT);
    let done = bench.settle(2);
    assert_eq!(done, ["grant", "put a @2 #0", "put b @2 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
}

#[test]
fn failures_are_tried_again_for_ever_a_second_apart_at_most() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    for _ in 0..200 {
        let action = bench.action();
        assert_eq!(action, Action::Grant);
        bench.fail(&action);
        assert!(ticket.status.borrow().error.is_some());
        let wait = bench.idle().unwrap() - bench.now.instant;
        assert!(wait <= LONGEST_WAIT, "{wait:?}");
        bench.pass(wait);
    }
    bench.settle(1);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    assert!(ticket.status.borrow().error.is_none());
}

#[test]
fn silence_for_the_time_to_live_is_recovering_and_an_answer_ends_it() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    bench.settle(1);
    bench.pass(TTL / 3);
    let mut waited = TTL / 3;
    while waited < TTL {
        assert_eq!(state(&ticket), RegistrationState::Registered);
        match bench.next() {
            Next::Do(renew) => bench.fail(&renew),
            Next::WaitUntil(at) => {
                let wait = at.unwrap() - bench.now.instant;
                bench.pass(wait);
                waited += wait;
            }
        }
    }
    if let Next::Do(renew) = bench.next() {
        bench.fail(&renew);
    }
    let RegistrationState::Recovering { since, reason } = state(&ticket) else {
        panic!("{:?}", state(&ticket));
    };
    assert_eq!(since, bench.now.wall);
    assert!(reason.contains("test"), "{reason}");
    bench.pass(LONGEST_WAIT);
    let renew = bench.action();
    // etcd was only restarted: it still knows the lease, and with it the key.
    bench.finish(&renew, Outcome::Renewed);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    bench.pass(TTL / 3);
    assert_eq!(bench.settle(1), ["renew 1"]);
}

#[test]
fn the_last_one_to_leave_revokes_the_lease_an_earlier_one_deletes_its_key() {
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    bench.reconciler.withdraw("a", a.token);
    assert_eq!(bench.settle(1), ["delete a"]);
    assert_eq!(state(&a), RegistrationState::Deregistered);
    assert_eq!(state(&b), RegistrationState::Registered);
    bench.reconciler.withdraw("b", b.token);
    assert_eq!(bench.settle(1), ["revoke 1"]);
    assert_eq!(state(&b), RegistrationState::Deregistered);
    assert!(bench.reconciler.is_empty());
}

#[test]
fn a_put_that_is_answered_after_its_lease_was_lost_is_done_again_under_the_next() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 1, ttl: TTL });
    let slow_put = bench.action();
    bench.pass(TTL / 3);
    let renew = bench.action();
    bench.finish(&renew, Outcome::LeaseGone);
    bench.finish(&slow_put, ENSURED);
    assert_ne!(state(&ticket), RegistrationState::Registered);
    bench.pass(LONGEST_WAIT);
    assert_eq!(bench.settle(2), ["grant", "take a @2 #0"]);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    // Nor does the old lease's end say anything about the new one.
    bench.finish(&slow_put, Outcome::LeaseGone);
    assert_eq!(state(&ticket), RegistrationState::Registered);
}

#[test]
fn one_that_etcd_refuses_holds_up_no_other_and_keeps_its_error_to_itself() {
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 1, ttl: TTL });
    let refuse = |bench: &mut Bench, action: &Action| {
        let status = Box::new(tonic::Status::permission_denied("no"));
        let operation = "put".into();
        bench.finish(action, Outcome::Failed(Error::Rpc { operation, status }));
    };
    let refused = bench.action();
    assert_eq!(short(&refused), "take a @1 #0");
    refuse(&mut bench, &refused);
    assert!(a.status.borrow().error.is_some());
    assert_eq!(bench.settle(1), ["take b @1 #0"]);
    assert_eq!(state(&b), RegistrationState::Registered);
    assert!(b.status.borrow().error.is_none());
    // Rights may change.
    bench.idle();
    bench.pass(LONGEST_WAIT);
    assert_eq!(short(&bench.action()), "take a @1 #0");
}

#[test]
fn what_etcd_can_do_is_done_while_it_is_full_or_fails_for_one_of_them() {
    let mut bench = Bench::new();
    let (_a, z) = (bench.register("a"), bench.register("z"));
    bench.settle(1);
    let fail = |bench: &mut Bench, action: &Action| {
        let status = Box::new(tonic::Status::resource_exhausted("database space exceeded"));
        let operation = "put".into();
        bench.finish(action, Outcome::Failed(Error::Rpc { operation, status }));
        bench.pass(LONGEST_WAIT / 2);
    };
    let (c, d) = (bench.register("c"), bench.register("d"));
    let c_first = bench.action();
    assert_eq!(short(&c_first), "take c @1 #0");
    fail(&mut bench, &c_first);
    // Deletions before all else, and before what was already tried.
    bench.reconciler.withdraw("z", z.token);
    let delete = bench.action();
    assert_eq!(short(&delete), "delete z");
    // One that fails as well keeps its turn from no other, and has it again.
    fail(&mut bench, &delete);
    for expected in ["take d @1 #0", "take c @1 #0", "delete z"] {
        let action = bench.action();
        assert_eq!(short(&action), expected);
        fail(&mut bench, &action);
    }
    assert_eq!(
        bench.settle(1),
        ["take d @1 #0", "take c @1 #0", "delete z"]
    );
    assert_eq!(state(&z), RegistrationState::Deregistered);
    assert_eq!(state(&c), RegistrationState::Registered);
    assert_eq!(state(&d), RegistrationState::Registered);
}

#[test]
fn with_nothing_left_to_do_it_waits_and_does_not_spin() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    let grant = bench.action();
    bench.reconciler.withdraw("a", ticket.token);
    bench.fail(&grant);
    bench.pass(LONGEST_WAIT);
    assert_eq!(bench.idle(), None);
    // Nor while a revoke is under way, or waits for its next attempt.
    let ticket = bench.register("a");
    bench.settle(1);
    bench.reconciler.withdraw("a", ticket.token);
    bench.pass(TTL / 2);
    let revoke = bench.action();
    bench.idle();
    bench.pass(TTL);
    bench.idle();
    bench.fail(&revoke);
    bench.idle();
}

#[test]
fn once_the_client_is_closed_everything_says_so() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    bench.settle(1);
    let name = "main".into();
    bench.reconciler.closed(&Error::Closed { name }, bench.now);
    let closed = |error: &Error| matches!(error, Error::Closed { .. });
    assert!(ticket.status.borrow().error.as_ref().is_some_and(closed));
    assert!(is_recovering(&ticket));
    let again = bench
        .reconciler
        .register(vec![("b".into(), vec![])], false, true);
    assert!(again.is_err_and(|error| closed(&error)));
    assert_eq!(bench.idle(), None);
}

#[test]
fn it_is_over_once_it_is_withdrawn_or_the_client_closed_and_not_only_once_it_is_gone() {
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    let over = |ticket: &Ticket| ticket.status.borrow().over;
    bench.reconciler.withdraw("a", a.token);
    let delete = bench.action();
    bench.fail(&delete);
    assert_ne!(state(&a), RegistrationState::Deregistered);
    assert!(over(&a) && !over(&b));
    let name = "main".into();
    bench.reconciler.closed(&Error::Closed { name }, bench.now);
    assert!(over(&b));
}

#[test]
fn a_put_whose_answer_was_lost_is_cleaned_up_when_withdrawn() {
    let mut bench = Bench::new();
    let (a, _b) = (bench.register("a"), bench.register("b"));
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 1, ttl: TTL });
    let put = bench.action();
    bench.reconciler.withdraw("a", a.token);
    bench.fail(&put);
    bench.pass(LONGEST_WAIT);
    assert_eq!(short(&bench.action()), "delete a");
}

#[test]
fn an_update_is_written_and_counts_only_once_it_is() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    bench.settle(1);
    let generation =
        bench
            .reconciler
            .update("a", ticket.token, vec![("a".into(), b"new".into())], true);
    assert_eq!(generation, Some(1));
    assert_eq!(ticket.status.borrow().written, Some(0));
    let done = bench.settle(1);
    assert_eq!(done, ["put a @1 #1"]);
    assert_eq!(ticket.status.borrow().written, Some(1));
    assert_eq!(state(&ticket), RegistrationState::Draining);
}

#[test]
fn one_key_is_registered_once_and_again_after_it_was_withdrawn() {
    let mut bench = Bench::new();
    let first = bench.register("a");
    bench.settle(1);
    let again = bench.reconciler.register(pairs(["a"]), false, true);
    assert!(matches!(
        again,
        Err(Error::InstanceAlreadyRegistered { key }) if key == "a"
    ));
    bench.reconciler.withdraw("a", first.token);
    let second = bench.register("a");
    assert_eq!(state(&first), RegistrationState::Deregistered);
    // The first handle is stale and must not take the second's key away.
    bench.reconciler.withdraw("a", first.token);
    assert_eq!(bench.settle(1), ["take a @1 #1"]);
    assert_eq!(state(&second), RegistrationState::Registered);
}

#[test]
fn a_renewal_of_a_lease_that_was_replaced_says_nothing_about_the_present_one() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    bench.settle(1);
    bench.pass(TTL / 3);
    let renew = bench.action();
    bench.reconciler.withdraw("a", ticket.token);
    bench.settle(1);
    let ticket = bench.register("a");
    assert_eq!(bench.settle(2), ["grant", "take a @2 #0"]);
    bench.finish(&renew, Outcome::LeaseGone);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    assert_eq!(bench.idle(), Some(bench.now.instant + TTL / 3));
}

#[test]
fn all_of_an_instances_keys_are_put_and_deleted_at_once() {
    let mut bench = Bench::new();
    let a = bench.reconciler.register(pairs(["a", "x/a"]), false, true);
    let token = a.unwrap().token;
    bench.register("b");
    let done = bench.settle(1);
    assert_eq!(done[1], "take a x/a @1 #0");
    bench.reconciler.withdraw("a", token);
    assert_eq!(bench.settle(1), ["delete a x/a"]);
}

#[test]
fn a_key_that_another_instance_has_in_any_format_is_refused() {
    let mut bench = Bench::new();
    let first = bench.reconciler.register(pairs(["a", "x/1"]), false, true);
    let again = bench.reconciler.register(pairs(["b", "x/1"]), false, true);
    assert!(matches!(
        again,
        Err(Error::InstanceAlreadyRegistered { key }) if key == "x/1"
    ));
    bench.settle(1);
    // Withdrawn, its key is the other's to have, and goes with the other's value.
    bench.reconciler.withdraw("a", first.unwrap().token);
    let second = bench.reconciler.register(pairs(["b", "x/1"]), false, true);
    let done = bench.settle(1);
    assert_eq!(done[0], "delete a");
    assert_eq!(done[1..], ["take b x/1 @1 #0"]);
    assert_eq!(state(&second.unwrap()), RegistrationState::Registered);
}

#[test]
fn a_key_that_an_instance_had_before_it_was_registered_anew_goes() {
    let mut bench = Bench::new();
    let first = bench.reconciler.register(pairs(["a", "x/1"]), false, true);
    bench.settle(1);
    bench.reconciler.withdraw("a", first.unwrap().token);
    let second = bench.reconciler.register(pairs(["a", "x/2"]), false, true);
    let put = bench.action();
    assert!(matches!(&put, Action::Ensure(put) if put.gone == ["x/1"]));
    // Not knowing whether it happened, leaving deletes all that may be there.
    bench.fail(&put);
    bench.register("b");
    let token = second.unwrap().token;
    bench.reconciler.withdraw("a", token);
    bench.pass(LONGEST_WAIT);
    let done = bench.settle(1);
    assert_eq!(done[0], "delete a x/2 x/1");
}

#[test]
fn what_may_be_at_a_key_that_another_instance_had_goes_with_the_one_that_has_it_now() {
    for is_lost_before in [true, false] {
        let mut bench = Bench::new();
        bench.register("z");
        bench.settle(1);
        let first = bench.reconciler.register(pairs(["a", "x/1"]), false, true);
        let lost = bench.action();
        if is_lost_before {
            bench.fail(&lost);
        }
        bench.reconciler.withdraw("a", first.unwrap().token);
        let second = bench.reconciler.register(pairs(["b", "x/1"]), false, false);
        if !is_lost_before {
            bench.fail(&lost);
        }
        bench.pass(LONGEST_WAIT);
        assert_eq!(bench.settle(1), ["delete a", "delete b x/1"]);
        assert_eq!(state(&second.unwrap()), RegistrationState::Unready);
        // The put may arrive only now, and while the watch is down.
        bench.reconciler.heard("x/1", &Heard::Begun, bench.now);
        assert_eq!(bench.settle(1), ["delete b x/1"]);
    }
}

#[test]
fn what_somebody_did_to_its_key_by_hand_is_looked_at_at_once() {
    for (by_hand, wait) in [
        (held(0, "a"), Duration::ZERO),
        (held(0, "else"), Duration::ZERO),
        // Maybe its lease has ended.
        (None, RECOVER_WITHIN),
    ] {
        let mut bench = Bench::new();
        let ticket = bench.register("a");
        bench.settle(1);
        bench.hears("a", 11, by_hand);
        assert!(is_recovering(&ticket));
        bench.pass(wait);
        assert_eq!(bench.settle(1), ["put a @1 #0"]);
        assert_eq!(state(&ticket), RegistrationState::Registered);
        // What is older than what was seen, and what is as it should be, is no news.
        bench.hears("a", 10, None);
        bench.hears("a", 11, held(1, "a"));
        bench.idle();
        assert_eq!(state(&ticket), RegistrationState::Registered);
    }
}

#[test]
fn what_is_heard_while_it_is_looked_at_is_not_lost() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 1, ttl: TTL });
    let put = bench.action();
    bench.hears("a", 11, None);
    bench.finish(&put, ENSURED);
    // For the caller it was registered.
    assert_eq!(ticket.status.borrow().written, Some(0));
    assert_eq!(bench.settle(1), ["put a @1 #0"]);
    // So is one that began after it: there may have been a gap.
    bench.reconciler.heard("a", &Heard::Begun, bench.now);
    assert_eq!(bench.settle(1), ["put a @1 #0"]);
    bench.idle();
}

#[test]
fn a_key_that_another_took_is_left_to_it_until_it_goes() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    bench.settle(1);
    bench.hears("a", 11, held(9, "theirs"));
    let look = bench.action();
    assert_eq!(short(&look), "put a @1 #0");
    bench.finish(&look, Outcome::Superseded { by: 9 });
    let superseded =
        |ticket: &Ticket| matches!(state(ticket), RegistrationState::Superseded { by: 9, .. });
    assert!(superseded(&ticket));
    // It waits, and says so also to whoever changes it and when its lease is lost.
    bench
        .reconciler
        .update("a", ticket.token, pairs(["a"]), true);
    assert!(matches!(
        ticket.status.borrow().error,
        Some(Error::Superseded { by: 9, .. })
    ));
    let renew_at = bench.idle().unwrap();
    bench.pass(renew_at - bench.now.instant);
    let renew = bench.action();
    bench.finish(&renew, Outcome::LeaseGone);
    bench.pass(LONGEST_WAIT);
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 2, ttl: TTL });
    let look = bench.action();
    assert_eq!(short(&look), "put a @2 #1");
    bench.finish(&look, Outcome::Superseded { by: 9 });
    assert!(superseded(&ticket));
    bench.idle();
    bench.hears("a", 12, None);
    assert_eq!(bench.settle(2), ["put a @2 #1"]);
    assert_eq!(state(&ticket), RegistrationState::Draining);
}

#[test]
fn one_that_is_not_ready_is_not_in_and_comes_and_goes_with_that() {
    let mut bench = Bench::new();
    let ticket = bench
        .reconciler
        .register(pairs(["a"]), false, false)
        .unwrap();
    assert_eq!(state(&ticket), RegistrationState::Unready);
    assert_eq!(bench.idle(), None);
    let ready = |bench: &mut Bench, ready| {
        let known = bench.reconciler.set_ready("a", ticket.token, ready);
        assert!(known);
    };
    ready(&mut bench, true);
    assert_eq!(state(&ticket), RegistrationState::Registering);
    assert_eq!(bench.settle(1), ["grant", "take a @1 #0"]);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    let other = bench.register("b");
    bench.settle(1);
    ready(&mut bench, false);
    assert_eq!(bench.settle(1), ["delete a"]);
    assert_eq!(state(&ticket), RegistrationState::Unready);
    ready(&mut bench, true);
    assert_eq!(bench.settle(1), ["take a @1 #0"]);
    bench.reconciler.withdraw("b", other.token);
    bench.settle(1);
    ready(&mut bench, false);
    assert_eq!(bench.settle(1), ["revoke 1"]);
    assert_eq!(state(&ticket), RegistrationState::Unready);
    bench.reconciler.withdraw("a", ticket.token);
    bench.idle();
    assert_eq!(state(&ticket), RegistrationState::Deregistered);
    assert!(!bench.reconciler.set_ready("a", ticket.token, true));
}

#[test]
fn one_that_is_ready_again_before_it_was_taken_out_stands_where_it_stood() {
    let blip = |bench: &mut Bench, ticket: &Ticket| {
        bench.reconciler.set_ready("a", ticket.token, false);
        bench.reconciler.set_ready("a", ticket.token, true);
    };
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    blip(&mut bench, &a);
    assert_eq!(state(&a), RegistrationState::Registered);
    // What was noticed meanwhile was not told: it is looked at.
    assert_eq!(bench.settle(1), ["put a @1 #0"]);
    assert_eq!(state(&a), RegistrationState::Registered);
    bench.idle();
    // Not once its deletion is under way, or that of all.
    for (taken_out, then) in [
        ("delete a", vec!["take a @1 #0"]),
        ("revoke 1", vec!["grant", "put a @2 #0"]),
    ] {
        if taken_out == "revoke 1" {
            bench.reconciler.withdraw("b", b.token);
            bench.settle(1);
        }
        bench.reconciler.set_ready("a", a.token, false);
        let take_out = bench.action();
        assert_eq!(short(&take_out), taken_out);
        bench.reconciler.set_ready("a", a.token, true);
        assert_eq!(state(&a), RegistrationState::Registering);
        assert_eq!(a.status.borrow().written, None);
        bench.finish(&take_out, Outcome::Done);
        assert_eq!(bench.settle(2), then);
        assert_eq!(state(&a), RegistrationState::Registered);
    }
}

#[test]
fn one_that_is_superseded_and_ready_again_before_it_was_taken_out_says_so() {
    let superseded =
        |ticket: &Ticket| matches!(state(ticket), RegistrationState::Superseded { by: 9, .. });
    for is_known_before in [true, false] {
        let mut bench = Bench::new();
        let (a, _b) = (bench.register("a"), bench.register("b"));
        bench.settle(1);
        bench.hears("a", 11, held(9, "theirs"));
        let look = bench.action();
        if is_known_before {
            bench.finish(&look, Outcome::Superseded { by: 9 });
        }
        bench.reconciler.set_ready("a", a.token, false);
        if !is_known_before {
            bench.finish(&look, Outcome::Superseded { by: 9 });
        }
        bench.reconciler.set_ready("a", a.token, true);
        assert!(superseded(&a));
        let look = bench.action();
        assert_eq!(short(&look), "put a @1 #0");
        bench.finish(&look, Outcome::Superseded { by: 9 });
        assert!(superseded(&a));
        bench.idle();
        // Out, it is on its way in once it is ready, also if it did not go by its deletion.
        bench.reconciler.set_ready("a", a.token, false);
        bench.pass(TTL / 3);
        let renew = bench.action();
        bench.finish(&renew, Outcome::LeaseGone);
        bench.pass(LONGEST_WAIT);
        assert_eq!(short(&bench.action()), "grant");
        assert_eq!(state(&a), RegistrationState::Unready);
        bench.reconciler.set_ready("a", a.token, true);
        assert_eq!(state(&a), RegistrationState::Registering);
        assert!(a.status.borrow().error.is_none());
    }
}

#[test]
fn a_put_that_arrives_after_its_key_was_deleted_is_deleted_as_well() {
    let mut bench = Bench::new();
    let (a, _b) = (bench.register("a"), bench.register("b"));
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 1, ttl: TTL });
    let lost = bench.action();
    bench.fail(&lost);
    bench.reconciler.withdraw("a", a.token);
    bench.pass(LONGEST_WAIT);
    assert_eq!(bench.settle(1), ["delete a", "take b @1 #0"]);
    assert_eq!(state(&a), RegistrationState::Deregistered);
    bench.hears("a", 11, held(1, "a"));
    assert_eq!(bench.settle(1), ["delete a"]);
    // Also if it does so while the watch is down: the next one says only that it has begun.
    bench.pass(TTL * 100);
    bench.settle(1);
    bench.reconciler.heard("a", &Heard::Begun, bench.now);
    assert_eq!(bench.settle(1), ["delete a"]);
    // With the lease it is forgotten: nothing can be put under it any more.
    assert_eq!(bench.reconciler.to_watch().count(), 2);
    bench.pass(TTL / 3);
    let renew = bench.action();
    bench.finish(&renew, Outcome::LeaseGone);
    bench.pass(LONGEST_WAIT);
    bench.settle(2);
    assert_eq!(bench.reconciler.to_watch().count(), 1);
}

#[test]
fn what_came_of_an_earlier_registration_s_look_says_nothing_of_the_next() {
    let mut bench = Bench::new();
    let (a, _b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    bench.hears("a", 11, held(9, "theirs"));
    let look = bench.action();
    bench.reconciler.withdraw("a", a.token);
    let again = bench.register("a");
    bench.finish(&look, Outcome::Superseded { by: 9 });
    assert_eq!(bench.settle(1), ["take a @1 #1"]);
    assert_eq!(state(&again), RegistrationState::Registered);
}

#[test]
fn one_that_was_in_though_its_answer_was_lost_takes_its_key_from_no_later_one() {
    let mut bench = Bench::new();
    let ticket = bench.register("a");
    let grant = bench.action();
    bench.finish(&grant, Outcome::Granted { lease: 1, ttl: TTL });
    let lost = bench.action();
    bench.hears("a", 11, held(1, "a"));
    bench.hears("a", 12, held(9, "theirs"));
    bench.fail(&lost);
    bench.pass(LONGEST_WAIT);
    let look = bench.action();
    assert_eq!(short(&look), "put a @1 #0");
    bench.finish(&look, Outcome::Superseded { by: 9 });
    assert!(matches!(
        state(&ticket),
        RegistrationState::Superseded { by: 9, .. }
    ));
}

#[test]
fn whoever_undoes_it_over_and_over_is_not_answered_blow_for_blow_and_holds_up_no_other() {
    let mut bench = Bench::new();
    let (_a, b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    let (mut blows, begun) = (0, bench.now.instant);
    let mut revision = 11;
    while bench.now.instant < begun + Duration::from_secs(20) {
        bench.hears("a", revision, held(0, "theirs"));
        revision += 1;
        if blows == 5 {
            let value = vec![("b".into(), b"new".into())];
            bench.reconciler.update("b", b.token, value, false);
            assert_eq!(bench.settle(1), ["put b @1 #1"]);
        }
        loop {
            match bench.next() {
                Next::WaitUntil(at) => bench.pass(at.unwrap() - bench.now.instant),
                Next::Do(renew @ Action::Renew { .. }) => bench.finish(&renew, Outcome::Renewed),
                Next::Do(action) => {
                    assert_eq!(short(&action), "put a @1 #0");
                    let at = Outcome::Ensured { revision };
                    bench.finish(&action, at);
                    revision += 1;
                    break;
                }
            }
        }
        blows += 1;
    }
    assert!((20..60).contains(&blows), "{blows} times in 20 s");
}

#[test]
fn those_whose_keys_go_together_are_not_back_all_at_once_and_wait_only_once() {
    let mut waits = Vec::new();
    for _ in 0..50 {
        let mut bench = Bench::new();
        let (_a, _b) = (bench.register("a"), bench.register("b"));
        bench.settle(1);
        bench.hears("a", 11, None);
        bench.hears("b", 11, None);
        let wait = bench.idle().unwrap() - bench.now.instant;
        assert!(wait <= RECOVER_WITHIN, "{wait:?}");
        waits.push(wait);
        bench.pass(wait);
        let look = bench.action();
        bench.finish(&look, Outcome::LeaseGone);
        assert_eq!(bench.settle(2), ["grant", "put b @2 #0", "put a @2 #0"]);
    }
    waits.sort();
    assert!(waits[0] < RECOVER_WITHIN / 4 && waits[49] > RECOVER_WITHIN / 4 * 3);
}
