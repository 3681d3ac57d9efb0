//! Checks that the system recovers from each fault within a quiet period, and stays correct while
//! only the content of etcd changes. Checking only at the end of the run would not do, because
//! later faults can repair the damage of earlier ones.

use std::time::Duration;

use super::{Findings, States, differences, wrong};
use crate::record::{Disturbance, Epoch, Life, Scope, ShownSnapshot, keys_of, range};
use crate::schedule::Path;

/// Time to converge after the last fault, and after each change in etcd.
pub const CONVERGENCE_TIME: Duration = Duration::from_secs(5);

/// The periods without a fault that last at least [`CONVERGENCE_TIME`].
fn quiet_periods(
    mut disturbed: Vec<(Duration, Duration)>,
    begin: Duration,
    end: Duration,
) -> Vec<(Duration, Duration)> {
    disturbed.sort();
    disturbed.push((end, end));
    let mut quiet_periods = Vec::new();
    let mut since = begin;
    for (from, to) in disturbed {
        let until = from.min(end);
        if until >= since + CONVERGENCE_TIME {
            quiet_periods.push((since, until));
        }
        since = since.max(to);
    }
    quiet_periods
}

/// Checks each window that begins with the period or with a change in it: within
/// [`CONVERGENCE_TIME`] there must be a moment at which nothing is wrong. Windows that extend
/// beyond the period are skipped.
///
/// `moments` are the times at which the result can change, in order. Only the first violation of a
/// period is reported.
fn judge(
    who: &str,
    (since, until): (Duration, Duration),
    changes: &[Duration],
    moments: &[Duration],
    wrong: impl Fn(Duration) -> Option<String>,
) -> Findings {
    let mut judged = Findings::default();
    let within = changes.iter().filter(|at| **at > since && **at <= until);
    let mut begins: Vec<Duration> = within.copied().collect();
    begins.insert(0, since);
    begins.dedup();
    for begin in begins {
        let end = begin + CONVERGENCE_TIME;
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
                "{who} {}, from {:.3} s to {:.3} s, without a fault",
                why.unwrap_or_default(),
                begin.as_secs_f64(),
                end.as_secs_f64()
            ));
        }
    }
    judged
}

/// Running servers that were not registered correctly for all of [`CONVERGENCE_TIME`], without a
/// fault of the server, its path or etcd.
pub fn unregistered_servers(
    lives: &[Life],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    end: Duration,
) -> Findings {
    let mut judged = Findings::default();
    for life in lives {
        let disturbed = disturbances.iter().filter(|d| d.scope.includes(life.name));
        let disturbed = disturbed.map(|d| (d.from, d.to)).collect();
        let until = life.end.map_or(end, |own| own.signalled.min(end));
        for period in quiet_periods(disturbed, life.started, until) {
            // An epoch exists: the first one began before any server started.
            let Some(epoch) = epochs.iter().rfind(|epoch| epoch.began <= period.0) else {
                continue;
            };
            for key in keys_of(life.name) {
                let of_key = || epoch.changes.iter().filter(|change| change.key == key);
                let changes: Vec<Duration> = of_key().map(|change| change.at).collect();
                let wrong = |at| wrong(life, &key, of_key().rfind(|change| change.at <= at));
                let who = format!("{} lives and", life.name);
                judged.extend(judge(&who, period, &changes, &changes, wrong));
            }
        }
    }
    judged
}

/// Times when a directory did not show the content of etcd within [`CONVERGENCE_TIME`] of a change,
/// or of the last fault of its path or of etcd.
pub fn diverged_directories(
    client: usize,
    shown: &[ShownSnapshot],
    epochs: &[Epoch],
    disturbances: &[Disturbance],
    end: Duration,
) -> Findings {
    let concerns = |scope: Scope| match scope {
        Scope::All => true,
        Scope::Path(path) => path == Path::Client(client),
        Scope::Server(_) => false,
    };
    let disturbed = disturbances
        .iter()
        .filter(|disturbance| concerns(disturbance.scope));
    let disturbed = disturbed.map(|d| (d.from, d.to)).collect();
    let begin = shown.first().map_or(end, |first| first.at);
    let range = range();
    let mut judged = Findings::default();
    for period in quiet_periods(disturbed, begin, end) {
        let Some(epoch) = epochs.iter().rfind(|epoch| epoch.began <= period.0) else {
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
            let found = differences(states.when(at), &snapshot.instances);
            (!found.is_empty()).then(|| format!("diverged ({})", found.join(", ")))
        };
        let who = format!("client {client}");
        judged.extend(judge(&who, period, &changes, &moments, wrong));
    }
    judged
}
