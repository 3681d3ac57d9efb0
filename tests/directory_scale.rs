//! Large services and busy ones. What is measured is alone: one test after the other, and memory in a process
//! in which there is nothing but a directory.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryFutureExt, TryStreamExt};
use goo_etcd::format::Kratos;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{BalancedChannel, Client, Directory, Snapshot, TxnOp};
use support::balanced::{Load, until_ready};
use support::echo::EchoServer;
use support::{TestResult, connect, eventually, key, soon};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::sleep;

const INSTANCES: usize = 10_000;

/// Held by each test: what they measure is of the machine as well.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A value as long as they are in earnest.
fn value(address: &str, weight: u32) -> String {
    format!(
        r#"{{"Op":0,"Addr":"{address}","Metadata":{{"weight":{weight},"zone":"eu-central-1a","version":"1.2.3","commit":"0123456789abcdef"}}}}"#
    )
}

/// On loopback, and refused at once: nothing listens there.
fn address(n: usize) -> String {
    format!("127.{}.{}.{}:1", 100 + (n >> 16), (n >> 8) & 255, n & 255)
}

async fn fill(client: &Client, count: usize, weight: u32) -> TestResult {
    let ids: Vec<usize> = (0..count).collect();
    // As many operations as etcd takes in one transaction, by default 128.
    for some in ids.chunks(100) {
        let puts = some.iter().map(|n| {
            let address = address(*n);
            TxnOp::put(key(&address), value(&address, weight), None)
        });
        client.txn().and_then(puts).commit().await?;
    }
    Ok(())
}

/// What an instance may take, in bytes. With less than the lesser, which its key, its value and its fields have
/// without anything around them, it was not measured.
const PLAUSIBLE: std::ops::Range<i64> = 200..2048;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_instances_then_each_takes_less_than_2_kib() -> TestResult {
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES, 100).await?;
    let mut watching = WatchingProcess::start(&etcd, ONE_FORMAT).await;
    let each = |memory: i64| memory / INSTANCES as i64;
    let before = watching.memory();
    // With all that the first list needs for a while, such as buffers.
    assert_eq!(watching.begin().await.instances, INSTANCES);
    let listed = each(watching.memory() - before);
    for n in 0..50 {
        let address = address(n * 199);
        writer
            .put(key(&address), value(&address, 200), None)
            .await?;
        sleep(Duration::from_millis(30)).await;
    }
    watching.shows(100 * (INSTANCES as u64 + 50)).await;
    let changed = each(watching.memory() - before);
    // Everything anew, while the consumer has the old: the most that it ever takes, and that the system
    // gets back at no time.
    let mut rounds = Vec::new();
    for weight in 200..206 {
        fill(&writer, INSTANCES, weight).await?;
        watching.shows(u64::from(weight) * INSTANCES as u64).await;
        rounds.push(each(watching.memory() - before));
    }
    println!("{listed} bytes an instance, {changed} after 50 changes, {rounds:?} of all");
    assert!(PLAUSIBLE.contains(&listed), "{listed} bytes an instance");
    assert!(PLAUSIBLE.contains(&changed), "{changed} after 50 changes");
    let (used, last) = (rounds[2], rounds[rounds.len() - 1]);
    assert!(last < used + used / 10, "{rounds:?} bytes an instance");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_instances_then_they_are_there_within_1_s_and_a_change_within_50_ms()
-> TestResult {
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES, 100).await?;
    let client = connect(etcd.endpoint()).await;
    client.ping().await?;

    let begun = Instant::now();
    let directory = Directory::watch(&client, "greeter").await?;
    let first = begun.elapsed();
    assert_eq!(directory.snapshot().len(), INSTANCES);
    assert!(first < Duration::from_secs(1), "the first took {first:?}");

    let took = changes_take(&writer, &directory, |n| key(&address(n))).await?;
    println!("first {first:?}, changes {took:?}");
    // All but what two pauses of the machine hold up: with twice as much to do as it can, the 49th takes 26 ms at
    // the most, and the 50th has taken 57.
    let (median, most) = (took[24], took[47]);
    assert!(most < Duration::from_millis(50), "{took:?}");
    assert!(median < Duration::from_millis(25), "{took:?}");
    Ok(())
}

