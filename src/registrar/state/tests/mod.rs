//! Unit tests of the state machine, with a clock that moves only by hand and without etcd.

mod client_closed;
mod deregister;
mod failure;
mod formats;
mod key_event;
mod late_write;
mod lease;
mod readiness;
mod reasons;
mod register;
mod superseded;

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::reconciler::MAX_RECOVERY_JITTER;
use super::*;
use crate::error::{Error, Result};

const TTL: Duration = Duration::from_secs(9);

/// The longest backoff.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// A reconciler, and the current time.
struct Harness {
    reconciler: Reconciler,
    now: Timestamp,
    /// etcd's revision.
    revision: i64,
}

impl Harness {
    fn new() -> Self {
        Self {
            reconciler: Reconciler::new(),
            now: Timestamp {
                instant: Instant::now(),
                wall: SystemTime::UNIX_EPOCH,
            },
            revision: 10,
        }
    }

    /// A harness with the lease 1, whose grant has just finished. The entries are not written yet.
    fn with_lease<const N: usize>(keys: [&str; N]) -> (Self, [EntryHandle; N]) {
        let mut harness = Self::new();
        let handles = keys.map(|key| harness.register(key));
        let grant = harness.action();
        harness.finish(&grant, ActionOutcome::Granted { lease: 1, ttl: TTL });
        (harness, handles)
    }

    /// A harness with registered entries, under the lease 1.
    fn with_registered<const N: usize>(keys: [&str; N]) -> (Self, [EntryHandle; N]) {
        let mut harness = Self::new();
        let handles = keys.map(|key| harness.register(key));
        harness.settle(1);
        (harness, handles)
    }

    fn register(&mut self, key: &str) -> EntryHandle {
        self.register_keys([key]).unwrap()
    }

    fn register_keys<const N: usize>(&mut self, keys: [&str; N]) -> Result<EntryHandle> {
        self.reconciler
            .register(target(keys), Desired::Registered, self.now)
    }

    fn deregister(&mut self, handle: &EntryHandle) {
        self.reconciler.deregister(&handle.id);
    }

    fn set_ready(&mut self, handle: &EntryHandle, is_ready: bool) -> bool {
        let readiness = match is_ready {
            true => Readiness::Ready,
            false => Readiness::NotReady,
        };
        self.reconciler.set_ready(&handle.id, readiness, self.now)
    }

    fn advance(&mut self, time: Duration) {
        self.now.instant += time;
        self.now.wall += time;
    }

    fn step(&mut self) -> Step {
        self.reconciler.step(self.now)
    }

    /// Steps, and expects an action.
    fn action(&mut self) -> Action {
        match self.step() {
            Step::Perform(action) => action,
            other => panic!("expected an action, got {other:?}"),
        }
    }

    /// Steps, and expects no action. Returns the time of the next step.
    fn idle(&mut self) -> Option<Instant> {
        match self.step() {
            Step::SleepUntil(at) => {
                assert!(at.is_none_or(|at| at > self.now.instant), "busy loop");
                at
            }
            other => panic!("expected no action, got {other:?}"),
        }
    }

    fn finish(&mut self, action: &Action, outcome: ActionOutcome) {
        let action = action.clone();
        let event = Event::Finished { action, outcome };
        self.reconciler.on_event(event, self.now);
    }

    fn ensured(&self) -> ActionOutcome {
        let (read_at, revision) = (self.revision, self.revision);
        ActionOutcome::Ensured { read_at, revision }
    }

    fn deleted(&self) -> ActionOutcome {
        let (read_at, revision) = (self.revision, self.revision);
        ActionOutcome::Deleted { read_at, revision }
    }

    fn renewed(&self) -> ActionOutcome {
        let sent_at = self.now.instant;
        ActionOutcome::Renewed { sent_at }
    }

    fn fail(&mut self, action: &Action) {
        let error = Error::Timeout {
            operation: "test".into(),
            after: Duration::ZERO,
            reason: "text".into(),
        };
        self.finish(action, ActionOutcome::Failed(error));
    }

    /// Waits for the next renewal, which finds that the lease is gone.
    fn lose_lease(&mut self) {
        let renew_at = self.idle().unwrap();
        self.advance(renew_at - self.now.instant);
        let renew = self.action();
        assert!(matches!(renew, Action::Renew { .. }), "{renew:?}");
        self.finish(&renew, ActionOutcome::LeaseGone);
    }

    /// Performs all due actions with success, a grant with the lease `lease`. Returns the actions.
    fn settle(&mut self, lease: i64) -> Vec<String> {
        let mut performed = Vec::new();
        while let Step::Perform(action) = self.step() {
            let outcome = match action {
                Action::Grant => ActionOutcome::Granted { lease, ttl: TTL },
                Action::Renew { .. } => self.renewed(),
                Action::Ensure(_) => self.ensured(),
                Action::Delete { .. } => self.deleted(),
                Action::Revoke { .. } => ActionOutcome::Revoked,
            };
            self.finish(&action, outcome);
            performed.push(short(&action));
        }
        performed
    }

    fn key_changed(&mut self, key: &str, revision: i64, stored: Option<StoredKey>) {
        self.revision = revision;
        self.key_event(key, KeyEvent::Changed { revision, stored });
    }

    fn watch_started(&mut self, key: &str) {
        self.key_event(key, KeyEvent::Started);
    }

    fn key_event(&mut self, key: &str, event: KeyEvent) {
        let key = key.to_owned();
        let event = Event::Key { key, event };
        self.reconciler.on_event(event, self.now);
    }

    fn close_client(&mut self) {
        let name = "main".into();
        let event = Event::ClientClosed(Error::Closed { name });
        self.reconciler.on_event(event, self.now);
    }
}

/// An action in a few words. For a write: its keys, lease and generation, and whether it takes the
/// keys over from other registrations.
fn short(action: &Action) -> String {
    match action {
        Action::Grant => "grant".into(),
        Action::Renew { lease } => format!("renew {lease}"),
        Action::Revoke { lease } => format!("revoke {lease}"),
        Action::Delete { keys, .. } => format!("delete {}", keys.join(" ")),
        Action::Ensure(ensure) => {
            let keys: Vec<_> = ensure.records.iter().map(|(key, _)| key.as_str()).collect();
            let is_new = ensure.owned_revision.is_none();
            let verb = if is_new { "take" } else { "put" };
            let (lease, generation) = (ensure.lease, ensure.generation);
            format!("{verb} {} @{lease} #{generation}", keys.join(" "))
        }
    }
}

fn stored_key(lease: i64, value: &str) -> Option<StoredKey> {
    Some(StoredKey {
        lease,
        mod_revision: 11,
        value: value.into(),
    })
}

fn state(handle: &EntryHandle) -> RegistrationState {
    handle.status.borrow().state.clone()
}

fn is_recovering(handle: &EntryHandle) -> bool {
    matches!(state(handle), RegistrationState::Recovering { .. })
}

/// Whether the registration with the lease 9 supersedes this one.
fn is_superseded(handle: &EntryHandle) -> bool {
    matches!(state(handle), RegistrationState::Superseded { by: 9, .. })
}

/// A target that has each key with the key itself as its value.
fn target<const N: usize>(keys: [&str; N]) -> TargetRecords {
    TargetRecords {
        records: keys.map(|key| (key.to_owned(), key.into())).into(),
        draining: false,
    }
}

/// A target with one key.
fn target_with_value(key: &str, value: &str, draining: bool) -> TargetRecords {
    TargetRecords {
        records: vec![(key.into(), value.into())],
        draining,
    }
}
