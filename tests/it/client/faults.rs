//! The client on a cluster whose members are killed, paused, restarted and isolated under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::frames::{FrameServer, HEADERS};
use crate::support::raw::{self, RawServer};
use crate::support::{TestResult, wait_for, wait_until};
use futures::StreamExt;
use goo_etcd::testing::{Etcd, EtcdCluster};
use goo_etcd::{Client, Config, Error, GetOptions, Watch, WatchOptions};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const READERS: usize = 32;
const WRITERS: usize = 4;

/// The number of writes that are timed beside an isolated member.
const WRITES: usize = 200;

/// The time after which a silent member is disconnected: `keep_alive_interval` plus
/// `keep_alive_timeout`.
const KEEP_ALIVE: Duration = Duration::from_secs(13);

/// The part of the earlier rate of reads that must be reached again. Other programs may take most
/// of the processor; but if reads still waited for the silent member, a second each, less than a
/// fiftieth of the rate would be left.
const RECOVERED: f64 = 0.1;

async fn client_of(cluster: &EtcdCluster) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints(cluster.endpoints())
        .dial_timeout(crate::support::PATIENCE)
        .build()?;
    Ok(Client::new("main", config).await?)
}

/// Readers that run until they are stopped.
struct Load {
    client: Client,
    tasks: JoinSet<Vec<Error>>,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    reads: AtomicUsize,
    slow: AtomicUsize,
    over: AtomicBool,
}

impl Load {
    async fn start(client: &Client, pause: Duration) -> TestResult<Self> {
        for key in 0..10 {
            client.put(format!("read/{key}"), "value", None).await?;
        }
        let lease = client.grant(600).await?.id();
        let counts = Arc::new(Counts::default());
        let mut tasks = JoinSet::new();
        for reader in 0..READERS {
            let (client, counts) = (client.clone(), Arc::clone(&counts));
            tasks.spawn(async move {
                let mut failed = Vec::new();
                for turn in reader.. {
                    if counts.over.load(Ordering::Relaxed) {
                        break;
                    }
                    let started = Instant::now();
                    failed.extend(read(&client, lease, turn).await.err());
                    if started.elapsed() >= Duration::from_secs(1) {
                        counts.slow.fetch_add(1, Ordering::Relaxed);
                    }
                    counts.reads.fetch_add(1, Ordering::Relaxed);
                    sleep(pause).await;
                }
                failed
            });
        }
        Ok(Self {
            client: client.clone(),
            tasks,
            counts,
        })
    }

    fn reads(&self) -> usize {
        self.counts.reads.load(Ordering::Relaxed)
    }

    /// The number of reads per second.
    async fn rate(&self) -> f64 {
        let (before, started) = (self.reads(), Instant::now());
        sleep(Duration::from_secs(4)).await;
        (self.reads() - before) as f64 / started.elapsed().as_secs_f64()
    }