/// How long each of fifty changes takes until it is shown, in order of length. `shown_as` is the key of an
/// instance in what is shown.
async fn changes_take(
    writer: &Client,
    directory: &Directory,
    shown_as: impl Fn(usize) -> String,
) -> TestResult<Vec<Duration>> {
    let mut took = Vec::new();
    for n in (0..50).map(|n| n * 199) {
        let (address, shown_as) = (address(n), shown_as(n));
        let weight = 200 + u32::try_from(n)?;
        let begun = Instant::now();
        writer
            .put(key(&address), value(&address, weight), None)
            .await?;
        soon("the change is there", async {
            while weight_of(&directory.snapshot(), &shown_as) != Some(weight) {
                sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        took.push(begun.elapsed());
        sleep(Duration::from_millis(30)).await;
    }
    took.sort();
    Ok(took)
}

fn weight_of(snapshot: &Snapshot, key: &str) -> Option<u32> {
    let found = snapshot.iter().find(|(of, _)| of.as_str() == key);
    found.map(|(_, instance)| instance.weight)
}

/// Three that serve, among thousands that refuse to be connected to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_instances_when_they_are_listed_anew_then_connections_are_not_disturbed()
-> TestResult {
    let _alone = ALONE.lock().await;
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
    until_ready(&channel, 3).await;
    assert_eq!(channel.endpoints().len(), INSTANCES);
    let load = Load::start(&channel, 4);
    load.goes_on_for(200).await;
    let revision = directory.snapshot().revision();

    proxy.cut().await;
    let gone = key(&address(77));
    writer.delete(gone.as_str(), None).await?;
    etcd.compact().await?;
    load.goes_on_for(200).await;
    proxy.restore().await?;
    eventually("it is listed anew", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && snapshot.revision() > revision
    })
    .await;
    // The one that is gone, and nothing about the others.
    let change = next(&mut differences).await;
    assert!(change.contains(&address(77)), "{change}");
    let more = tokio::time::timeout(Duration::from_millis(300), next(&mut differences)).await;
    assert!(more.is_err(), "{more:?}");
    eventually("it is not called any more", async || {
        channel.endpoints().len() == INSTANCES - 1
    })
    .await;
    for server in &servers {
        load.reaches(server.address()).await;
    }
    load.goes_on_for(200).await;
    load.finish().await.assert_no_failure();
    for server in &servers {
        let counts = server.counts();
        assert_eq!((counts.accepted(), counts.connections()), (1, 1));
    }
    Ok(())
}

async fn next(discovery: &mut goo_etcd::Discovery) -> String {
    let change = soon("a difference", discovery.next()).await;
    format!("{:?}", change)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_1_000_changes_a_second_for_30_s_then_the_consumer_converges_and_memory_stays_flat()
-> TestResult {
    const TIME: Duration = Duration::from_secs(30);
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, 1_000, 100).await?;
    let mut watching = WatchingProcess::start(&etcd, ONE_FORMAT).await;
    watching.begin().await;

    let written = AtomicU64::new(0);
    let begun = tokio::time::Instant::now();
    let writing = change(&writer, TIME, &written);
    let mut samples = Vec::new();
    let sampling = async {
        loop {
            sleep(TIME / 6).await;
            samples.push(watching.memory());
            // Never far behind what etcd has, nor the consumer behind what it could take.
            let seen = watching.sees().await;
            let so_far = written.load(Ordering::Relaxed) as i64;
            let behind = [seen.shown, seen.consumed].map(|revision| so_far - revision);
            assert!(behind.iter().all(|b| *b < 1_000), "{behind:?} of {so_far}");
        }
    };
    tokio::select! {
        written = writing => written?,
        () = sampling => {}
    }
    let took = begun.elapsed();
    samples.push(watching.memory());
    let changes = written.load(Ordering::Relaxed);
    let truth = {
        let fresh = Directory::watch(&writer, "greeter").await?;
        weights(&fresh.snapshot())
    };
    watching.shows(truth).await;
    let answer = writer
        .get(key(""), goo_etcd::GetOptions::new().with_prefix())
        .await?;
    let last = answer.kvs().iter().map(|kv| kv.mod_revision()).max();
    let seen = watching.sees().await;
    assert_eq!((Some(seen.shown), Some(seen.consumed)), (last, last));
    println!("{changes} changes in {took:?}, memory {samples:?} bytes");
    assert!(changes >= 28_000, "{changes} changes are too few");
    // From a sixth of the time on, when everything has been used once. Fifty bytes kept of each change would be
    // more.
    let (early, late) = (samples[0], samples[samples.len() - 1]);
    assert!(late - early < 1 << 20, "from {early} to {late} bytes");
    Ok(())
}

/// A thousand changes a second of the first thousand instances, which weighed 100 before: each makes one
/// of them weigh one more.
async fn change(
    writer: &Client,
    time: Duration,
    written: &AtomicU64,
) -> Result<(), goo_etcd::Error> {
    /// Changes that are on their way to etcd at one time.
    const IN_FLIGHT: usize = 64;
    let begun = tokio::time::Instant::now();
    let changes = futures::stream::iter(0..).then(|n: usize| async move {
        tokio::time::sleep_until(begun + Duration::from_millis(n as u64)).await;
        n
    });
    let changes = changes.take_until(tokio::time::sleep_until(begun + time));
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

/// By address, where one change may be of any of the instances shown.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_instances_and_another_format_when_they_change_then_it_shows_it_and_keeps_up()
-> TestResult {
    const TIME: Duration = Duration::from_secs(10);
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES, 100).await?;
    let client = connect(etcd.endpoint()).await;
    let directory = Directory::builder(&client, "greeter").and_format(Kratos);
    let directory = directory.watch().await?;
    let took = changes_take(&writer, &directory, address).await?;
    println!("changes {took:?}");
    assert!(took[24] < Duration::from_millis(50), "{took:?}");
    drop(directory);

    fill(&writer, INSTANCES, 100).await?;
    let mut watching = WatchingProcess::start(&etcd, TWO_FORMATS).await;
    assert_eq!(watching.begin().await.instances, INSTANCES);
    let before = watching.processor_time();
    let written = AtomicU64::new(0);
    let sampling = async {
        loop {
            sleep(TIME / 10).await;
            let so_far = written.load(Ordering::Relaxed);
            let behind = so_far.saturating_sub(watching.sees().await.changes());
            assert!(behind < 1_000, "{behind} of {so_far}");
        }
    };
    tokio::select! {
        written = change(&writer, TIME, &written) => written?,
        () = sampling => {}
    }
    let changes = written.load(Ordering::Relaxed);
    eventually("it converges", async || {
        watching.sees().await.changes() == changes
    })
    .await;
    let used = watching.processor_time() - before;
    println!("{changes} changes in {TIME:?} took {used:?} of a processor");
    assert!(changes >= 9_000, "{changes} changes are too few");
    Ok(())
}

/// Where the etcd of a [`WatchingProcess`] is, and in how many formats it reads the service.
const ETCD: &str = "WATCHED_AT";
const FORMATS: &str = "WATCHED_FORMATS";
const ONE_FORMAT: &str = "1";
const TWO_FORMATS: &str = "2";
const SEES: &str = "the directory shows ";

/// A directory and a consumer of it that takes its time, in a process of their own: the running test
/// program again, of which it runs only the test [`watching_process`]. Dropping it kills it.
struct WatchingProcess {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// What it sees.
#[derive(Debug)]
struct Sees {
    instances: usize,
    /// The newest revision of the directory, and of the consumer.
    shown: i64,
    consumed: i64,
    /// Of all instances together, as the consumer has it.
    weights: u64,
}

impl Sees {
    /// How many of the changes of [`change`] the consumer has.
    fn changes(&self) -> u64 {
        self.weights - 100 * self.instances as u64
    }
}

impl WatchingProcess {
    /// It is connected, and has no directory yet.
    async fn start(etcd: &Etcd, formats: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["watching_process", "--exact", "--nocapture"])
            .env(ETCD, etcd.endpoint())
            .env(FORMATS, formats)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut this = Self { process, lines };
        this.said().await;
        this
    }

    /// Lets it watch.
    async fn begin(&mut self) -> Sees {
        self.sees().await
    }

    async fn sees(&mut self) -> Sees {
        let stdin = self.process.stdin.as_mut().unwrap();
        stdin.write_all(b"?\n").await.unwrap();
        let said = self.said().await;
        let words: Vec<&str> = said.split(' ').collect();
        Sees {
            instances: words[0].parse().unwrap(),
            shown: words[1].parse().unwrap(),
            consumed: words[2].parse().unwrap(),
            weights: words[3].parse().unwrap(),
        }
    }

    async fn said(&mut self) -> String {
        let said = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                if let Some((_, said)) = line.split_once(SEES) {
                    return said.to_owned();
                }
            }
            panic!("it has ended");
        };
        soon("it says what it sees", said).await
    }

    /// Waits until the consumer has instances of so much weight together.
    async fn shows(&mut self, weights: u64) {
        eventually("it converges", async || {
            self.sees().await.weights == weights
        })
        .await;
    }

    /// The processor time that it has used.
    fn processor_time(&self) -> Duration {
        let stat = format!("/proc/{}/stat", self.process.id().expect("it runs"));
        let stat = std::fs::read_to_string(stat).unwrap();
        // After the program's name, which may hold anything: the twelfth and the thirteenth, in hundredths
        // of a second.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let fields = fields.split_whitespace().skip(11).take(2);
        let used: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(used * 10)
    }

    /// The memory that it has in use, in bytes.
    fn memory(&self) -> i64 {
        let statm = format!("/proc/{}/statm", self.process.id().expect("it runs"));
        let statm = std::fs::read_to_string(statm).unwrap();
        let resident = statm.split(' ').nth(1).unwrap();
        resident.parse::<i64>().unwrap() * 4096
    }
}

