//! Chaos: a cluster of etcd, a fleet of servers, clients under load, and three minutes of faults.
//!
//! ```text
//! make chaos                       # a random seed, which is printed
//! make chaos SEED=42 SECONDS=60    # the same faults again
//! ```
//!
//! Three members of etcd, twenty servers as processes of their own, a third of them registered twice, five
//! clients. A seeded schedule of faults is played on them: members are killed, paused, restarted and
//! wiped, one or all; the paths of clients and servers are cut or go silent; history is compacted; leases
//! are revoked, keys deleted and overwritten by hand; servers are killed, asked to leave, and join in
//! bursts. Everything that the directories showed and what became of each call is recorded, and then
//! judged (see `check/`):
//!
//! - what a directory showed is a state that etcd had, in order;
//! - 5 s after the last fault, and wherever nothing is done to them for so long in between, every
//!   directory shows what is in etcd, again after each change of that, and every server that lives is
//!   in there; those that were asked to leave are out of it before their process ends, and those that
//!   were killed are gone with their lease;
//! - no call failed but those in flight on a server that was killed.
//!
//! The last line sums up, and the exit status is 0 if all that was so. The seed fixes the faults and
//! their times, not how the machine's scheduler interleaves what they hit: a failing seed fails again
//! often, not always.

mod check;
mod clients;
mod fleet;
mod observer;
mod play;
mod record;
mod report;
mod schedule;
mod server;
mod stall;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use futures::future::try_join_all;
use goo_etcd::testing::Etcd;
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, sleep_until, timeout};
use tracing_subscriber::EnvFilter;

use check::calm::{self, CALM};
use check::{Judged, Looks, ends};
use clients::Caller;
use fleet::{Fleet, Paths};
use observer::Observer;
use play::Stage;
use record::Clock;
use report::{report, told};
use schedule::{CLIENT_PATHS, CLIENTS, MEMBERS, Path, SHORTEST, Schedule};
use stall::Stalls;

/// The time to live of registrations: short, so that much expires, and longer than the least that etcd
/// grants (2 s).
const TTL: Duration = Duration::from_secs(3);

/// How much longer at most, on a machine that stands still now and then.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long the fleet may take to be there at the beginning.
const WARM_UP: Duration = Duration::from_secs(60);

