//! Chaos: an etcd cluster, a fleet of servers, clients under load, and three minutes of faults.
//!
//! ```text
//! make chaos                       # a random seed, which is printed
//! make chaos SEED=42 SECONDS=60    # the same faults again
//! ```
//!
//! The program runs three etcd members, twenty servers (each a process; a third of them register
//! two instances) and five clients. A seeded schedule of faults runs against them: members are
//! killed, paused, restarted and wiped, one or all at a time; the leader hangs; a member returns as
//! a learner and is promoted; connections of clients and servers are cut or go silent; history is compacted; leases are revoked; keys are deleted and overwritten
//! by hand; servers are killed, are asked to leave, and join in bursts. The program records what
//! each directory showed and how each call ended, and then checks (see `check/`):
//!
//! - Every snapshot of a directory is a state that etcd had, in order.
//! - 5 s after the last fault, and after any other 5 s without a fault, each directory shows the
//!   content of etcd, and each running server is registered. A server that was asked to leave has
//!   removed its keys before its process ends; the keys of a killed server expire with its lease.
//! - Only calls in flight on a server that was killed have failed.
//!
//! The last line is a summary; the exit status is 0 if all checks passed. The seed fixes the faults
//! and their times, not how the scheduler interleaves them: a failing seed often fails again, but
//! not always.

mod check;
mod clients;
mod fleet;
mod observer;
mod play;
mod record;
mod report;
mod run;
mod schedule;
mod server;
mod stall;
mod verdict;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tracing_subscriber::EnvFilter;

use run::run;
use schedule::{SHORTEST, Schedule};

/// Limit for start-up, undoing the last faults and checking, beyond the length of the run.
const OVERTIME: Duration = Duration::from_secs(240);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser, Debug)]
#[command(
    about = "Runs faults of every kind on etcd, servers and clients, and checks the promises"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Seed of the schedule; random by default.
    #[arg(long)]
    seed: Option<u64>,
    /// Length of the run in seconds, at least 15; start-up and checks come on top.
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// Folder for the servers' logs, which are discarded by default. RUST_LOG sets the level.
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Print the schedule and exit.
    #[arg(long)]
    plan: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run one server. The program starts these processes itself.
    #[command(hide = true)]
    Server(server::ServerArgs),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let cli = Cli::parse();
    let outcome = match cli.command {
        Some(Command::Server(args)) => single_threaded(args),
        None => multi_threaded(cli),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("chaos: {error}");
        ExitCode::FAILURE
    })
}

fn single_threaded(args: server::ServerArgs) -> Result<ExitCode> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let served = runtime.block_on(server::run(args));
    Ok(match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("chaos server: {error}");
            ExitCode::FAILURE
        }
    })
}

fn multi_threaded(cli: Cli) -> Result<ExitCode> {
    let seed = cli.seed.unwrap_or_else(|| fastrand::u32(..).into());
    let length = Duration::from_secs(cli.seconds);
    if length < SHORTEST {
        return Err(format!("--seconds must be at least {}", SHORTEST.as_secs()).into());
    }
    println!("chaos: seed {seed}");
    let schedule = Schedule::new(seed, length);
    if cli.plan {
        println!("{schedule:#?}");
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = runtime::Builder::new_multi_thread().enable_all().build()?;
    // Dropping the run ends its processes.
    runtime.block_on(async {
        tokio::select! {
            outcome = timeout(length + OVERTIME, run(seed, length, &schedule, cli.logs)) => {
                let outcome = outcome.map_err(|_| format!("the run did not end within {OVERTIME:?} after its time"))?;
                Ok(match outcome? {
                    true => ExitCode::SUCCESS,
                    false => ExitCode::FAILURE,
                })
            }
            _ = stop_signal() => {
                println!("chaos: interrupted");
                // The status that shells report for a program ended by Ctrl-C.
                Ok(ExitCode::from(130))
            }
        }
    })
}

/// Resolves on Ctrl-C and SIGTERM.
async fn stop_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result,
    }
}
