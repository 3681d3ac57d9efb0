//! A cluster is upgraded member by member while everything is in use.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{
    TestResult, config, find_etcd, key, listing, page, say_left_out, wait_for, wait_until,
};
use futures::StreamExt;
use goo_etcd::testing::{Etcd, EtcdCluster};
use goo_etcd::{Client, Directory, Instance, Registrar, RegistrationState, Watch, WatchOptions};
use tokio::task::JoinHandle;

const TTL: Duration = Duration::from_secs(15);

/// The number of writes after each release.
const WRITES: usize = 100;

/// Reads and writes, one after another, until the switch is on. No read may fail, and no write that
/// is repeated while it may be. Returns the last number written.
fn start_load(client: Client, is_over: Arc<AtomicBool>) -> (Arc<AtomicUsize>, JoinHandle<()>) {
    let written = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&written);
    let load = tokio::spawn(async move {
        for n in 1.. {
            if is_over.load(Ordering::SeqCst) {
                break;
            }
            let write = async {
                while let Err(error) = client.put("load/n", n.to_string(), None).await {
                    assert!(error.is_retryable(), "write {n}: {error}");
                }
            };
            wait_for("the retried write", write).await;
            counter.store(n, Ordering::SeqCst);
            let read = client.get("load/n", None).await;
            let read = read.unwrap_or_else(|error| panic!("read {n}: {error}"));
            assert_eq!(read.kvs()[0].value_str().unwrap(), n.to_string());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    (written, load)
}

/// Asserts that a watch yields every write up to the last; a repeated write may appear twice.
async fn assert_whole(watch: &mut Watch, last: usize) -> TestResult {
    let mut seen = 0;
    while seen < last {
        let response = wait_for("an event", watch.next()).await.ok_or("events")??;
        for event in response.events() {
            let n: usize = event.kv().ok_or("a key")?.value_str()?.parse()?;
            assert!(n == seen || n == seen + 1, "{n} after {seen}");
            seen = n;
        }
    }
    Ok(())
}

/// Restarts the members one after another as another release, and waits until all have agreed to
/// use it: until then etcd does not allow the upgrade to the release after it.
async fn upgrade(cluster: &EtcdCluster, release: &str, program: &Path) -> TestResult {
    for member in cluster.members() {
        member.stop().await?;
        member.set_program(program);
        member.start_again().await?;
    }
    let agreed = format!("\"etcdcluster\":\"{release}.0\"");
    for member in cluster.members() {
        wait_until("the release is in use", async || {
            let version = page(member, "/version").await;
            version.is_ok_and(|version| version.contains(&agreed))
        })
        .await;
    }
    Ok(())
}

#[tokio::test]
async fn members_are_upgraded_one_by_one_and_nothing_is_lost() -> TestResult {
    let releases = [
        find_etcd("ETCD_NEWEST", "etcd-newest"),
        find_etcd("ETCD_3_6", "etcd-3.6"),
        find_etcd("ETCD_3_7", "etcd-3.7"),
    ];
    let [Some(first), Some(second), Some(third)] = releases else {
        say_left_out("an upgrade needs etcd 3.5, 3.6 and 3.7");
        return Ok(());
    };
    // etcd 3.7 cannot read entries that 3.5 has written, so a snapshot must have replaced them.
    let snapshots = format!("--snapshot-count={}", WRITES / 2);
    let builder = Etcd::builder().program(first).args([snapshots]);
    let cluster = builder.start_cluster(3).await?;
    let connect = async |name| Client::new(name, config(cluster.endpoints())).await;
    let (holder, waiter) = (connect("holder").await?, connect("waiter").await?);
    let registration = Registrar::builder(&holder)
        .ttl(TTL)
        .build()?
        .register(Instance::new("greeter", "h:1").id("a"))
        .await?;
    let registered = holder.get(key("a"), None).await?;
    let directory = Directory::watch(&waiter, "greeter").await?;
    let prefix = WatchOptions::new().with_prefix();
    let mut watch = waiter.watch("load/", prefix).await?;
    let lock = holder.lock("lock", TTL).await?;
    let leader = holder.campaign("election", "holder", TTL).await?;
    let waiting = waiter.clone();
    let next_lock = tokio::spawn(async move { waiting.lock("lock", TTL).await });
    let waiting = waiter.clone();
    let next_leader = tokio::spawn(async move { waiting.campaign("election", "next", TTL).await });
    let is_over = Arc::new(AtomicBool::new(false));
    let (written, load) = start_load(connect("load").await?, is_over.clone());

    for (release, program) in [("3.6", second), ("3.7", third)] {
        upgrade(&cluster, release, &program).await?;
        let before = written.load(Ordering::SeqCst);
        wait_until("the load goes on", async || {
            load.is_finished() || written.load(Ordering::SeqCst) > before + WRITES
        })
        .await;
        assert!(!load.is_finished(), "the load has failed");
        assert!(lock.is_held() && leader.is_held());
        assert!(!next_lock.is_finished() && !next_leader.is_finished());
        assert_eq!(registration.state(), RegistrationState::Registered);
        assert_eq!(listing(&directory.snapshot()), ["a=h:1"]);
        wait_until("the directory is live", async || {
            directory.snapshot().freshness().is_live()
        })
        .await;
    }
    is_over.store(true, Ordering::SeqCst);
    load.await?;

    let still = holder.get(key("a"), None).await?;
    let revisions = [&still, &registered].map(|got| got.kvs()[0].mod_revision());
    assert_eq!(revisions[0], revisions[1], "the instance was written again");
    assert_whole(&mut watch, written.load(Ordering::SeqCst)).await?;
    lock.unlock().await?;
    wait_for("the next holder", next_lock)
        .await??
        .unlock()
        .await?;
    leader.resign().await?;
    let next = wait_for("the next leader", next_leader).await??;
    next.resign().await?;
    registration.deregister().await?;
    wait_until("the directory sees the end", async || {
        directory.snapshot().is_empty()
    })
    .await;
    Ok(())
}
