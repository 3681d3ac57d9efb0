//! The checks: compares the record of a run with the promises. No I/O.

pub mod quiescence;
pub mod shutdowns;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::Instance;

use crate::record::{
    Change, Epoch, Exit, ExitKind, Failure, InstanceMap, Life, ShownSnapshot, decode, keys_of,
    range,
};

/// Delay until a server's exit is noticed: a client may still send calls until it reads the end of
/// the connection, and the observer receives etcd's events late on a busy machine.
const NOTICE: Duration = Duration::from_millis(250);

/// A run of this length has quiet periods, see [`Schedule`](crate::schedule::Schedule).
const LONG: Duration = Duration::from_secs(60);

/// The instances that a directory may show for one key.
#[derive(Debug, Clone)]
struct Allowed {
    /// The instances, of which any is allowed.
    choices: Vec<Arc<Instance>>,
    /// Whether showing no instance is allowed as well.
    optional: bool,
}

type State = BTreeMap<String, Allowed>;

/// The states of one history, ordered by revision.
struct States {
    /// Each with its revision and the time when it was observed.
    states: Vec<(i64, Duration, State)>,
}

impl States {
    /// After an invalid value a directory keeps the last valid one of that key that it has seen.
    /// The record does not say which that was, so any of them is allowed, or none.
    fn of(changes: &[Change]) -> Self {
        let range = range();
        let mut state = State::new();
        let mut good: BTreeMap<&str, Vec<Arc<Instance>>> = BTreeMap::new();
        let mut states = vec![(0, Duration::ZERO, state.clone())];
        let changes = changes
            .iter()
            .filter(|change| change.key.starts_with(&range));
        for change in changes {
            let key = change.key.as_str();
            match &change.value {
                None => {
                    state.remove(key);
                    good.remove(key);
                }
                Some(value) => {
                    if change.create_revision == change.revision {
                        good.remove(key);
                    }
                    let good = good.entry(key).or_default();
                    let allowed = match decode(key, value) {
                        Some(instance) => {
                            good.push(Arc::clone(&instance));
                            Allowed {
                                choices: vec![instance],
                                optional: false,
                            }
                        }
                        None => Allowed {
                            choices: good.clone(),
                            optional: true,
                        },
                    };
                    state.insert(key.to_owned(), allowed);
                }
            }
            match states.last_mut() {
                Some((revision, _, last)) if *revision == change.revision => {
                    last.clone_from(&state)
                }
                _ => states.push((change.revision, change.at, state.clone())),
            }
        }
        Self { states }
    }

    fn at(&self, revision: i64) -> &State {
        let after = self.states.partition_point(|(of, _, _)| *of <= revision);
        &self.states[after.max(1) - 1].2
    }

    fn when(&self, at: Duration) -> &State {
        let after = self.states.partition_point(|(_, heard, _)| *heard <= at);
        &self.states[after.max(1) - 1].2
    }
}

/// The differences between a state and a directory's instances, key by key.
fn differences(state: &State, instances: &InstanceMap) -> Vec<String> {
    let mut found = Vec::new();
    for (key, allowed) in state {
        match instances.get(key) {
            None if allowed.optional => {}
            None => found.push(format!("{key} is missing")),
            Some(shown) if allowed.choices.contains(shown) => {}
            Some(shown) => found.push(format!("{key} is shown at {}", shown.address)),
        }
    }
    let unknown = instances.keys().filter(|key| !state.contains_key(*key));
    found.extend(unknown.map(|key| format!("{key} should not be there")));
    found
}

/// The differences between the content of etcd, to which `changes` lead, and a directory's
/// instances.
pub fn differences_now(changes: &[Change], instances: &InstanceMap) -> Vec<String> {
    differences(States::of(changes).at(i64::MAX), instances)
}

/// The result of a check that was applied to many time windows.
#[derive(Debug, Default)]
pub struct Findings {
    pub violations: Vec<String>,
    /// The end of each checked window.
    pub windows: Vec<Duration>,
}

impl Findings {
    pub fn extend(&mut self, other: Findings) {
        self.violations.extend(other.violations);
        self.windows.extend(other.windows);
    }

    /// The number of windows that ended by this time.
    pub fn until(&self, end: Duration) -> usize {
        self.windows.iter().filter(|at| **at <= end).count()
    }
}

/// How often the checks that need a quiet period were applied.
#[derive(Debug, Clone, Copy)]
pub struct Coverage {
    /// Quiet periods of directories.
    pub directories: usize,
    /// Quiet periods of registrations.
    pub registrations: usize,
    /// Servers that were asked to leave and were undisturbed.
    pub leavings: usize,
}

/// Reports if a run long enough for quiet periods never applied one of the checks: without any
/// window, "no violation" means nothing.
pub fn insufficient_coverage(length: Duration, coverage: Coverage) -> Option<String> {
    let Coverage {
        directories,
        registrations,
        leavings,
    } = coverage;
    (length >= LONG && [directories, registrations, leavings].contains(&0)).then(|| {
        format!(
            "too few checks between the faults: {directories} of directories, {registrations} of \
             registrations, {leavings} of shutdowns"
        )
    })
}

