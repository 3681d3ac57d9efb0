//! A run: starts everything, runs the schedule, and waits until its effects are over.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use futures::future::try_join_all;
use goo_etcd::testing::Etcd;
use tokio::time::{sleep, sleep_until};

use crate::Result;
use crate::check::quiescence::CONVERGENCE_TIME;
use crate::check::{self, shutdowns};
use crate::clients::{ClientTask, Notes};
use crate::fleet::{Fleet, Paths};
use crate::observer::Observer;
use crate::play::Testbed;
use crate::record::{Change, Clock};
use crate::schedule::{CLIENT_PATHS, CLIENTS, MEMBERS, Path, Schedule};
use crate::stall::Stalls;
use crate::verdict::{Record, Verdict};

/// TTL of registrations: short, so that many leases expire, and above etcd's minimum of 2 s.
const TTL: Duration = Duration::from_secs(3);

/// Extra time for a machine that stalls now and then.
const PATIENCE: Duration = Duration::from_secs(30);

/// Limit for the fleet to be complete at the start.
const WARM_UP: Duration = Duration::from_secs(60);

/// The interval between two checks of a condition.
const POLL: Duration = Duration::from_millis(50);

/// Runs the schedule and the checks. Returns whether all of them passed.
pub async fn run(
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
    let (testbed, clients) = start(clock, logs).await?;
    let warm_up = settle(&testbed, &clients, &stalls, clock.now() + WARM_UP).await?;
    if let Some(why) = warm_up.unregistered.iter().chain(&warm_up.diverged).next() {
        return Err(format!("the fleet was not complete within {WARM_UP:?}: {why}").into());
    }

    testbed.say("all servers are registered and shown; faults begin");
    let begun = clock.now();
    testbed.play(schedule).await;
    let last_fault = clock.now();
    testbed.say("the last fault is over");
    let mut unsettled = settle(&testbed, &clients, &stalls, last_fault + CONVERGENCE_TIME).await?;
    testbed.say("waiting for leases of ended servers to expire");
    sleep_until(clock.instant(begun + length)).await;
    let overdue_keys = outlive_leases(&testbed, &stalls).await;
    unsettled.extend(settle(&testbed, &clients, &stalls, clock.now() + CONVERGENCE_TIME).await?);

    let record = record(&testbed, clients, &stalls, last_fault).await;
    let mut verdict = Verdict::of(&record, length);
    verdict.divergences.extend(unsettled.diverged);
    verdict.unregistered.extend(unsettled.unregistered);
    verdict.unregistered.extend(overdue_keys);
    verdict.print(&record);
    println!(
        "chaos: seed={seed} seconds={} faults={} {}",
        length.as_secs(),
        testbed.played_count(),
        verdict.summary(&record)
    );
    Ok(verdict.is_passed())
}

/// Starts the cluster, the first servers and the clients.
async fn start(clock: Clock, logs: Option<PathBuf>) -> Result<(Testbed, Vec<ClientTask>)> {
    let cluster = Etcd::builder().start_cluster(MEMBERS).await?;
    let observer = Observer::start(&cluster, clock);
    let paths = Paths::start(&cluster).await?;
    let fleet = Fleet::new(clock, TTL, logs);
    let testbed = Testbed::new(clock, cluster, paths, fleet, observer);
    let first = Schedule::first_servers();
    try_join_all(first.iter().map(|name| testbed.start(*name))).await?;
    let mut clients = Vec::new();
    for index in 0..CLIENTS {
        let path = (index < CLIENT_PATHS).then_some(Path::Client(index));
        let endpoints = testbed.paths.endpoints(path, &testbed.cluster);
        clients.push(ClientTask::start(index, endpoints, clock).await?);
    }
    Ok((testbed, clients))
}

