//! Large services, and services that change all the time. These tests run one after another; memory
//! is measured in a process that has only a directory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::balanced::{Load, wait_until_ready};
use crate::support::echo::EchoServer;
use crate::support::process::ChildProcess;
use crate::support::{TestResult, alone, call_count, connect, key, wait_for, wait_until};
use futures::{StreamExt, TryFutureExt, TryStreamExt};
use goo_etcd::format::Kratos;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{BalancedChannel, Client, Directory, Snapshot, TxnOp};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::sleep;

const INSTANCES: usize = 10_000;

/// A value of realistic length.
fn value(address: &str, weight: u32) -> String {
    format!(
        r#"{{"Op":0,"Addr":"{address}","Metadata":{{"weight":{weight},"zone":"eu-central-1a","version":"1.2.3","commit":"0123456789abcdef"}}}}"#
    )
}

/// An address on loopback that refuses connections.
fn address(n: usize) -> String {
    format!("127.{}.{}.{}:1", 100 + (n >> 16), (n >> 8) & 255, n & 255)
}

async fn fill(client: &Client, count: usize, weight: u32) -> TestResult {
    let ids: Vec<usize> = (0..count).collect();
    // etcd allows 128 operations in a transaction by default.
    for some in ids.chunks(100) {
        let puts = some.iter().map(|n| {
            let address = address(*n);
            TxnOp::put(key(&address), value(&address, weight), None)
        });
        client.txn().and_then(puts).commit().await?;
    }
    Ok(())
}

/// Plausible memory per instance, in bytes. Below the lower bound (key, value and fields alone) the
/// measurement is broken. The upper bound is twice the target of 2 KiB.
const PLAUSIBLE: std::ops::Range<i64> = 200..4096;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_per_instance_is_small_and_constant() -> TestResult {
    let _alone = alone().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES, 100).await?;
    let mut watching = WatchingProcess::start(&etcd, ONE_FORMAT).await;
    let each = |memory: i64| memory / INSTANCES as i64;
    let before = watching.memory();
    // This includes the buffers of the first list.
    assert_eq!(watching.open_directory().await.instances, INSTANCES);
    let listed = each(watching.memory() - before);
    for n in 0..50 {
        let address = address(n * 199);
        writer
            .put(key(&address), value(&address, 200), None)
            .await?;
        sleep(Duration::from_millis(30)).await;
    }
    watching
        .wait_for_weights(100 * (INSTANCES as u64 + 50))
        .await;
    let changed = each(watching.memory() - before);
    // Replaces all instances while the consumer holds the old snapshot: the peak of memory, which
    // the allocator does not return to the system.
    let mut rounds = Vec::new();
    for weight in 200..206 {
        fill(&writer, INSTANCES, weight).await?;
        watching
            .wait_for_weights(u64::from(weight) * INSTANCES as u64)
            .await;
        rounds.push(each(watching.memory() - before));
    }
    println!("{listed} bytes an instance, {changed} after 50 changes, {rounds:?} of all");
    assert!(PLAUSIBLE.contains(&listed), "{listed} bytes an instance");
    assert!(PLAUSIBLE.contains(&changed), "{changed} after 50 changes");
    let (used, last) = (rounds[2], rounds[rounds.len() - 1]);
    // Three more snapshots kept in memory would double it.
    assert!(last < used * 3 / 2, "{rounds:?} bytes an instance");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_takes_far_less_time_than_the_list() -> TestResult {
    let _alone = alone().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES, 100).await?;
    let open = async |client: Client| Directory::watch(&client, "greeter").await;
    let (directory, before) = timed_watch(&etcd, open).await?;
    // Usually a tenth of a second.
    assert!(before < Duration::from_secs(10), "the list took {before:?}");

    let lists = call_count(&etcd, "Range").await?;
    let changes = measure_changes(&writer, &directory, |n| key(&address(n))).await?;
    assert_eq!(call_count(&etcd, "Range").await?, lists, "it listed again");
    let (_, after) = timed_watch(&etcd, open).await?;
    assert_changes_are_incremental(&changes, [before, after]);
    Ok(())
}

/// Opens a directory with a client of its own, and measures the time of the list.
async fn timed_watch(
    etcd: &Etcd,
    open: impl AsyncFn(Client) -> Result<Directory, goo_etcd::Error>,
) -> TestResult<(Directory, Duration)> {
    let client = connect(etcd.endpoint()).await;
    client.ping().await?;
    let started = Instant::now();
    let directory = open(client).await?;
    let list = started.elapsed();
    assert_eq!(directory.snapshot().len(), INSTANCES);
    Ok((directory, list))
}