/// The result of comparing a directory with history.
#[derive(Debug, Default)]
pub struct HistoryVerdict {
    /// Snapshots that do not match any state.
    pub divergences: Vec<String>,
    /// Snapshots that cannot be checked: later than the last known revision of a wiped etcd.
    pub unjudged: usize,
}

/// Checks that each snapshot of a directory is a state of etcd's history, in order.
///
/// A snapshot carries its revision, not its history. The snapshot must match the state at its
/// revision, either in the history of the snapshot before it, with a revision that did not go back,
/// or in a later history that had begun before the snapshot. The earliest match is taken because it
/// leaves the most choices for the following snapshots: if any reading of the whole sequence is in
/// order, this one is.
pub fn directory(client: usize, shown: &[ShownSnapshot], epochs: &[Epoch]) -> HistoryVerdict {
    let states: Vec<States> = epochs.iter().map(|e| States::of(&e.changes)).collect();
    let mut verdict = HistoryVerdict::default();
    let (mut in_epoch, mut revision) = (0, 0);
    'snapshots: for snapshot in shown {
        let mut why = Vec::new();
        let mut beyond = None;
        for (index, epoch) in epochs.iter().enumerate().skip(in_epoch) {
            if index > in_epoch && epoch.began > snapshot.at {
                break;
            }
            if index == in_epoch && snapshot.revision < revision {
                why.push(format!("history {index}: back from revision {revision}"));
                continue;
            }
            if snapshot.revision > epoch.known_to {
                why.push(format!("history {index} ends at {}", epoch.known_to));
                if epoch.ended.is_some() && !epoch.whole {
                    beyond.get_or_insert(index);
                }
                continue;
            }
            let found = differences(states[index].at(snapshot.revision), &snapshot.instances);
            if found.is_empty() {
                (in_epoch, revision) = (index, snapshot.revision);
                continue 'snapshots;
            }
            why.push(format!("history {index}: {}", found.join(", ")));
        }
        if let Some(index) = beyond {
            verdict.unjudged += 1;
            (in_epoch, revision) = (index, snapshot.revision);
            continue;
        }
        verdict.divergences.push(format!(
            "client {client} at {:.3} s showed revision {}, which never was: {}",
            snapshot.at.as_secs_f64(),
            snapshot.revision,
            why.join("; ")
        ));
    }
    verdict
}

/// The endpoint a call was sent to: a status message of a sent call begins with its address.
pub fn sent_to(message: &str) -> Option<String> {
    let (address, _) = message.split_once(": ")?;
    let address: std::net::SocketAddr = address.parse().ok()?;
    Some(address.to_string())
}

/// Whether a failed call is allowed: its server was killed while the call was in flight.
pub fn is_allowed(failure: &Failure, lives: &[Life], stalls: &[(Duration, Duration)]) -> bool {
    lives
        .iter()
        .filter(|life| failure.sent_to.as_ref() == Some(&life.address))
        .any(|life| match life.end {
            Some(Exit {
                how: ExitKind::Killed,
                signalled,
                gone,
            }) => failure.begun <= notice_deadline(gone, stalls) && failure.ended >= signalled,
            _ => false,
        })
}

/// The time by which a server's exit is noticed everywhere. Stalls of the machine do not count.
fn notice_deadline(gone: Duration, stalls: &[(Duration, Duration)]) -> Duration {
    let mut noticed = gone + NOTICE;
    for (from, to) in stalls {
        if *to > gone && *from < noticed {
            noticed += *to - *from.max(&gone);
        }
    }
    noticed
}

/// Running servers that are not registered correctly.
pub fn unregistered_servers(lives: &[Life], changes: &[Change]) -> Vec<String> {
    let mut content: BTreeMap<&str, &Change> = BTreeMap::new();
    for change in changes {
        content.insert(&change.key, change);
    }
    let mut found = Vec::new();
    for life in lives.iter().filter(|life| life.end.is_none()) {
        for key in keys_of(life.name) {
            if let Some(why) = wrong(life, &key, content.get(key.as_str()).copied()) {
                found.push(format!("{} lives and {why}", life.name));
            }
        }
    }
    found
}

/// The fault in a running server's key, given the key's last change.
fn wrong(life: &Life, key: &str, change: Option<&Change>) -> Option<String> {
    let Some((change, value)) = change.and_then(|c| Some((c, c.value.as_ref()?))) else {
        return Some(format!("has no key {key}"));
    };
    let right = |i: Arc<Instance>| i.address == life.address && !i.draining;
    if !decode(key, value).is_some_and(right) {
        let value = String::from_utf8_lossy(value);
        return Some(format!("is at {}, its key {key} has {value}", life.address));
    }
    (change.lease == 0).then(|| format!("its key {key} has no lease"))
}
