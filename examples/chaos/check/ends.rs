//! What servers that have ended left behind: nothing, if they were asked to leave and nothing was in the
//! way; else nothing beyond their lease.

use std::time::Duration;

use super::{Judged, noticed};
use crate::record::{Change, Disturbance, End, Ending, Epoch, Extension, Life, decode, keys_of};
use crate::schedule::Path;

/// What a key may last beyond its lease's time to live: etcd gives each lease an election time-out
/// (1 s) more when a leader takes over, looks for those that are over every half second
/// (`server/lease/lessor.go`), and the rest is for looking, here, on a busy machine.
const EXPIRY_MARGIN: Duration = Duration::from_secs(3);

/// Servers that were asked to leave, and went before all their keys were seen to be draining and then
/// deleted. Not those that something was in the way of: leaving waits for etcd for longer than coming
/// back takes, so that only counts what was wrong between the signal and the end.
///
/// A key that was not there yet, and never came, is none to be deleted.
pub fn stayed(
    lives: &[Life],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    stalls: &[(Duration, Duration)],
) -> Judged {
    let mut judged = Judged::default();
    for life in lives {
        let Some(End {
            how: Ending::Left,
            signalled,
            gone,
        }) = life.end
        else {
            continue;
        };
        let hindered = disturbances
            .iter()
            .any(|d| d.whom.has(life.name) && d.from <= gone && d.to >= signalled);
        let epoch = epochs.iter().rfind(|epoch| epoch.began <= signalled);
        let Some(epoch) = epoch.filter(|_| !hindered) else {
            continue;
        };
        judged.windows.push(gone);
        for key in keys_of(life.name) {
            let changes = epoch.changes.iter().filter(|change| change.key == key);
            if let Some(why) = not_left(changes, signalled, noticed(gone, stalls)) {
                judged.violations.push(format!(
                    "{} was asked to leave at {:.3} s and ended at {:.3} s; {key} {why}",
                    life.name,
                    signalled.as_secs_f64(),
                    gone.as_secs_f64()
                ));
            }
        }
    }
    judged
}

/// What is missing of a key's leaving between these times.
fn not_left<'a>(
    changes: impl DoubleEndedIterator<Item = &'a Change> + Clone,
    signalled: Duration,
    until: Duration,
) -> Option<String> {
    let mut before = changes.clone().filter(|change| change.at <= signalled);
    let was_there = before.next_back().is_some_and(|c| c.value.is_some());
    let mut puts = changes.clone().filter(|change| change.value.is_some());
    if !was_there && !puts.any(|change| change.at > signalled) {
        return None;
    }
    let is_draining = |change: &Change| {
        let value = change.value.as_ref();
        value.is_some_and(|value| decode(&change.key, value).is_some_and(|i| i.draining))
    };
    let mut after = changes.filter(|change| change.at > signalled);
    if !after.any(is_draining) {
        return Some("was never draining".to_owned());
    }
    // What follows the mark: it may be set again, and the last of all is the deletion.
    match after.next_back() {
        Some(Change {
            value: None, at, ..
        }) if *at <= until => None,
        Some(Change {
            value: None, at, ..
        }) => Some(format!("was deleted at {:.3} s only", at.as_secs_f64())),
        _ => Some("was never deleted".to_owned()),
    }
}

/// When the key of a server that is gone must be gone as well: the lease's time to live, and a margin,
/// after its end; or after the last moment before then at which its lease may have been extended.
///
/// New leaders extend it as often as there are any, which is how etcd counts. What has waited does so
/// once: it was sent while the server lived. Where nobody could take the key away, the rest of its time
/// begins when somebody can.
pub fn expires(life: &Life, end: End, ttl: Duration, extensions: &[Extension]) -> Duration {
    let gone = end.gone;
    let mut standstills = Vec::new();
    // From and to when, and whether the lease counts anew from then on.
    let mut moments = Vec::new();
    let on_its_way = |path: Option<Path>| path.is_none() || path == life.name.path();
    for extension in extensions {
        match *extension {
            Extension::Leader { at } if at >= gone => moments.push((at, at, true)),
            Extension::Waited { from, to, path }
                if from <= gone && to >= gone && on_its_way(path) =>
            {
                moments.push((to, from, true));
            }
            Extension::Standstill { from, to } if to > gone => standstills.push((from, to)),
            _ => {}
        }
    }
    let standstills = merged(standstills).into_iter();
    moments.extend(standstills.map(|(from, to)| (to, from, false)));
    moments.sort();
    let (mut counts_from, mut limit) = (gone, gone + ttl + EXPIRY_MARGIN);
    for (to, from, anew) in moments {
        if anew && to <= limit {
            counts_from = to;
            limit = to + ttl + EXPIRY_MARGIN;
        } else if !anew && from < limit {
            limit += to.saturating_sub(from.max(counts_from));
        }
    }
    limit
}

/// The same time in spans that do not touch each other.
fn merged(mut spans: Vec<(Duration, Duration)>) -> Vec<(Duration, Duration)> {
    spans.sort();
    let mut merged: Vec<(Duration, Duration)> = Vec::new();
    for (from, to) in spans {
        match merged.last_mut() {
            Some((_, end)) if from <= *end => *end = to.max(*end),
            _ => merged.push((from, to)),
        }
    }
    merged
}

/// Servers that are dead and of which a key was there for too long. `now` is when the last look was
/// taken.
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
        let limit = expires(life, end, ttl, extensions);
        let everywhere =
            keys_of(life.name).flat_map(|key| epochs.iter().map(move |e| (key.clone(), e)));
        for (key, epoch) in everywhere {
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
                    "{} ended at {:.3} s; {key}, which had to go by {:.3} s, {state} {:.3} s",
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
    let dead = lives.iter().filter(|life| life.end.is_some());
    dead.flat_map(|life| keys_of(life.name)).any(|key| {
        let last = changes.iter().rfind(|change| change.key == key);
        last.is_some_and(|change| change.value.is_some() && change.lease != 0)
    })
}
