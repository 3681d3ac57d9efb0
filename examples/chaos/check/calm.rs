//! Whether what a fault has done is put right within the time in which nothing else is done to it:
//! the end of the run must not be the only moment that counts, for later faults can heal what
//! earlier ones broke.

use std::time::Duration;

use super::{States, differences, wrong};
use crate::record::{Change, Disturbance, Epoch, Life, Shown, Whom, key_of};
use crate::schedule::Path;

/// How long nothing is done to somebody until they must be as they should be. The same as after
/// the last fault.
pub const CALM: Duration = Duration::from_secs(5);

/// The ends of those stretches in which nothing was done for [`CALM`] or more.
fn calm_until(
    mut disturbed: Vec<(Duration, Duration)>,
    begin: Duration,
    end: Duration,
) -> Vec<Duration> {
    disturbed.sort();
    disturbed.push((end, end));
    let mut ends = Vec::new();
    let mut since = begin;
    for (from, to) in disturbed {
        let until = from.min(end);
        if until >= since + CALM {
            ends.push(until);
        }
        since = since.max(to);
    }
    ends
}

/// Servers that lived, and were not registered as they should be for all of [`CALM`] while nothing
/// was done to them, to their path or to etcd. Up to `end`, when the last fault was over.
pub fn lost(
    lives: &[Life],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    end: Duration,
) -> Vec<String> {
    let mut found = Vec::new();
    for life in lives {
        let concerns = |whom: Whom| match whom {
            Whom::Everybody => true,
            Whom::Path(path) => life.name.path() == Some(path),
            Whom::Server(name) => life.name == name,
        };
        let disturbed = disturbances
            .iter()
            .filter(|disturbance| concerns(disturbance.whom));
        let disturbed = disturbed.map(|d| (d.from, d.to)).collect();
        let until = life.end.map_or(end, |own| own.signalled.min(end));
        let key = key_of(life.name);
        for until in calm_until(disturbed, life.started, until) {
            let from = until - CALM;
            // There is one: the first began before any server started.
            let Some(epoch) = epochs.iter().rfind(|epoch| epoch.began <= from) else {
                continue;
            };
            let of_key = || epoch.changes.iter().filter(|change| change.key == key);
            let mut why = wrong(life, of_key().rfind(|change| change.at <= from));
            let later = of_key().filter(|change| change.at > from && change.at <= until);
            for change in later {
                why = why.and_then(|_| wrong(life, Some(change)));
            }
            if let Some(why) = why {
                found.push(format!(
                    "{} lives and {why}, from {:.3} s to {:.3} s, a time without faults",
                    life.name,
                    from.as_secs_f64(),
                    until.as_secs_f64()
                ));
            }
        }
    }
    found
}

/// When a directory did not once show what was in etcd for all of [`CALM`], while nothing was done
/// to its path or to etcd.
pub fn apart(
    client: usize,
    shown: &[Shown],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    end: Duration,
) -> Vec<String> {
    let concerns = |whom: Whom| match whom {
        Whom::Everybody => true,
        Whom::Path(path) => path == Path::Client(client),
        Whom::Server(_) => false,
    };
    let disturbed = disturbances
        .iter()
        .filter(|disturbance| concerns(disturbance.whom));
    let disturbed = disturbed.map(|d| (d.from, d.to)).collect();
    let begin = shown.first().map_or(end, |first| first.at);
    let states: Vec<States> = epochs.iter().map(|e| States::of(&e.changes)).collect();
    let mut found = Vec::new();
    for until in calm_until(disturbed, begin, end) {
        let from = until - CALM;
        let Some(index) = epochs.iter().rposition(|epoch| epoch.began <= from) else {
            continue;
        };
        let within = |at: &Duration| *at > from && *at <= until;
        let changed = epochs[index]
            .changes
            .iter()
            .map(|change: &Change| change.at);
        let moments = changed.chain(shown.iter().map(|snapshot| snapshot.at));
        let mut last = Vec::new();
        let agreed = std::iter::once(from)
            .chain(moments.filter(within))
            .any(|at| {
                let Some(snapshot) = shown.iter().rfind(|snapshot| snapshot.at <= at) else {
                    return false;
                };
                last = differences(states[index].when(at), &snapshot.picture);
                last.is_empty()
            });
        if !agreed {
            found.push(format!(
                "client {client} was apart from {:.3} s to {:.3} s, a time without faults: {}",
                from.as_secs_f64(),
                until.as_secs_f64(),
                last.join(", ")
            ));
        }
    }
    found
}