/// Asserts that a change of one instance takes far less time than a list of all. The lists before
/// and after the changes are both measured, because the load of the machine may change meanwhile.
fn assert_changes_are_incremental(changes: &[Duration], lists: [Duration; 2]) {
    println!("lists {lists:?}, changes {changes:?}");
    let (median, slower) = (changes[24], lists[0].max(lists[1]));
    assert!(median * 3 < slower, "a change {median:?}, lists {lists:?}");
}

/// The fifty instances that [`measure_changes`] changes.
fn changed_instances() -> impl Iterator<Item = usize> {
    (0..50).map(|n| n * 199)
}

/// How long each of fifty changes takes to show in the directory, sorted. `shown_as` is the key of
/// an instance in the snapshot.
async fn measure_changes(
    writer: &Client,
    directory: &Directory,
    shown_as: impl Fn(usize) -> String,
) -> TestResult<Vec<Duration>> {
    let mut times = Vec::new();
    for n in changed_instances() {
        let (address, shown_as) = (address(n), shown_as(n));
        let weight = 200 + u32::try_from(n)?;
        let started = Instant::now();
        writer
            .put(key(&address), value(&address, weight), None)
            .await?;
        wait_for("the change is shown", async {
            while weight_of(&directory.snapshot(), &shown_as) != Some(weight) {
                sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        times.push(started.elapsed());
        sleep(Duration::from_millis(30)).await;
    }
    times.sort();
    Ok(times)
}

fn weight_of(snapshot: &Snapshot, key: &str) -> Option<u32> {
    let found = snapshot.iter().find(|(of, _)| of.as_str() == key);
    found.map(|(_, instance)| instance.weight)
}

/// Three servers among thousands of addresses that refuse connections.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relist_keeps_connections() -> TestResult {
    let _alone = alone().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    let servers: Vec<EchoServer> = (0..3).map(|_| EchoServer::start()).collect();
    fill(&writer, INSTANCES - servers.len(), 100).await?;
    for server in &servers {
        let address = server.address();
        writer.put(key(address), value(address, 100), None).await?;
    }
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    let mut differences = directory.discover();
    for _ in 0..INSTANCES {
        next(&mut differences).await;
    }
    let channel = BalancedChannel::connect(&client, "greeter").await?;
    wait_until_ready(&channel, 3).await;
    assert_eq!(channel.endpoints().len(), INSTANCES);
    let load = Load::start(&channel, 4);
    load.wait_for_calls(30).await;
    let revision = directory.snapshot().revision();

    proxy.cut().await;
    let gone = key(&address(77));
    writer.delete(gone.as_str(), None).await?;
    etcd.compact().await?;
    load.wait_for_calls(30).await;
    proxy.restore().await?;
    wait_until("the directory has listed again", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && snapshot.revision() > revision
    })
    .await;
    // The deleted instance is the only change.
    let change = next(&mut differences).await;
    assert!(change.contains(&address(77)), "{change}");
    let more = tokio::time::timeout(Duration::from_millis(300), next(&mut differences)).await;
    assert!(more.is_err(), "{more:?}");
    wait_until("the deleted instance is no endpoint", async || {
        channel.endpoints().len() == INSTANCES - 1
    })
    .await;
    for server in &servers {
        load.wait_until_called(server.address()).await;
    }
    load.wait_for_calls(30).await;
    load.finish().await.assert_no_failure();
    for server in &servers {
        let counts = server.counts();
        assert_eq!((counts.accepted(), counts.connections()), (1, 1));
    }
    Ok(())
}

async fn next(discovery: &mut goo_etcd::Discovery) -> String {
    let change = wait_for("a change", discovery.next()).await;
    format!("{:?}", change)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn constant_changes_are_followed_in_constant_memory() -> TestResult {
    const CHANGES: u64 = 20_000;
    let _alone = alone().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, 1_000, 100).await?;
    let mut watching = WatchingProcess::start(&etcd, ONE_FORMAT).await;
    watching.open_directory().await;

    let written = AtomicU64::new(0);
    let started = Instant::now();
    let writing = write_changes(&writer, CHANGES, &written);
    let mut samples = Vec::new();
    let sampling = async {
        loop {
            sleep(Duration::from_secs(3)).await;
            samples.push(watching.memory());
            let report = watching.report().await;
            let so_far = written.load(Ordering::Relaxed) as i64;
            let behind = [report.shown, report.consumed].map(|revision| so_far - revision);
            assert!(
                behind.iter().all(|behind| *behind < FAR_BEHIND as i64),
                "{behind:?} of {so_far}"
            );
        }
    };
    tokio::select! {
        written = writing => written?,
        () = sampling => {}
    }
    let took = started.elapsed();
    samples.push(watching.memory());
    assert_eq!(written.load(Ordering::Relaxed), CHANGES);
    let truth = {
        let fresh = Directory::watch(&writer, "greeter").await?;
        weights(&fresh.snapshot())
    };
    watching.wait_for_weights(truth).await;
    let answer = writer
        .get(key(""), goo_etcd::GetOptions::new().with_prefix())
        .await?;
    let last = answer.kvs().iter().map(|kv| kv.mod_revision()).max();
    let seen = watching.report().await;
    assert_eq!((Some(seen.shown), Some(seen.consumed)), (last, last));
    println!("{CHANGES} changes in {took:?}, memory {samples:?} bytes");
    // Compared with the first sample, when all memory has been used once. The changes in between
    // would take several times as much if each were kept.
    let (early, late) = (samples[0], samples[samples.len() - 1]);
    assert!(late - early < 4 << 20, "from {early} to {late} bytes");
    Ok(())
}

/// A directory that lags this many changes behind a thousand per second does not keep up. On a busy
/// machine it may be a second or two late.
const FAR_BEHIND: u64 = 5_000;

/// Makes `changes` changes of the first thousand instances, at most a thousand per second. Each
/// adds one to the weight of an instance, which is 100 at first.
async fn write_changes(
    writer: &Client,
    changes: u64,
    written: &AtomicU64,
) -> Result<(), goo_etcd::Error> {
    /// Requests to etcd at a time.
    const IN_FLIGHT: usize = 64;
    let started = tokio::time::Instant::now();
    let changes = futures::stream::iter(0..changes as usize).then(|n| async move {
        tokio::time::sleep_until(started + Duration::from_millis(n as u64)).await;
        n
    });
    let writing = changes.map(Ok).try_for_each_concurrent(IN_FLIGHT, |n| {
        let address = address(n % 1_000);
        let weight = 101 + u32::try_from(n / 1_000).unwrap_or_default();
        let put = writer.put(key(&address), value(&address, weight), None);
        put.map_ok(|_| {
            written.fetch_add(1, Ordering::Relaxed);
        })
    });
    writing.await
}

/// With two formats instances are merged by address, so a change may concern any of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_formats_keep_up_with_changes() -> TestResult {
    const CHANGES: u64 = 10_000;
    let _alone = alone().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES, 100).await?;
    let open = async |client: Client| {
        let directory = Directory::builder(&client, "greeter").and_format(Kratos);
        directory.watch().await
    };
    let (directory, before) = timed_watch(&etcd, open).await?;
    let changes = measure_changes(&writer, &directory, address).await?;
    let (_, after) = timed_watch(&etcd, open).await?;
    assert_changes_are_incremental(&changes, [before, after]);
    drop(directory);

    fill(&writer, INSTANCES, 100).await?;
    let mut watching = WatchingProcess::start(&etcd, TWO_FORMATS).await;
    assert_eq!(watching.open_directory().await.instances, INSTANCES);
    let before = watching.processor_time();
    let written = AtomicU64::new(0);
    let sampling = async {
        loop {
            sleep(Duration::from_secs(1)).await;
            let so_far = written.load(Ordering::Relaxed);
            let behind = so_far.saturating_sub(watching.report().await.changes());
            assert!(behind < FAR_BEHIND, "{behind} of {so_far}");
        }
    };
    tokio::select! {
        written = write_changes(&writer, CHANGES, &written) => written?,
        () = sampling => {}
    }
    assert_eq!(written.load(Ordering::Relaxed), CHANGES);
    wait_until("the consumer has all changes", async || {
        watching.report().await.changes() == CHANGES
    })
    .await;
    let used = watching.processor_time() - before;
    println!("{CHANGES} changes took {used:?} of a processor");
    Ok(())
}

