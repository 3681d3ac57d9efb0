//! The judgement: what was recorded is held against what is promised. No I/O in here.

pub mod calm;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::Instance;

use crate::record::{
    Change, End, Ending, Epoch, Extension, Failure, Life, Picture, Shown, decode, key_of, range,
};

/// How long after a server's death a call may still be sent to it: until the client has read the end
/// of the connection, which on a busy machine waits for its turn.
const NOTICE: Duration = Duration::from_millis(250);

/// What a key may last beyond its lease's time to live: etcd gives each lease an election time-out
/// (1 s) more when a leader takes over, looks for those that are over every half second
/// (`server/lease/lessor.go`), and the rest is for looking, here, on a busy machine.
const EXPIRY_MARGIN: Duration = Duration::from_secs(3);

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
/// Time in which the machine stood still does not count for noticing a death.
pub fn is_allowed(failure: &Failure, lives: &[Life], stalls: &[(Duration, Duration)]) -> bool {
    let noticed = |gone: Duration| {
        let mut noticed = gone + NOTICE;
        for (from, to) in stalls {
            if *to > gone && *from < noticed {
                noticed += *to - *from.max(&gone);
            }
        }
        noticed
    };
    lives
        .iter()
        .filter(|life| failure.sent_to.as_ref() == Some(&life.address))
        .any(|life| match life.end {
            Some(End {
                how: Ending::Killed,
                signalled,
                gone,
            }) => failure.begun <= noticed(gone) && failure.ended >= signalled,
            _ => false,
        })
}

/// When the key of a server that is gone must be gone as well: the lease's time to live, and a margin,
/// after its end, or after the last moment before then at which the lease may have been extended.
pub fn expires(life: &Life, end: End, ttl: Duration, extensions: &[Extension]) -> Duration {
    let concern = |e: &&Extension| e.path.is_none() || e.path == life.name.path();
    let mut moments: Vec<Duration> = extensions.iter().filter(concern).map(|e| e.at).collect();
    moments.sort();
    let mut last = end.gone;
    for moment in moments.into_iter().filter(|moment| *moment >= end.gone) {
        if moment <= last + ttl + EXPIRY_MARGIN {
            last = moment;
        }
    }
    last + ttl + EXPIRY_MARGIN
}

/// Servers that are dead and whose key was there for too long. `now` is when the last look was taken.
///
/// Not those whose key somebody's hand has overwritten without a lease: nobody removes it.
pub fn ghosts(
    lives: &[Life],
    epochs: &[Epoch],
    extensions: &[Extension],
    ttl: Duration,
    now: Duration,
) -> Vec<String> {
    let mut found = Vec::new();
    for life in lives {
        let Some(end) = life.end else { continue };
        let key = key_of(life.name);
        let limit = expires(life, end, ttl, extensions);
        for epoch in epochs {
            let of_key = || epoch.changes.iter().filter(|change| change.key == key);
            let last_put = of_key().rfind(|change| change.value.is_some());
            if last_put.is_none_or(|put| put.lease == 0) {
                continue;
            }
            let deleted = of_key().next_back().filter(|change| change.value.is_none());
            let until = deleted.map_or(epoch.ended.unwrap_or(now), |change| change.at);
            if until > limit {
                let state = match deleted {
                    Some(_) => "was there until",
                    None => "is there at",
                };
                found.push(format!(
                    "{} ended at {:.3} s; its key, which had to go by {:.3} s, {state} {:.3} s",
                    life.name,
                    end.gone.as_secs_f64(),
                    limit.as_secs_f64(),
                    until.as_secs_f64()
                ));
            }
        }
    }
    found
}

/// Whether a server that is dead is still there, according to the changes of the present history.
pub fn any_dead(lives: &[Life], changes: &[Change]) -> bool {
    lives.iter().filter(|life| life.end.is_some()).any(|life| {
        let key = key_of(life.name);
        let last = changes.iter().rfind(|change| change.key == key);
        last.is_some_and(|change| change.value.is_some() && change.lease != 0)
    })
}

/// Servers that live and are not in etcd as they should be.
pub fn lost(lives: &[Life], changes: &[Change]) -> Vec<String> {
    let mut content: BTreeMap<&str, &Change> = BTreeMap::new();
    for change in changes {
        content.insert(&change.key, change);
    }
    let mut found = Vec::new();
    for life in lives.iter().filter(|life| life.end.is_none()) {
        let key = key_of(life.name);
        if let Some(why) = wrong(life, content.get(key.as_str()).copied()) {
            found.push(format!("{} lives and {why}", life.name));
        }
    }
    found
}

/// What is wrong with the last change of a living server's key.
fn wrong(life: &Life, change: Option<&Change>) -> Option<String> {
    let Some((change, value)) = change.and_then(|c| Some((c, c.value.as_ref()?))) else {
        return Some("has no key".to_owned());
    };
    let right = |i: Arc<Instance>| i.address == life.address && !i.draining;
    if !decode(&change.key, value).is_some_and(right) {
        let value = String::from_utf8_lossy(value);
        return Some(format!("is at {}, its key has {value}", life.address));
    }
    (change.lease == 0).then(|| "its key has no lease".to_owned())
}
