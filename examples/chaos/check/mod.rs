//! The judgement: what was recorded is held against what is promised. No I/O in here.

pub mod calm;
pub mod ends;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::Instance;

use crate::record::{
    Change, End, Ending, Epoch, Failure, Life, Picture, Shown, decode, keys_of, range,
};

/// How long after a server's end something may be noticed that was before it: a call may still be sent
/// to it until the client has read the end of the connection, and what etcd tells until it is read
/// here. On a busy machine that waits for its turn.
const NOTICE: Duration = Duration::from_millis(250);

/// A run of this length has times of calm, see [`Schedule`](crate::schedule::Schedule).
const LONG: Duration = Duration::from_secs(60);

/// What a directory may show of one key.
#[derive(Debug, Clone)]
struct Allowed {
    /// One of these.
    choices: Vec<Arc<Instance>>,
    /// Or nothing.
    optional: bool,
}

type State = BTreeMap<String, Allowed>;

/// The states of one history, in order of revision.
struct States {
    /// With the revision of each, and when it was heard of.
    states: Vec<(i64, Duration, State)>,
}

impl States {
    /// A value that cannot be decoded leaves the last good one of the same key in force that a
    /// directory has seen. Which it has seen is not known here: any of them, or none, will do.
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

/// What differs between a state and a picture, key by key.
fn differences(state: &State, picture: &Picture) -> Vec<String> {
    let mut found = Vec::new();
    for (key, allowed) in state {
        match picture.get(key) {
            None if allowed.optional => {}
            None => found.push(format!("{key} is missing")),
            Some(shown) if allowed.choices.contains(shown) => {}
            Some(shown) => found.push(format!("{key} is shown at {}", shown.address)),
        }
    }
    let unknown = picture.keys().filter(|key| !state.contains_key(*key));
    found.extend(unknown.map(|key| format!("{key} should not be there")));
    found
}

/// What differs between what is in etcd and what a directory shows. `changes` lead to what is in etcd.
pub fn differences_now(changes: &[Change], picture: &Picture) -> Vec<String> {
    differences(States::of(changes).at(i64::MAX), picture)
}

/// What came of looking at something over and over.
#[derive(Debug, Default)]
pub struct Judged {
    pub violations: Vec<String>,
    /// When each time that was looked at ended.
    pub windows: Vec<Duration>,
}

impl Judged {
    pub fn extend(&mut self, other: Judged) {
        self.violations.extend(other.violations);
        self.windows.extend(other.windows);
    }

    /// How many times were looked at up to this moment.
    pub fn until(&self, end: Duration) -> usize {
        self.windows.iter().filter(|at| **at <= end).count()
    }
}

/// How often was judged what only counts with no fault in its way.
#[derive(Debug, Clone, Copy)]
pub struct Looks {
    /// Times of calm of directories.
    pub directories: usize,
    /// Times of calm of registrations.
    pub registrations: usize,
    /// Servers that were asked to leave.
    pub leavings: usize,
}

/// Says so if a run that was long enough for each of them judged none of one kind between its faults: no
/// violation means nothing then.
pub fn too_little(length: Duration, looks: Looks) -> Option<String> {
    let Looks {
        directories,
        registrations,
        leavings,
    } = looks;
    (length >= LONG && [directories, registrations, leavings].contains(&0)).then(|| {
        format!(
            "between the faults, directories were judged {directories} times, registrations \
             {registrations} times and leaving {leavings} times"
        )
    })
}

/// What came of holding a directory against history.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What was shown and never was.
    pub divergences: Vec<String>,
    /// How many could not be judged: later than the last revision that is known of a wiped etcd.
    pub unjudged: usize,
}

/// Whether everything that a directory showed is a state that etcd's history had, in order.
///
/// A snapshot tells its revision, not which history it is of. What is shown must be the state at its
/// revision in the history of the snapshot before it, and then the revision must not have gone
/// back, or in a later one that had begun by then. The earliest that fits is taken, which leaves
/// the most for the snapshots after it: if any reading of the whole sequence is in order, this one is.
pub fn directory(client: usize, shown: &[Shown], epochs: &[Epoch]) -> Verdict {
    let states: Vec<States> = epochs.iter().map(|e| States::of(&e.changes)).collect();
    let mut verdict = Verdict::default();
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
            let found = differences(states[index].at(snapshot.revision), &snapshot.picture);
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

/// A message about a call that was sent begins with the address that it was sent to.
pub fn sent_to(message: &str) -> Option<String> {
    let (address, _) = message.split_once(": ")?;
    let address: std::net::SocketAddr = address.parse().ok()?;
    Some(address.to_string())
}

/// Whether a call may have failed: it was sent to a server that was killed while it was in flight.
pub fn is_allowed(failure: &Failure, lives: &[Life], stalls: &[(Duration, Duration)]) -> bool {
    lives
        .iter()
        .filter(|life| failure.sent_to.as_ref() == Some(&life.address))
        .any(|life| match life.end {
            Some(End {
                how: Ending::Killed,
                signalled,
                gone,
            }) => failure.begun <= noticed(gone, stalls) && failure.ended >= signalled,
            _ => false,
        })
}

/// By when the end of a server is noticed everywhere. Time in which the machine stood still does not
/// count.
fn noticed(gone: Duration, stalls: &[(Duration, Duration)]) -> Duration {
    let mut noticed = gone + NOTICE;
    for (from, to) in stalls {
        if *to > gone && *from < noticed {
            noticed += *to - *from.max(&gone);
        }
    }
    noticed
}

/// Servers that live and are not in etcd as they should be.
pub fn lost(lives: &[Life], changes: &[Change]) -> Vec<String> {
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

/// What is wrong with a living server's key, of which this is the last change.
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