/// The program of a [`WatchingProcess`], and its settings: the endpoint of etcd, and the number of
/// formats in which the directory reads the service.
pub const PROGRAM: &str = "directory_watcher";
const ETCD: &str = "WATCHED_AT";
const FORMATS: &str = "WATCHED_FORMATS";
const ONE_FORMAT: &str = "1";
const TWO_FORMATS: &str = "2";
const REPORT: &str = "the directory shows ";

/// A directory and a slow consumer of its snapshots, in a child process. Dropping it kills the
/// process.
struct WatchingProcess(ChildProcess);

/// The state of the directory and the consumer in the child process.
#[derive(Debug)]
struct WatcherReport {
    instances: usize,
    /// The newest revision of the directory.
    shown: i64,
    /// The newest revision that the consumer has received.
    consumed: i64,
    /// The sum of the weights of all instances in the consumer's snapshot.
    weights: u64,
}

impl WatcherReport {
    /// The number of changes made by [`change`] that the consumer has received.
    fn changes(&self) -> u64 {
        self.weights - 100 * self.instances as u64
    }
}

impl WatchingProcess {
    /// Starts a process that is connected to etcd and has no directory yet.
    async fn start(etcd: &Etcd, formats: &str) -> Self {
        let variables = [(ETCD, etcd.endpoint()), (FORMATS, formats.to_owned())];
        let variables = variables
            .each_ref()
            .map(|(name, value)| (*name, value.as_str()));
        let mut process = ChildProcess::start(PROGRAM, &variables);
        process.read_after(REPORT).await;
        Self(process)
    }