fn weights(snapshot: &Snapshot) -> u64 {
    snapshot.instances().map(|i| u64::from(i.weight)).sum()
}

/// The program of a [`WatchingProcess`]. It ends with its input.
#[test]
fn watching_process() {
    let Ok(etcd) = std::env::var(ETCD) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let client = connect(etcd).await;
        let mut asked = BufReader::new(tokio::io::stdin()).lines();
        println!("{SEES}nothing");
        if asked.next_line().await.unwrap().is_none() {
            return;
        }
        let directory = Directory::builder(&client, "greeter");
        let directory = match std::env::var(FORMATS).as_deref() {
            Ok(TWO_FORMATS) => directory.and_format(Kratos),
            _ => directory,
        };
        let directory = directory.watch().await.unwrap();
        let consumed = Arc::new(Mutex::new((0, 0)));
        let consumer = {
            let (mut changes, consumed) = (directory.changes(), Arc::clone(&consumed));
            async move {
                while let Some(snapshot) = changes.next().await {
                    *consumed.lock().unwrap_or_else(PoisonError::into_inner) =
                        (snapshot.revision(), weights(&snapshot));
                    sleep(Duration::from_millis(50)).await;
                }
            }
        };
        let _consumer = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(consumer));
        loop {
            let snapshot = directory.snapshot();
            let (instances, shown) = (snapshot.len(), snapshot.revision());
            drop(snapshot);
            let (revision, weights) = *consumed.lock().unwrap_or_else(PoisonError::into_inner);
            println!("{SEES}{instances} {shown} {revision} {weights}");
            if asked.next_line().await.unwrap().is_none() {
                return;
            }
        }
    });
}