/// Ends the clients and gathers everything that was recorded.
async fn record(
    testbed: &Testbed,
    clients: Vec<ClientTask>,
    stalls: &Stalls,
    last_fault: Duration,
) -> Record {
    let mut problems = testbed.problems();
    problems.extend(testbed.fleet.exited_unasked());
    problems.extend(testbed.observer.gaps());
    let lives = testbed.fleet.lives();
    let end = testbed.clock.now();
    let mut notes: Vec<Notes> = Vec::new();
    for client in clients {
        notes.push(client.finish().await);
    }
    let mut disturbances = testbed.disturbances();
    disturbances.extend(stalls.disturbances());
    Record {
        notes,
        lives,
        epochs: testbed.observer.epochs(),
        disturbances,
        stalls: stalls.all(),
        problems,
        last_fault,
        end,
    }
}

/// Servers and directories that have not settled in time.
#[derive(Debug, Default)]
struct Unsettled {
    unregistered: BTreeSet<String>,
    diverged: BTreeSet<String>,
}

impl Unsettled {
    /// A server or directory that is reported twice counts once.
    fn extend(&mut self, other: Unsettled) {
        self.unregistered.extend(other.unregistered);
        self.diverged.extend(other.diverged);
    }
}

/// Waits until each running server is registered and each directory has shown the content of etcd
/// once. At the deadline, returns the servers and the directories for which that is not so.
async fn settle(
    testbed: &Testbed,
    clients: &[ClientTask],
    stalls: &Stalls,
    deadline: Duration,
) -> Result<Unsettled> {
    let mut waiting: Vec<usize> = (0..clients.len()).collect();
    let mut registered = false;
    let latest = deadline + PATIENCE;
    loop {
        // The machine's stalls do not count as time.
        let stalled = stalls
            .long()
            .last()
            .map_or(deadline, |(_, to)| to + CONVERGENCE_TIME);
        let deadline = deadline.max(stalled).min(latest);
        let truth = match testbed.observer.changes_until_now().await {
            Ok(truth) => truth,
            // An election may be going on.
            Err(_) if testbed.clock.now() <= deadline => {
                sleep(POLL).await;
                continue;
            }
            Err(error) => return Err(format!("cannot read from etcd: {error}").into()),
        };
        let mut unsettled = Unsettled::default();
        let unregistered = check::unregistered_servers(&testbed.fleet.lives(), &truth);
        registered |= unregistered.is_empty();
        if !registered {
            unsettled.unregistered.extend(unregistered);
        }
        waiting.retain(|index| {
            let found = describe_differences(&clients[*index], &truth);
            let has_converged = found.is_none();
            unsettled
                .diverged
                .extend(found.map(|found| format!("client {index} {found}")));
            !has_converged
        });
        if registered && waiting.is_empty() {
            return Ok(Unsettled::default());
        }
        if testbed.clock.now() > deadline {
            return Ok(unsettled);
        }
        sleep(POLL).await;
    }
}

/// How a client's directory differs from etcd, if it does.
fn describe_differences(client: &ClientTask, truth: &[Change]) -> Option<String> {
    let snapshot = client.directory.snapshot();
    let mut found = check::differences_now(truth, &client.instances());
    if !snapshot.freshness().is_live() {
        found.push("the directory is stale".to_owned());
    }
    (!found.is_empty()).then(|| {
        let revision = snapshot.revision();
        format!(
            "has not converged (revision {revision}): {}",
            found.join(", ")
        )
    })
}

/// Waits until the keys of all ended servers are gone from etcd or overdue. Returns the overdue
/// ones.
async fn outlive_leases(testbed: &Testbed, stalls: &Stalls) -> Vec<String> {
    let lives = testbed.fleet.lives();
    loop {
        let epochs = testbed.observer.epochs();
        let present = epochs.last().map_or(&[][..], |epoch| &epoch.changes);
        let now = testbed.clock.now();
        let mut extensions = testbed.observer.extensions();
        extensions.extend(stalls.extensions());
        let limits = lives.iter().filter_map(|life| {
            let end = life.end?;
            Some(shutdowns::key_deadline(life, end, TTL, &extensions))
        });
        let limit = limits.max().unwrap_or_default();
        if now > limit || !shutdowns::any_dead_registered(&lives, present) {
            return shutdowns::overdue_keys(&lives, &epochs, &extensions, TTL, now);
        }
        sleep(POLL).await;
    }
}