    async fn wait_for_reads(&self, reads: usize) {
        let deadline = Duration::from_secs(120);
        timeout(deadline, async {
            while self.reads() < reads {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{} of {reads} reads within {deadline:?}", self.reads()));
    }

    /// Stops the readers and returns their errors.
    async fn stop(mut self) -> Vec<Error> {
        self.counts.over.store(true, Ordering::Relaxed);
        let mut failed = Vec::new();
        while let Some(ended) = wait_for("a reader ends", self.tasks.join_next()).await {
            failed.extend(ended.unwrap());
        }
        assert!(self.client.ping().await.is_ok());
        failed
    }
}

async fn read(client: &Client, lease: i64, turn: usize) -> goo_etcd::Result<()> {
    let key = format!("read/{}", turn % 10);
    match turn % 6 {
        0 | 1 => assert_eq!(client.get(key, None).await?.count(), 1),
        2 => {
            let options = GetOptions::new().with_serializable();
            client.get(key, options).await?;
        }
        3 => {
            let options = GetOptions::new().with_prefix();
            assert_eq!(client.get("read/", options).await?.count(), 10);
        }
        4 => drop(client.member_list().await?),
        _ => assert!(client.lease_time_to_live(lease, None).await?.ttl() > 0),
    }
    Ok(())
}

/// Starts writers, and returns the number of failed writes of each so far.
fn start_writers(client: &Client, tasks: &mut JoinSet<()>) -> Arc<[AtomicUsize; WRITERS]> {
    let failed = Arc::new(std::array::from_fn(|_| AtomicUsize::new(0)));
    for writer in 0..WRITERS {
        let (client, failed): (_, Arc<[AtomicUsize; WRITERS]>) =
            (client.clone(), Arc::clone(&failed));
        tasks.spawn(async move {
            for turn in 0_u64.. {
                let put = client.put(format!("written/{writer}"), turn.to_string(), None);
                if put.await.is_err() {
                    failed[writer].fetch_add(1, Ordering::Relaxed);
                }
                sleep(Duration::from_millis(2)).await;
            }
        });
    }
    failed
}

/// The leader or a follower.
async fn victim(cluster: &EtcdCluster, leads: bool) -> TestResult<&Etcd> {
    let leader = cluster.leader().await?;
    Ok(cluster.member(if leads { leader } else { (leader + 1) % 3 }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_member_fails_only_writes_in_flight() -> TestResult {
    for leads in [false, true] {
        let cluster = EtcdCluster::start().await?;
        let client = client_of(&cluster).await?;
        let mut writing = JoinSet::new();
        let failed_writes = start_writers(&client, &mut writing);
        let load = Load::start(&client, Duration::from_millis(1)).await?;
        load.wait_for_reads(3_000).await;
        victim(&cluster, leads).await?.kill().await?;
        load.wait_for_reads(10_000).await;
        // Calls in flight on the leader have timed out by then.
        sleep(Duration::from_secs(6)).await;

        let failed = load.stop().await;
        assert!(failed.is_empty(), "leader: {leads}: {failed:?}");
        for (writer, failed) in failed_writes.iter().enumerate() {
            let failed = failed.load(Ordering::Relaxed);
            // One write was in flight on the member. If the member was the leader, a follower may
            // have forwarded another one to it.
            let most = if leads { 2 } else { 1 };
            assert!(failed <= most, "leader: {leads}: writer {writer}: {failed}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn paused_member_fails_no_read_and_soon_slows_none() -> TestResult {
    for leads in [false, true] {
        let cluster = EtcdCluster::start().await?;
        let client = client_of(&cluster).await?;
        let mut writing = JoinSet::new();
        let failed_writes = start_writers(&client, &mut writing);
        let failed_writes = || -> usize {
            let each = failed_writes.iter();
            each.map(|failed| failed.load(Ordering::Relaxed)).sum()
        };
        let load = Load::start(&client, Duration::from_millis(1)).await?;
        load.wait_for_reads(3_000).await;
        let before = load.rate().await;
        let victim = victim(&cluster, leads).await?;
        victim.pause().await?;
        sleep(KEEP_ALIVE + Duration::from_secs(1)).await;

        let (slow, reads) = (load.counts.slow.load(Ordering::Relaxed), load.reads());
        let failed = failed_writes();
        let after = load.rate().await;
        println!("leader: {leads}: {before:.0} reads a second before, {after:.0} after");
        assert!(
            after >= before * RECOVERED,
            "leader: {leads}: {before:.0} reads a second before, {after:.0} after"
        );
        // A third of the reads would be slow if the silent member were still asked.
        let slow = load.counts.slow.load(Ordering::Relaxed) - slow;
        let reads_after = load.reads() - reads;
        assert!(
            slow * 10 < reads_after,
            "leader: {leads}: {slow} of {reads_after} reads took a second"
        );
        assert_eq!(failed_writes(), failed);
        load.wait_for_reads(reads.max(7_000) + 3_000).await;

        // The return of the member fails no call either.
        victim.resume()?;
        load.wait_for_reads(load.reads() + 3_000).await;
        let failed = load.stop().await;
        assert!(failed.is_empty(), "leader: {leads}: {failed:?}");
    }
    Ok(())
}

/// Revision, key and value of the next events, up to the one whose value is `last`. A write that
/// was in flight when its writer stopped may follow that one.
async fn history(watch: &mut Watch, last: &str) -> Vec<(i64, String, String)> {
    let mut history = Vec::new();
    loop {
        let response = wait_for("an event", watch.next()).await.unwrap().unwrap();
        for event in response.events() {
            let kv = event.kv().unwrap();
            let value = kv.value_str().unwrap().to_owned();
            let is_last = value == last;
            history.push((kv.mod_revision(), kv.key_str().unwrap().to_owned(), value));
            if is_last {
                return history;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watch_survives_a_rolling_restart() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = client_of(&cluster).await?;
    let prefix = || WatchOptions::new().with_prefix();
    let mut watch = client.watch("written/", prefix()).await?;
    let seen = tokio::spawn(async move { history(&mut watch, "the end").await });
    let mut writing = JoinSet::new();
    start_writers(&client, &mut writing);

    for member in cluster.members() {
        sleep(Duration::from_millis(500)).await;
        member.stop().await?;
        sleep(Duration::from_millis(500)).await;
        member.start_again().await?;
    }
    writing.shutdown().await;
    client.put("written/last", "the end", None).await?;

    let seen = timeout(crate::support::PATIENCE, seen).await??;
    let from_start = prefix().with_start_revision(1);
    let mut all = client.watch("written/", from_start).await?;
    let all = history(&mut all, "the end").await;
    assert!(all.len() > 100, "only {} writes", all.len());
    assert_eq!(seen, all);
    assert!(seen.is_sorted_by_key(|(revision, ..)| *revision));
    Ok(())
}

#[tokio::test]
async fn streams_avoid_a_hung_member() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let lease = client_of(&cluster).await?.grant(600).await?.id();
    victim(&cluster, false).await?.pause().await?;
    // New clients, because a client that knows a member to be slow avoids it.
    for _ in 0..4 {
        let client = client_of(&cluster).await?;
        let mut watch = client.watch("key", None).await?;
        client.keep_alive_once(lease).await?;
        drop(client.keep_alive(lease).await?);
        wait_until("a put succeeds", async || {
            client.put("key", "1", None).await.is_ok()
        })
        .await;
        wait_for("the event", watch.next()).await.unwrap()?;
    }
    Ok(())
}

/// A member that ends every stream of watches and renewals with this status.
async fn start_ending_member(code: &'static str) -> RawServer {
    RawServer::start(move |request, mut respond| async move {
        let path = request.uri().path();
        if !path.ends_with("/Watch") && !path.ends_with("/LeaseKeepAlive") {
            return raw::respond_ok(respond);
        }
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", code)
            .header("grpc-message", "going down");
        respond.send_response(head.body(()).unwrap(), true).ok();
    })
    .await
}

#[tokio::test]
async fn streams_avoid_a_member_that_shuts_down() -> TestResult {
    let etcd = Etcd::start().await?;
    let lease = crate::support::connect(etcd.endpoint())
        .await
        .grant(600)
        .await?
        .id();
    // Cancelled, Internal, Unavailable.
    for code in ["1", "13", "14"] {
        let member = start_ending_member(code).await;
        let endpoints = [member.address().to_owned(), etcd.endpoint()];
        let config = Config::builder().endpoints(endpoints).build()?;
        let client = Client::new("main", config).await?;
        for _ in 0..20 {
            drop(client.watch("key", None).await?);
            client.keep_alive_once(lease).await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn stream_refused_by_all_members_reports_their_error() -> TestResult {
    for (code, status) in [("1", tonic::Code::Cancelled), ("13", tonic::Code::Internal)] {
        let member = start_ending_member(code).await;
        let config = Config::builder()
            .endpoints([member.address()])
            .request_timeout(Duration::from_secs(15))
            .build()?;
        let client = Client::new("main", config).await?;
        let started = Instant::now();
        let error = client.watch("key", None).await.unwrap_err();
        assert_eq!(error.code(), Some(status), "{error}");
        assert!(error.to_string().contains("going down"), "{error}");
        // Half of the timeout, and far from the timeout itself.
        assert!(started.elapsed() < Duration::from_secs(12));
        // If the client is closed meanwhile, the error is `Closed`.
        let watching = client.watch("key", None);
        let (watched, closed) = tokio::join!(watching, async {
            sleep(Duration::from_millis(300)).await;
            client.close().await
        });
        closed?;
        assert!(matches!(watched, Err(Error::Closed { .. })), "{watched:?}");
    }
    Ok(())
}

#[tokio::test]
async fn isolated_member_fails_no_write() -> TestResult {
    let cluster = Etcd::builder().start_partitionable_cluster(3).await?;
    let client = client_of(&cluster).await?;
    let isolated = (cluster.leader().await? + 1) % 3;
    cluster.isolate(isolated).await;
    let member = cluster.member(isolated).endpoint();
    let alone = crate::support::connect(member.clone()).await;
    wait_until("the isolated member has no leader", async || {
        let status = alone.status(&member).await;
        status.is_ok_and(|status| status.leader() == 0)
    })
    .await;
    // Writes in turn, because other programs slow both clients down alike.
    let others = (0..3).filter(|index| *index != isolated);
    let others = others.map(|index| cluster.member(index).endpoint());
    let others = Client::new("others", crate::support::config(others)).await?;
    let (mut slowest, mut slowest_of_others) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..WRITES {
        slowest = slowest.max(time_of_write(&client).await?);
        slowest_of_others = slowest_of_others.max(time_of_write(&others).await?);
    }
    // A write that waited for the isolated member would take the 5 s after which etcd gives up.
    let limit = slowest_of_others + Duration::from_secs(4);
    assert!(
        slowest < limit,
        "{slowest:?}, without the member {slowest_of_others:?}"
    );
    Ok(())
}

async fn time_of_write(client: &Client) -> TestResult<Duration> {
    let started = Instant::now();
    client.put("key", "1", None).await?;
    Ok(started.elapsed())
}

/// An etcd whose every response has this status, with details that are not base64.
async fn etcd_with_bad_details() -> FrameServer {
    FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        loop {
            let frame = connection.next().await?;
            if frame.kind == HEADERS {
                let status: [(&str, &[u8]); 5] = [
                    (":status", b"200"),
                    ("content-type", b"application/grpc"),
                    ("grpc-status", b"9"),
                    ("grpc-message", b"etcdserver: caf\xe9"),
                    ("grpc-status-details-bin", b"%%%"),
                ];
                connection.send_headers(frame.stream, &status, true).await?;
            }
        }
    })
    .await
}

/// tonic's own parser panics on such details (`Status::from_header_map`).
#[tokio::test]
async fn details_that_are_not_base64_do_not_panic() -> TestResult {
    let etcd = etcd_with_bad_details().await;
    let config = Config::builder().endpoints([etcd.address()]).build()?;
    let client = Client::connect_lazy("main", config)?;
    let got = client.get("key", None).await.map(drop);
    let put = client.put("key", "value", None).await.map(drop);
    let watched = client.watch("key", None).await.map(drop);
    for result in [got, put, watched] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("caf\u{fffd}"), "{error}");
    }
    Ok(())
}
