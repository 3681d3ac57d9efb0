//! Shows one line per act. On a terminal the line is updated while the act is played.

use std::io::{IsTerminal, Write, stdout};
use std::time::Duration;

use tokio::time::{Instant, interval};

use crate::load::{Load, Tally};

/// The interval at which the line of the current act is redrawn.
const FRAME: Duration = Duration::from_millis(500);

/// Prints the header of the columns.
pub fn print_header(servers: &[&str]) {
    let servers: String = servers.iter().map(|id| format!("{id:>5}")).collect();
    println!("{:<22}{servers} failed", "responses per second:");
}

/// Plays an act and shows it. `play` returns a note for the act's line, or the reason of its
/// failure. Returns whether the act succeeded.
pub async fn play_act(
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
            .map(|id| match now.responses_of(id) - since.1.responses_of(id) {
                0 => format!("{:>5}", "-"),
                calls => format!("{:>5.0}", calls as f64 / seconds),
            })
            .collect();
        let failed = now.failed - begin.failed;
        format!("{title:<22}{servers}{failed:>7}   {verdict}")
    };

    // Rates are those of the last one or two frames, not of the whole act.
    let mut frames = interval(FRAME);
    frames.tick().await;
    let mut last = (Instant::now(), begin.clone());
    let mut before = last.clone();
    tokio::pin!(play);
    let outcome = loop {
        tokio::select! {
            outcome = &mut play => break outcome,
            _ = frames.tick() => {
                draw(&line(&before, "..."));
                before = std::mem::replace(&mut last, (Instant::now(), load.tally()));
            }
        }
    };
    let verdict = match &outcome {
        Ok(note) => format!("ok  {note}"),
        Err(reason) => format!("failed  {reason}"),
    };
    draw("");
    println!("{}", line(&before, &verdict).trim_end());
    outcome.is_ok()
}

/// Draws a line over the previous one. Does nothing unless the output is a terminal.
pub fn draw(line: &str) {
    let mut out = stdout();
    if out.is_terminal() {
        // `?7l` cuts the line off at the edge; a wrapped line would stay, because `\r` returns to
        // the start of one row only.
        let _ = write!(out, "\r\x1b[?7l{line}\x1b[K\x1b[?7h");
        if line.is_empty() {
            let _ = write!(out, "\r");
        }
        let _ = out.flush();
    }
}
