//! The verdict on a run: applies all checks to its record, and prints what they found.

use std::time::Duration;

use crate::check::{self, Coverage, Findings, quiescence, shutdowns};
use crate::clients::Notes;
use crate::record::{Disturbance, Epoch, Failure, Life};
use crate::report::{report, summarize_failures};

/// Everything that was recorded.
pub struct Record {
    pub notes: Vec<Notes>,
    pub lives: Vec<Life>,
    pub epochs: Vec<Epoch>,
    pub disturbances: Vec<Disturbance>,
    pub stalls: Vec<(Duration, Duration)>,
    /// Faults that did not end as expected.
    pub problems: Vec<String>,
    /// When the last fault was undone.
    pub last_fault: Duration,
    pub end: Duration,
}

/// The violations of each kind. Empty lists mean that all checks passed.
pub struct Verdict {
    pub divergences: Vec<String>,
    pub unregistered: Vec<String>,
    problems: Vec<String>,
    failed: Vec<Failure>,
    allowed: usize,
    /// Snapshots that could not be checked.
    unjudged: usize,
    coverage: Coverage,
}

impl Verdict {
    /// Applies all checks. `length` is the length of the run.
    pub fn of(record: &Record, length: Duration) -> Self {
        let Record {
            notes,
            lives,
            epochs,
            disturbances,
            stalls,
            end,
            ..
        } = record;
        let (mut divergences, mut unjudged) = (Vec::new(), 0);
        let mut directories = Findings::default();
        for (client, notes) in notes.iter().enumerate() {
            let shown = &notes.shown;
            let verdict = check::directory(client, shown, epochs);
            divergences.extend(verdict.divergences);
            unjudged += verdict.unjudged;
            let diverged =
                quiescence::diverged_directories(client, shown, epochs, disturbances, *end);
            directories.extend(diverged);
        }
        let registrations = quiescence::unregistered_servers(lives, epochs, disturbances, *end);
        let leavings = shutdowns::leftover_keys(lives, epochs, disturbances, stalls);
        let coverage = Coverage {
            directories: directories.until(record.last_fault),
            registrations: registrations.until(record.last_fault),
            leavings: leavings.windows.len(),
        };
        divergences.extend(directories.violations);
        let mut unregistered = registrations.violations;
        unregistered.extend(leavings.violations);
        let mut problems = record.problems.clone();
        problems.extend(check::insufficient_coverage(length, coverage));
        let failures = notes.iter().flat_map(|notes| notes.failures.clone());
        let (allowed, failed): (Vec<_>, Vec<_>) =
            failures.partition(|failure| check::is_allowed(failure, lives, stalls));
        Self {
            divergences,
            unregistered,
            problems,
            failed,
            allowed: allowed.len(),
            unjudged,
            coverage,
        }
    }

    pub fn is_passed(&self) -> bool {
        self.failed.is_empty()
            && self.divergences.is_empty()
            && self.unregistered.is_empty()
            && self.problems.is_empty()
    }

    /// Prints the violations, and how much was checked.
    pub fn print(&self, record: &Record) {
        let failed: Vec<&Failure> = self.failed.iter().collect();
        let failed = summarize_failures(&failed, &record.lives);
        report("failed calls", failed.into_iter());
        report("divergences", self.divergences.iter().cloned());
        report("lost registrations", self.unregistered.iter().cloned());
        report("problems", self.problems.iter().cloned());
        let snapshots: usize = record.notes.iter().map(|notes| notes.shown.len()).sum();
        let changes: usize = record.epochs.iter().map(|epoch| epoch.changes.len()).sum();
        let slowest = record.notes.iter().map(|notes| notes.slowest).max();
        let stalled = record.stalls.iter().map(|(from, to)| *to - *from);
        println!(
            "chaos: {snapshots} snapshots ({} could not be checked) of {} histories with {changes} \
             changes, slowest call {:.3} s, machine stalled {} times for {:.3} s",
            self.unjudged,
            record.epochs.len(),
            slowest.unwrap_or_default().as_secs_f64(),
            record.stalls.len(),
            stalled.sum::<Duration>().as_secs_f64()
        );
        println!(
            "chaos: checked between the faults: {} windows of directories, {} of registrations, \
             {} undisturbed shutdowns",
            self.coverage.directories, self.coverage.registrations, self.coverage.leavings
        );
    }

    /// The counts for the last line of output.
    pub fn summary(&self, record: &Record) -> String {
        let calls: u64 = record.notes.iter().map(|notes| notes.calls).sum();
        format!(
            "calls={calls} failed_allowed={} failed={} divergences={} lost_registrations={}",
            self.allowed,
            self.failed.len(),
            self.divergences.len(),
            self.unregistered.len()
        )
    }
}
