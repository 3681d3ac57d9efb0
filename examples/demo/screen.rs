//! What the demo shows: a line per act, which on a terminal lives while the act is played.

use std::io::{IsTerminal, Write, stdout};
use std::time::Duration;

use tokio::time::{Instant, interval};

use crate::load::{Load, Tally};

/// How often the line of an act that is being played is drawn anew.
const FRAME: Duration = Duration::from_millis(500);

/// Above the columns that `counts` makes.
pub fn header(servers: &[&str]) {
    let servers: String = servers.iter().map(|id| format!("{id:>5}")).collect();
    println!("{:<22}{servers} failed", "answers per second:");
}

/// Plays an act and shows it. True if it did what it should: `play` gives a note for its line,
/// or the reason why not.
pub async fn act(
    title: &str,
    servers: &[&str],
    load: &Load,
    play: impl Future<Output = Result<String, String>>,
) -> bool {
    let begin = load.tally();
    let line = |since: &(Instant, Tally), verdict: &str| {
        let (now, seconds) = (load.tally(), since.0.elapsed().as_secs_f64());
        let servers: String = servers
            .iter()
            .map(|id| match now.answered_by(id) - since.1.answered_by(id) {
                0 => format!("{:>5}", "-"),
                calls => format!("{:>5.0}", calls as f64 / seconds),
            })
            .collect();
        let failed = now.failed - begin.failed;
        format!("{title:<22}{servers}{failed:>7}   {verdict}")
    };

    // Counts are of the last one or two frames: what is, not what was when the act began.
    let mut frames = interval(FRAME);
    frames.tick().await;
    let mut last = (Instant::now(), begin.clone());
    let mut before = last.clone();
    tokio::pin!(play);
    let outcome = loop {
        tokio::select! {
            outcome = &mut play => break outcome,
            _ = frames.tick() => {
                live(&line(&before, "..."));
                before = std::mem::replace(&mut last, (Instant::now(), load.tally()));
            }
        }
    };
    let verdict = match &outcome {
        Ok(note) => format!("ok  {note}"),
        Err(reason) => format!("failed  {reason}"),
    };
    live("");
    println!("{}", line(&before, &verdict).trim_end());
    outcome.is_ok()
}

/// Draws a line over the one before it; only on a terminal.
pub fn live(line: &str) {
    let mut out = stdout();
    if out.is_terminal() {
        // Cut off at the edge (`?7l`) and not wrapped: `\r` goes back to the start of one row.
        let _ = write!(out, "\r\x1b[?7l{line}\x1b[K\x1b[?7h");
        if line.is_empty() {
            let _ = write!(out, "\r");
        }
        let _ = out.flush();
    }
}
