//! Checks the keys that ended servers left behind: none if the server was asked to leave and no
//! fault was in the way, otherwise none beyond their lease.

use std::time::Duration;

use super::{Findings, notice_deadline};
use crate::record::{Change, Disturbance, Epoch, Exit, ExitKind, Extension, Life, decode, keys_of};
use crate::schedule::Path;

/// Tolerance beyond a lease's TTL: a new leader extends each lease by the election timeout (1 s),
/// etcd looks for expired leases every 500 ms (`server/lease/lessor.go`), and the observer on a
/// busy machine needs the rest.
const EXPIRY_MARGIN: Duration = Duration::from_secs(3);

/// Servers that were asked to leave and exited before all of their keys were first marked as
/// draining and then deleted. Servers with a fault in the way are skipped; only faults between the
/// signal and the exit count, because leaving waits for etcd for longer than etcd takes to come
/// back.
///
/// A key that was never written need not be deleted.
pub fn leftover_keys(
    lives: &[Life],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    stalls: &[(Duration, Duration)],
) -> Findings {
    let mut judged = Findings::default();
    for life in lives {
        let Some(Exit {
            how: ExitKind::Terminated,
            signalled,
            gone,
        }) = life.end
        else {
            continue;
        };
        let hindered = disturbances
            .iter()
            .any(|d| d.scope.includes(life.name) && d.from <= gone && d.to >= signalled);
        let epoch = epochs.iter().rfind(|epoch| epoch.began <= signalled);
        let Some(epoch) = epoch.filter(|_| !hindered) else {
            continue;
        };
        judged.windows.push(gone);
        for key in keys_of(life.name) {
            let changes = epoch.changes.iter().filter(|change| change.key == key);
            if let Some(why) = missing_step(changes, signalled, notice_deadline(gone, stalls)) {
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

/// The missing step of a key's removal between these times.
fn missing_step<'a>(
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
    // The mark may be written again; the last change must be the deletion.
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

/// The time by which the key of an ended server must be gone: TTL plus margin after its exit, or
/// after the last event before then that may have extended the lease.
///
/// Each new leader extends the lease. A delayed message extends it once, because it was sent before
/// the exit. If nothing could expire for some time, the remaining TTL continues after that time.
pub fn key_deadline(life: &Life, end: Exit, ttl: Duration, extensions: &[Extension]) -> Duration {
    let gone = end.gone;
    let mut standstills = Vec::new();
    // Start, end, and whether the TTL restarts at the end.
    let mut moments = Vec::new();
    let on_its_way = |path: Option<Path>| path.is_none() || path == life.name.path();
    for extension in extensions {
        match *extension {
            Extension::Leader { at } if at >= gone => moments.push((at, at, true)),
            Extension::Delayed { from, to, path }
                if from <= gone && to >= gone && on_its_way(path) =>
            {
                moments.push((to, from, true));
            }
            Extension::Standstill { from, to } if to > gone => standstills.push((from, to)),
            _ => {}
        }
    }
    let standstills = merge_spans(standstills).into_iter();
    moments.extend(standstills.map(|(from, to)| (to, from, false)));
    moments.sort();
    let (mut counts_from, mut limit) = (gone, gone + ttl + EXPIRY_MARGIN);
    for (to, from, restarts) in moments {
        if restarts && to <= limit {
            counts_from = to;
            limit = to + ttl + EXPIRY_MARGIN;
        } else if !restarts && from < limit {
            limit += to.saturating_sub(from.max(counts_from));
        }
    }
    limit
}

/// Merges overlapping time spans.
fn merge_spans(mut spans: Vec<(Duration, Duration)>) -> Vec<(Duration, Duration)> {
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

/// Ended servers with a key that outlived its deadline. `now` is the time of the last observation.
///
/// A key that a manual edit overwrote without a lease does not count, because nothing removes it.
pub fn overdue_keys(
    lives: &[Life],
    epochs: &[Epoch],
    extensions: &[Extension],
    ttl: Duration,
    now: Duration,
) -> Vec<String> {
    let mut found = Vec::new();
    for life in lives {
        let Some(end) = life.end else { continue };
        let limit = key_deadline(life, end, ttl, extensions);
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
                    None => "is still there at",
                };
                found.push(format!(
                    "{} ended at {:.3} s; {key}, which had to be gone by {:.3} s, {state} {:.3} s",
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

/// Whether the current history still has a key of an ended server.
pub fn any_dead_registered(lives: &[Life], changes: &[Change]) -> bool {
    let dead = lives.iter().filter(|life| life.end.is_some());
    dead.flat_map(|life| keys_of(life.name)).any(|key| {
        let last = changes.iter().rfind(|change| change.key == key);
        last.is_some_and(|change| change.value.is_some() && change.lease != 0)
    })
}
