//! The client on a cluster whose members are killed, paused and restarted under load.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::testing::{Etcd, EtcdCluster};
use goo_etcd::{Client, Config, Error, GetOptions, Watch, WatchOptions};
use support::raw::{self, RawServer};
use support::{TestResult, eventually, soon};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

const READERS: usize = 32;
const WRITERS: usize = 4;

/// How soon a silent member is given up: `keep_alive_interval` and `keep_alive_timeout`.
const KEEP_ALIVE: Duration = Duration::from_secs(13);

/// What counts as fast as before. Another program that begins to use the same cores takes up to half; where
/// reads still wait for the silent member, each of those takes a second, and not a fiftieth of this is left.
const FULL_SPEED: f64 = 0.5;

async fn client_of(cluster: &EtcdCluster) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints(cluster.endpoints())
        .dial_timeout(support::PATIENCE)
        .build()?;
    Ok(Client::new("main", config).await?)
}

/// Readers and writers, until they are told to stop.
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
                    let begun = Instant::now();
                    failed.extend(read(&client, lease, turn).await.err());
                    if begun.elapsed() >= Duration::from_secs(1) {
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

    /// Reads in a second.
    async fn rate(&self) -> f64 {
        let (before, begun) = (self.reads(), Instant::now());
        sleep(Duration::from_secs(4)).await;
        (self.reads() - before) as f64 / begun.elapsed().as_secs_f64()
    }

    async fn reach(&self, reads: usize) {
        let deadline = Duration::from_secs(120);
        timeout(deadline, async {
            while self.reads() < reads {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("{} of {reads} reads within {deadline:?}", self.reads()));
    }

    /// The errors of the reads.
    async fn stop(mut self) -> Vec<Error> {
        self.counts.over.store(true, Ordering::Relaxed);
        let mut failed = Vec::new();
        while let Some(ended) = soon("a reader ends", self.tasks.join_next()).await {
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

/// Each writer's number of failed writes so far.
fn writers(client: &Client, tasks: &mut JoinSet<()>) -> Arc<[AtomicUsize; WRITERS]> {
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

/// Which member to hurt.
async fn victim(cluster: &EtcdCluster, leads: bool) -> TestResult<&Etcd> {
    let leader = cluster.leader().await?;
    Ok(cluster.member(if leads { leader } else { (leader + 1) % 3 }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_reads_when_a_member_is_killed_then_none_fails_and_of_the_writes_only_those_in_flight()
-> TestResult {
    for leads in [false, true] {
        let cluster = EtcdCluster::start().await?;
        let client = client_of(&cluster).await?;
        let mut writing = JoinSet::new();
        let failed_writes = writers(&client, &mut writing);
        let load = Load::start(&client, Duration::from_millis(1)).await?;
        load.reach(3_000).await;
        victim(&cluster, leads).await?.kill().await?;
        load.reach(10_000).await;
        // What was in flight on the leader has run out of time by then.
        sleep(Duration::from_secs(6)).await;

        let failed = load.stop().await;
        assert!(failed.is_empty(), "leader: {leads}: {failed:?}");
        for (writer, failed) in failed_writes.iter().enumerate() {
            let failed = failed.load(Ordering::Relaxed);
            // One was on its way to the member; and the next one a follower may have passed on to its dead
            // leader, where it is lost, and nobody can tell that it is.
            let most = if leads { 2 } else { 1 };
            assert!(failed <= most, "leader: {leads}: writer {writer}: {failed}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_reads_when_a_member_is_paused_then_none_fails_and_they_are_soon_as_fast_as_before()
-> TestResult {
    for leads in [false, true] {
        let cluster = EtcdCluster::start().await?;
        let client = client_of(&cluster).await?;
        let mut writing = JoinSet::new();
        let failed_writes = writers(&client, &mut writing);
        let failed_writes = || -> usize {
            let each = failed_writes.iter();
            each.map(|failed| failed.load(Ordering::Relaxed)).sum()
        };
        let load = Load::start(&client, Duration::from_millis(1)).await?;
        load.reach(3_000).await;
        let before = load.rate().await;
        let victim = victim(&cluster, leads).await?;
        victim.pause().await?;
        sleep(KEEP_ALIVE + Duration::from_secs(1)).await;

        let (slow, reads) = (load.counts.slow.load(Ordering::Relaxed), load.reads());
        let failed = failed_writes();
        let after = load.rate().await;
        println!("leader: {leads}: {before:.0} reads a second before, {after:.0} after");
        assert!(
            after >= before * FULL_SPEED,
            "leader: {leads}: {before:.0} reads a second before, {after:.0} after"
        );
        let slow = load.counts.slow.load(Ordering::Relaxed) - slow;
        assert!(slow < 30, "leader: {leads}: {slow} took a second");
        assert_eq!(failed_writes(), failed);
        load.reach(reads.max(7_000) + 3_000).await;

        // Nor does its return cost any.
        victim.resume()?;
        load.reach(load.reads() + 3_000).await;
        let failed = load.stop().await;
        assert!(failed.is_empty(), "leader: {leads}: {failed:?}");
    }
    Ok(())
}

/// (revision, key, value) of the next events, up to the one whose value is `last`. What a writer was
/// sending when it was stopped may come after that.
async fn history(watch: &mut Watch, last: &str) -> Vec<(i64, String, String)> {
    let mut history = Vec::new();
    loop {
        let response = soon("an event", watch.next()).await.unwrap().unwrap();
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
async fn given_a_rolling_restart_then_a_watch_on_a_busy_prefix_yields_every_event_once_in_order()
-> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = client_of(&cluster).await?;
    let prefix = || WatchOptions::new().with_prefix();
    let mut watch = client.watch("written/", prefix()).await?;
    let seen = tokio::spawn(async move { history(&mut watch, "the end").await });
    let mut writing = JoinSet::new();
    writers(&client, &mut writing);

    for member in cluster.members() {
        sleep(Duration::from_millis(500)).await;
        member.stop().await?;
        sleep(Duration::from_millis(500)).await;
        member.start_again().await?;
    }
    writing.shutdown().await;
    client.put("written/last", "the end", None).await?;

    let seen = timeout(support::PATIENCE, seen).await??;
    let from_start = prefix().with_start_revision(1);
    let mut told = client.watch("written/", from_start).await?;
    let told = history(&mut told, "the end").await;
    assert!(told.len() > 100, "{} writes were no load", told.len());
    assert_eq!(seen, told);
    assert!(seen.is_sorted_by_key(|(revision, ..)| *revision));
    Ok(())
}

#[tokio::test]
async fn given_a_hung_member_then_streams_are_opened_on_another() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let lease = client_of(&cluster).await?.grant(600).await?.id();
    victim(&cluster, false).await?.pause().await?;
    // New ones, since what is known of a member's slowness keeps streams away from it.
    for _ in 0..4 {
        let client = client_of(&cluster).await?;
        let mut watch = client.watch("key", None).await?;
        client.keep_alive_once(lease).await?;
        drop(client.keep_alive(lease).await?);
        eventually("a put works", async || {
            client.put("key", "1", None).await.is_ok()
        })
        .await;
        soon("its event", watch.next()).await.unwrap()?;
    }
    Ok(())
}

/// Is there, and ends every stream of watches and renewals with this status.
async fn going_down(code: &'static str) -> RawServer {
    RawServer::start(move |request, mut respond| async move {
        let path = request.uri().path();
        if !path.ends_with("/Watch") && !path.ends_with("/LeaseKeepAlive") {
            return raw::answer(respond);
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
async fn given_a_member_that_is_going_down_then_streams_are_opened_on_another_however_it_ends_them()
-> TestResult {
    let etcd = Etcd::start().await?;
    let lease = support::connect(etcd.endpoint())
        .await
        .grant(600)
        .await?
        .id();
    // Cancelled, Internal, Unavailable.
    for code in ["1", "13", "14"] {
        let member = going_down(code).await;
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
async fn given_that_every_member_ends_a_stream_alike_then_the_error_is_what_they_say_and_in_time()
-> TestResult {
    for (code, status) in [("1", tonic::Code::Cancelled), ("13", tonic::Code::Internal)] {
        let member = going_down(code).await;
        let config = Config::builder()
            .endpoints([member.address()])
            .request_timeout(Duration::from_secs(2))
            .build()?;
        let client = Client::new("main", config).await?;
        let begun = Instant::now();
        let error = client.watch("key", None).await.unwrap_err();
        assert_eq!(error.code(), Some(status), "{error}");
        assert!(error.to_string().contains("going down"), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(2));
        // And the client that is closed meanwhile says so.
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

/// Stands before an etcd that is not there, and says so in a page for people.
async fn gateway() -> RawServer {
    RawServer::start(async |_, mut respond| {
        let head = http::Response::builder()
            .status(503)
            .header("content-type", "text/html");
        if let Ok(mut page) = respond.send_response(head.body(()).unwrap(), false) {
            let text = "<html><body>Service Unavailable</body></html>";
            page.send_data(text.into(), true).ok();
        }
    })
    .await
}

#[tokio::test]
async fn given_a_gateway_without_its_etcd_then_reads_and_streams_go_to_another_member() -> TestResult
{
    let (etcd, gateway) = (Etcd::start().await?, gateway().await);
    let lease = support::connect(etcd.endpoint())
        .await
        .grant(600)
        .await?
        .id();
    let endpoints = [gateway.address().to_owned(), etcd.endpoint()];
    for _ in 0..4 {
        let config = Config::builder().endpoints(endpoints.clone()).build()?;
        let client = Client::new("main", config).await?;
        for _ in 0..20 {
            client.get("key", None).await?;
            drop(client.watch("key", None).await?);
            client.keep_alive_once(lease).await?;
        }
    }
    // Alone it is an etcd that cannot be reached.
    let config = Config::builder()
        .endpoints([gateway.address()])
        .dial_timeout(Duration::from_secs(1))
        .build()?;
    let error = Client::new("main", config).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("HTTP 503"), "{error}");
    Ok(())
}

#[tokio::test]
async fn given_a_member_that_is_cut_off_from_the_others_then_no_write_fails_on_it() -> TestResult {
    let cluster = Etcd::builder().start_partitionable_cluster(3).await?;
    let client = client_of(&cluster).await?;
    let isolated = (cluster.leader().await? + 1) % 3;
    cluster.isolate(isolated).await;
    let member = cluster.member(isolated).endpoint();
    let alone = support::connect(member.clone()).await;
    eventually("it has noticed", async || {
        let status = alone.status(&member).await;
        status.is_ok_and(|status| status.leader() == 0)
    })
    .await;
    let begun = Instant::now();
    let mut writes = 0;
    while begun.elapsed() < Duration::from_secs(15) {
        client.put("key", "1", None).await?;
        writes += 1;
        sleep(Duration::from_millis(5)).await;
    }
    assert!(writes > 100, "{writes}");
    Ok(())
}