/// What starting, undoing the last faults and judging may take beyond the time of the run.
const OVERTIME: Duration = Duration::from_secs(240);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(50);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[derive(Parser, Debug)]
#[command(
    about = "Faults of every kind on an etcd cluster, servers and clients, and whether promises hold"
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Fixes the schedule of faults; random unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// How long, in seconds; 15 at least. Starting and judging come on top.
    #[arg(long, default_value_t = 180)]
    seconds: u64,
    /// A folder for the logs of the servers, which are thrown away otherwise. RUST_LOG says how much.
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Only prints the schedule.
    #[arg(long)]
    plan: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// One of the servers; this program starts it itself.
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
        return Err(format!("it takes {SHORTEST:?} at least").into());
    }
    println!("chaos: seed {seed}");
    let schedule = Schedule::new(seed, length);
    if cli.plan {
        println!("{schedule:#?}");
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = runtime::Builder::new_multi_thread().enable_all().build()?;
    // Whichever comes first: dropping the run ends its processes.
    runtime.block_on(async {
        tokio::select! {
            outcome = timeout(length + OVERTIME, run(seed, length, &schedule, cli.logs)) => {
                let outcome = outcome.map_err(|_| format!("no end {OVERTIME:?} after its time"))?;
                Ok(match outcome? {
                    true => ExitCode::SUCCESS,
                    false => ExitCode::FAILURE,
                })
            }
            _ = stop_signal() => {
                println!("chaos: interrupted");
                // As shells report a program that Ctrl-C ended.
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

/// Plays the schedule and judges; true if all promises were kept.
async fn run(
    seed: u64,
    length: Duration,
    schedule: &Schedule,
    logs: Option<PathBuf>,
) -> Result<bool> {
    let clock = Clock::start();
    if let Some(folder) = &logs {
        std::fs::create_dir_all(folder)?;
    }
    let stalls = Stalls::watch(clock);
    let cluster = Etcd::builder().start_cluster(MEMBERS).await?;
    let observer = Observer::start(&cluster, clock);
    let paths = Paths::start(&cluster).await?;
    let fleet = Fleet::new(clock, TTL, logs);
    let stage = Stage::new(clock, cluster, paths, fleet, observer);
    let first = Schedule::first_servers();
    try_join_all(first.iter().map(|name| stage.start(*name))).await?;
    let mut callers = Vec::new();
    for index in 0..CLIENTS {
        let path = (index < CLIENT_PATHS).then_some(Path::Client(index));
        let endpoints = stage.paths.endpoints(path, &stage.cluster);
        callers.push(Caller::start(index, endpoints, clock).await?);
    }
    let (lost, apart) = settle(&stage, &callers, &stalls, clock.now() + WARM_UP).await?;
    if let Some(why) = lost.iter().chain(&apart).next() {
        return Err(format!("the fleet was not complete within {WARM_UP:?}: {why}").into());
    }

    stage.say("all servers are registered and all directories show them; faults begin");
    let begun = clock.now();
    stage.play(schedule).await;
    let last_fault = clock.now();
    stage.say("the last fault is over");
    let (lost, apart) = settle(&stage, &callers, &stalls, last_fault + CALM).await?;
    stage.say("waiting for what is left of leases, and whether all stays as it is");
    sleep_until(clock.instant(begun + length)).await;
    let ghosts = outlive_leases(&stage, &stalls).await;
    let (lost_later, apart_later) = settle(&stage, &callers, &stalls, clock.now() + CALM).await?;

    let mut problems = stage.problems();
    problems.extend(stage.fleet.deserters());
    problems.extend(stage.observer.gaps());
    let lives = stage.fleet.lives();
    let mut notes = Vec::new();
    let end = clock.now();
    for caller in callers {
        notes.push(caller.finish().await);
    }
    let epochs = stage.observer.epochs();
    let mut disturbances = stage.disturbances();
    disturbances.extend(stalls.disturbances());
    let (mut divergences, mut unjudged) = (Vec::new(), 0);
    let mut in_calm = Judged::default();
    for (client, notes) in notes.iter().enumerate() {
        let verdict = check::directory(client, &notes.shown, &epochs);
        divergences.extend(verdict.divergences);
        unjudged += verdict.unjudged;
        let apart = calm::apart(client, &notes.shown, &epochs, &disturbances, end);
        in_calm.extend(apart);
    }
    let directories = in_calm.until(last_fault);
    divergences.extend(in_calm.violations);
    // What was so at both looks is one violation.
    let apart: BTreeSet<String> = apart.into_iter().chain(apart_later).collect();
    divergences.extend(apart);
    let stalled = stalls.all();
    let failures = notes.iter().flat_map(|notes| &notes.failures);
    let (allowed, failed): (Vec<_>, Vec<_>) =
        failures.partition(|failure| check::is_allowed(failure, &lives, &stalled));
    let in_calm = calm::lost(&lives, &epochs, &disturbances, end);
    let left = ends::stayed(&lives, &epochs, &disturbances, &stalled);
    let looks = Looks {
        directories,
        registrations: in_calm.until(last_fault),
        leavings: left.windows.len(),
    };
    problems.extend(check::too_little(length, looks));
    let lost: BTreeSet<String> = lost.into_iter().chain(lost_later).collect();
    let mut lost: Vec<String> = lost.into_iter().chain(ghosts).collect();
    lost.extend(in_calm.violations.into_iter().chain(left.violations));

    report("failed calls", told(&failed, &lives).into_iter());
    report("divergences", divergences.iter().cloned());
    report("lost registrations", lost.iter().cloned());
    report("problems", problems.iter().cloned());
    let calls: u64 = notes.iter().map(|notes| notes.calls).sum();
    let snapshots: usize = notes.iter().map(|notes| notes.shown.len()).sum();
    let slowest = notes
        .iter()
        .map(|notes| notes.slowest)
        .max()
        .unwrap_or_default();
    println!(
        "chaos: {snapshots} snapshots ({unjudged} could not be judged) of {} histories with {} changes, \
         slowest call {:.3} s, machine stalled {} times, {:.3} s",
        epochs.len(),
        epochs
            .iter()
            .map(|epoch| epoch.changes.len())
            .sum::<usize>(),
        slowest.as_secs_f64(),
        stalled.len(),
        stalled
            .iter()
            .map(|(from, to)| *to - *from)
            .sum::<Duration>()
            .as_secs_f64()
    );
    println!(
        "chaos: judged between the faults, {} times of calm of directories and {} of registrations; {} \
         servers that left with nothing in their way",
        looks.directories, looks.registrations, looks.leavings
    );
    println!(
        "chaos: seed={seed} seconds={} faults={} calls={calls} failed_allowed={} failed={} \
         divergences={} lost_registrations={}",
        length.as_secs(),
        stage.played(),
        allowed.len(),
        failed.len(),
        divergences.len(),
        lost.len()
    );
    Ok(failed.is_empty() && divergences.is_empty() && lost.is_empty() && problems.is_empty())
}

/// Waits until every server that lives is registered and every directory shows what is in etcd,
/// each at one moment at least. At the deadline: which servers are not, and which directories do not.
async fn settle(
    stage: &Stage,
    callers: &[Caller],
    stalls: &Stalls,
    deadline: Duration,
) -> Result<(Vec<String>, Vec<String>)> {
    let mut waiting: Vec<usize> = (0..callers.len()).collect();
    let mut registered = false;
    let latest = deadline + PATIENCE;
    loop {
        // Time in which the machine stood still is no time.
        let stalled = stalls.long().last().map_or(deadline, |(_, to)| to + CALM);
        let deadline = deadline.max(stalled).min(latest);
        let truth = match stage.observer.up_to_now().await {
            Ok(truth) => truth,
            // An election, perhaps.
            Err(_) if stage.clock.now() <= deadline => {
                sleep(POLL).await;
                continue;
            }
            Err(error) => return Err(format!("etcd cannot be asked: {error}").into()),
        };
        let lost = check::lost(&stage.fleet.lives(), &truth);
        registered |= lost.is_empty();
        let mut apart = Vec::new();
        waiting.retain(|index| {
            let caller = &callers[*index];
            let mut found = check::differences_now(&truth, &caller.picture());
            if !caller.directory.snapshot().freshness().is_live() {
                found.push("it is stale".to_owned());
            }
            if found.is_empty() {
                return false;
            }
            let revision = caller.directory.snapshot().revision();
            apart.push(format!(
                "client {index} has not converged (revision {revision}): {}",
                found.join(", ")
            ));
            true
        });
        if registered && waiting.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        if stage.clock.now() > deadline {
            let lost = if registered { Vec::new() } else { lost };
            return Ok((lost, apart));
        }
        sleep(POLL).await;
    }
}

/// Waits until every server that is dead is out of etcd, or has been there for too long.
async fn outlive_leases(stage: &Stage, stalls: &Stalls) -> Vec<String> {
    let lives = stage.fleet.lives();
    loop {
        let epochs = stage.observer.epochs();
        let present = epochs.last().map_or(&[][..], |epoch| &epoch.changes);
        let now = stage.clock.now();
        let mut extensions = stage.observer.extensions();
        extensions.extend(stalls.extensions());
        let limits = lives.iter().filter_map(|life| {
            let end = life.end?;
            Some(ends::expires(life, end, TTL, &extensions))
        });
        let limit = limits.max().unwrap_or_default();
        if now > limit || !ends::any_dead(&lives, present) {
            return ends::ghosts(&lives, &epochs, &extensions, TTL, now);
        }
        sleep(POLL).await;
    }
}