    /// Opens the directory, and returns its first report.
    async fn open_directory(&mut self) -> WatcherReport {
        self.report().await
    }

    async fn report(&mut self) -> WatcherReport {
        self.0.write_line("?").await;
        let report = self.0.read_after(REPORT).await;
        let words: Vec<&str> = report.split(' ').collect();
        WatcherReport {
            instances: words[0].parse().unwrap(),
            shown: words[1].parse().unwrap(),
            consumed: words[2].parse().unwrap(),
            weights: words[3].parse().unwrap(),
        }
    }

    /// Waits until the weights of the consumer's instances add up to `weights`.
    async fn wait_for_weights(&mut self, weights: u64) {
        wait_until("the consumer has the weights", async || {
            self.report().await.weights == weights
        })
        .await;
    }

    /// The processor time that the process has used.
    fn processor_time(&self) -> Duration {
        let stat = format!("/proc/{}/stat", self.0.id());
        let stat = std::fs::read_to_string(stat).unwrap();
        // The fields after the program's name, which may contain spaces: the twelfth and thirteenth
        // are user and system time in hundredths of a second.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields = fields.split_whitespace().skip(11).take(2);
        let used: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(used * 10)
    }

    /// The resident memory of the process, in bytes.
    fn memory(&self) -> i64 {
        let statm = format!("/proc/{}/statm", self.0.id());
        let statm = std::fs::read_to_string(statm).unwrap();
        let resident = statm.split(' ').nth(1).unwrap();
        resident.parse::<i64>().unwrap() * 4096
    }
}

fn weights(snapshot: &Snapshot) -> u64 {
    snapshot.instances().map(|i| u64::from(i.weight)).sum()
}

/// The program of a [`WatchingProcess`], which ends with its input.
pub fn run_watcher() {
    let [etcd, formats] = [ETCD, FORMATS].map(|name| std::env::var(name).unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = connect(etcd).await;
        let mut asked = BufReader::new(tokio::io::stdin()).lines();
        println!("{REPORT}nothing");
        if asked.next_line().await.unwrap().is_none() {
            return;
        }
        let directory = Directory::builder(&client, "greeter");
        let directory = match formats.as_str() {
            TWO_FORMATS => directory.and_format(Kratos),
            _ => directory,
        };
        let directory = directory.watch().await.unwrap();
        let consumed = Arc::new(Mutex::new((0, 0)));
        let consumer = {
            let (mut changes, consumed) = (directory.changes(), Arc::clone(&consumed));
            async move {
                while let Some(snapshot) = changes.next().await {
                    *consumed.lock().unwrap() = (snapshot.revision(), weights(&snapshot));
                    sleep(Duration::from_millis(50)).await;
                }
            }
        };
        let _consumer = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(consumer));
        loop {
            let snapshot = directory.snapshot();
            let (instances, shown) = (snapshot.len(), snapshot.revision());
            drop(snapshot);
            let (revision, weights) = *consumed.lock().unwrap();
            println!("{REPORT}{instances} {shown} {revision} {weights}");
            if asked.next_line().await.unwrap().is_none() {
                return;
            }
        }
    });
}
