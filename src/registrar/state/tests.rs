//! The step function, driven by hand: a clock that moves only when told, and no etcd.

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
        self.reconciler.register(pairs([key]), false).unwrap()
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
    fn settle(&mut self, lease: i64) -> Vec<Action> {
        let mut done = Vec::new();
        while let Next::Do(action) = self.next() {
            let outcome = match action {
                Action::Grant => Outcome::Granted { lease, ttl: TTL },
                Action::Renew { .. } => Outcome::Renewed,
                _ => Outcome::Done,
            };
            self.finish(&action, outcome);
            done.push(action);
        }
        done
    }
}

fn state(ticket: &Ticket) -> RegistrationState {
    ticket.status.borrow().state.clone()
}

fn is_recovering(ticket: &Ticket) -> bool {
    matches!(state(ticket), RegistrationState::Recovering { .. })
}

fn put(key: &str, lease: i64, generation: u64) -> Action {
    Action::Put {
        key: key.into(),
        pairs: pairs([key]),
        gone: Vec::new(),
        lease,
        generation,
    }
}

fn delete(key: &str, lease: i64) -> Action {
    Action::Delete {
        key: key.into(),
        keys: vec![key.into()],
        lease,
    }
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
    assert_eq!(done, [Action::Grant, put("a", 1, 0), put("b", 1, 0)]);
    assert_eq!(state(&a), RegistrationState::Registered);
    assert_eq!(state(&b), RegistrationState::Registered);
    assert_eq!(bench.idle(), Some(bench.now.instant + TTL / 3));
    bench.pass(TTL / 3);
    assert_eq!(bench.settle(1), [Action::Renew { lease: 1 }]);
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
    assert_eq!(done, [Action::Grant, put("a", 2, 0), put("b", 2, 0)]);
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
    assert_eq!(bench.settle(1), [Action::Renew { lease: 1 }]);
}

#[test]
fn the_last_one_to_leave_revokes_the_lease_an_earlier_one_deletes_its_key() {
    let mut bench = Bench::new();
    let (a, b) = (bench.register("a"), bench.register("b"));
    bench.settle(1);
    bench.reconciler.withdraw("a", a.token);
    assert_eq!(bench.settle(1), [delete("a", 1)]);
    assert_eq!(state(&a), RegistrationState::Deregistered);
    assert_eq!(state(&b), RegistrationState::Registered);
    bench.reconciler.withdraw("b", b.token);
    assert_eq!(bench.settle(1), [Action::Revoke { lease: 1 }]);
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
    bench.finish(&slow_put, Outcome::Done);
    assert_ne!(state(&ticket), RegistrationState::Registered);
    bench.pass(LONGEST_WAIT);
    assert_eq!(bench.settle(2), [Action::Grant, put("a", 2, 0)]);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    // Nor does the old lease's end say anything about the new one.
    bench.finish(&put("a", 1, 0), Outcome::LeaseGone);
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
    assert_eq!(refused, put("a", 1, 0));
    refuse(&mut bench, &refused);
    assert!(a.status.borrow().error.is_some());
    assert_eq!(bench.settle(1), [put("b", 1, 0)]);
    assert_eq!(state(&b), RegistrationState::Registered);
    assert!(b.status.borrow().error.is_none());
    // Rights may change.
    bench.idle();
    bench.pass(LONGEST_WAIT);
    assert_eq!(bench.action(), put("a", 1, 0));
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
    let again = bench.reconciler.register(vec![("b".into(), vec![])], false);
    assert!(again.is_err_and(|error| closed(&error)));
    assert_eq!(bench.idle(), None);
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
    assert_eq!(bench.action(), delete("a", 1));
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
    assert!(matches!(&done[..], [Action::Put { pairs, .. }] if pairs[0].1 == b"new"));
    assert_eq!(ticket.status.borrow().written, Some(1));
    assert_eq!(state(&ticket), RegistrationState::Draining);
}

#[test]
fn one_key_is_registered_once_and_again_after_it_was_withdrawn() {
    let mut bench = Bench::new();
    let first = bench.register("a");
    bench.settle(1);
    let again = bench.reconciler.register(pairs(["a"]), false);
    assert!(matches!(
        again,
        Err(Error::InstanceAlreadyRegistered { key }) if key == "a"
    ));
    bench.reconciler.withdraw("a", first.token);
    let second = bench.register("a");
    assert_eq!(state(&first), RegistrationState::Deregistered);
    // The first handle is stale and must not take the second's key away.
    bench.reconciler.withdraw("a", first.token);
    assert_eq!(bench.settle(1), [put("a", 1, 1)]);
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
    assert_eq!(bench.settle(2), [Action::Grant, put("a", 2, 0)]);
    bench.finish(&renew, Outcome::LeaseGone);
    assert_eq!(state(&ticket), RegistrationState::Registered);
    assert_eq!(bench.idle(), Some(bench.now.instant + TTL / 3));
}

#[test]
fn all_of_an_instances_keys_are_put_and_deleted_at_once() {
    let mut bench = Bench::new();
    let a = bench.reconciler.register(pairs(["a", "x/a"]), false);
    let token = a.unwrap().token;
    bench.register("b");
    let done = bench.settle(1);
    assert!(
        matches!(&done[1], Action::Put { pairs: written, .. } if *written == pairs(["a", "x/a"]))
    );
    bench.reconciler.withdraw("a", token);
    let keys = vec!["a".to_owned(), "x/a".to_owned()];
    let (key, lease) = ("a".to_owned(), 1);
    assert_eq!(bench.settle(1), [Action::Delete { key, keys, lease }]);
}

#[test]
fn a_key_that_another_instance_has_in_any_format_is_refused() {
    let mut bench = Bench::new();
    let first = bench.reconciler.register(pairs(["a", "x/1"]), false);
    let again = bench.reconciler.register(pairs(["b", "x/1"]), false);
    assert!(matches!(
        again,
        Err(Error::InstanceAlreadyRegistered { key }) if key == "x/1"
    ));
    bench.settle(1);
    // Withdrawn, its key is the other's to have, and goes with the other's value.
    bench.reconciler.withdraw("a", first.unwrap().token);
    let second = bench.reconciler.register(pairs(["b", "x/1"]), false);
    let done = bench.settle(1);
    assert_eq!(done[0], delete("a", 1));
    assert!(
        matches!(&done[1..], [Action::Put { pairs: written, .. }] if *written == pairs(["b", "x/1"]))
    );
    assert_eq!(state(&second.unwrap()), RegistrationState::Registered);
}

#[test]
fn a_key_that_an_instance_had_before_it_was_registered_anew_goes() {
    let mut bench = Bench::new();
    let first = bench.reconciler.register(pairs(["a", "x/1"]), false);
    bench.settle(1);
    bench.reconciler.withdraw("a", first.unwrap().token);
    let second = bench.reconciler.register(pairs(["a", "x/2"]), false);
    let put = bench.action();
    assert!(matches!(&put, Action::Put { gone, .. } if *gone == ["x/1"]));
    // Not knowing whether it happened, leaving deletes all that may be there.
    bench.fail(&put);
    bench.register("b");
    let token = second.unwrap().token;
    bench.reconciler.withdraw("a", token);
    bench.pass(LONGEST_WAIT);
    let done = bench.settle(1);
    assert!(
        matches!(&done[0], Action::Delete { keys, .. } if *keys == ["a", "x/2", "x/1"]),
        "{done:?}"
    );
}
