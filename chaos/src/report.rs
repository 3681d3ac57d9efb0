//! Prints the violations that the checks found.

use std::collections::BTreeMap;

use crate::record::{Failure, Life};

/// The most violations printed of each kind.
const SHOWN: usize = 10;

/// Groups failed calls with equal status and client into one line each.
pub fn summarize_failures(failed: &[&Failure], lives: &[Life]) -> Vec<String> {
    let mut alike: BTreeMap<(usize, &str), Vec<&Failure>> = BTreeMap::new();
    for failure in failed {
        let how = (failure.client, failure.status.as_str());
        alike.entry(how).or_default().push(failure);
    }
    let line = |((client, status), failures): ((usize, &str), Vec<&Failure>)| {
        let begun = failures.iter().map(|f| f.begun).min().unwrap_or_default();
        let ended = failures.iter().map(|f| f.ended).max().unwrap_or_default();
        let sent_to = failures.iter().find_map(|failure| failure.sent_to.as_ref());
        let server = lives.iter().find(|life| Some(&life.address) == sent_to);
        let server = match server {
            Some(Life { name, end, .. }) => format!("{name} ({end:?})"),
            None => "nobody".to_owned(),
        };
        format!(
            "{} of client {client} from {:.3} s to {:.3} s, sent to {server}: {status}",
            failures.len(),
            begun.as_secs_f64(),
            ended.as_secs_f64()
        )
    };
    alike.into_iter().map(line).collect()
}

/// Prints the number of violations of a kind, if any, and the first of them.
pub fn report(kind: &str, violations: impl ExactSizeIterator<Item = String>) {
    let count = violations.len();
    if count > 0 {
        println!("{count} {kind}:");
    }
    for violation in violations.take(SHOWN) {
        println!("  {violation}");
    }
    if count > SHOWN {
        println!("  ... and {} more", count - SHOWN);
    }
}
