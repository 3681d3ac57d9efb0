//! Whether what a fault has done is put right within the time in which nothing else is done to it, and
//! stays so while only the truth changes: the end of the run must not be the only moment that counts,
//! for later faults can heal what earlier ones broke.

use std::time::Duration;

use super::{Judged, States, differences, wrong};
use crate::record::{Disturbance, Epoch, Life, Shown, Whom, keys_of, range};
use crate::schedule::Path;

/// How long nothing is done to somebody until they must be as they should be; and how long after the
/// truth has changed. The same as after the last fault.
pub const CALM: Duration = Duration::from_secs(5);

/// Those stretches of a time in which nothing was done, if they last for [`CALM`] or more.
fn stretches(
    mut disturbed: Vec<(Duration, Duration)>,
    begin: Duration,
    end: Duration,
) -> Vec<(Duration, Duration)> {
    disturbed.sort();
    disturbed.push((end, end));
    let mut stretches = Vec::new();
    let mut since = begin;
    for (from, to) in disturbed {
        let until = from.min(end);
        if until >= since + CALM {
            stretches.push((since, until));
        }
        since = since.max(to);
    }
    stretches
}

/// Looks at what begins with a stretch and with each change of the truth in it: within [`CALM`] of
/// that there must be a moment at which nothing is wrong, as far as the stretch lasts so long.
///
/// `moments` are those at which anything may change, in order; what is wrong stays so in between. Of
/// several violations in a stretch the first is told.
fn judge(
    who: &str,
    (since, until): (Duration, Duration),
    changes: &[Duration],
    moments: &[Duration],
    wrong: impl Fn(Duration) -> Option<String>,
) -> Judged {
    let mut judged = Judged::default();
    let within = changes.iter().filter(|at| **at > since && **at <= until);
    let mut begins: Vec<Duration> = within.copied().collect();
    begins.insert(0, since);
    begins.dedup();
    for begin in begins {
        let end = begin + CALM;
        if end > until {
            break;
        }
        judged.windows.push(end);
        let first = moments.partition_point(|at| *at <= begin);
        let later = moments[first..].iter().take_while(|at| **at <= end);
        let mut why = None;
        let right = std::iter::once(&begin).chain(later).any(|at| {
            why = wrong(*at);
            why.is_none()
        });
        if !right && judged.violations.is_empty() {
            judged.violations.push(format!(
                "{who} {}, from {:.3} s to {:.3} s, a time without faults",
                why.unwrap_or_default(),
                begin.as_secs_f64(),
                end.as_secs_f64()
            ));
        }
    }
    judged
}

/// Servers that lived, and were not registered as they should be for all of [`CALM`] while nothing
/// was done to them, to their path or to etcd.
pub fn lost(
    lives: &[Life],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    end: Duration,
) -> Judged {
    let mut judged = Judged::default();
    for life in lives {
        let disturbed = disturbances.iter().filter(|d| d.whom.has(life.name));
        let disturbed = disturbed.map(|d| (d.from, d.to)).collect();
        let until = life.end.map_or(end, |own| own.signalled.min(end));
        for stretch in stretches(disturbed, life.started, until) {
            // There is one: the first began before any server started.
            let Some(epoch) = epochs.iter().rfind(|epoch| epoch.began <= stretch.0) else {
                continue;
            };
            for key in keys_of(life.name) {
                let of_key = || epoch.changes.iter().filter(|change| change.key == key);
                let changes: Vec<Duration> = of_key().map(|change| change.at).collect();
                let wrong = |at| wrong(life, &key, of_key().rfind(|change| change.at <= at));
                let who = format!("{} lives and", life.name);
                judged.extend(judge(&who, stretch, &changes, &changes, wrong));
            }
        }
    }
    judged
}

/// When a directory did not once show what was in etcd for all of [`CALM`] after it had changed, or after
/// the last that was done to its path or to etcd.
pub fn apart(
    client: usize,
    shown: &[Shown],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    end: Duration,
) -> Judged {
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
    let range = range();
    let mut judged = Judged::default();
    for stretch in stretches(disturbed, begin, end) {
        let Some(epoch) = epochs.iter().rfind(|epoch| epoch.began <= stretch.0) else {
            continue;
        };
        let states = States::of(&epoch.changes);
        let ours = epoch.changes.iter().filter(|c| c.key.starts_with(&range));
        let changes: Vec<Duration> = ours.map(|change| change.at).collect();
        let snapshots = shown.iter().map(|snapshot| snapshot.at);
        let mut moments: Vec<Duration> = changes.iter().copied().chain(snapshots).collect();
        moments.sort();
        let wrong = |at| {
            let Some(snapshot) = shown.iter().rfind(|snapshot| snapshot.at <= at) else {
                return Some("showed nothing".to_owned());
            };
            let found = differences(states.when(at), &snapshot.picture);
            (!found.is_empty()).then(|| format!("was apart ({})", found.join(", ")))
        };
        let who = format!("client {client}");
        judged.extend(judge(&who, stretch, &changes, &moments, wrong));
    }
    judged
}
