//! Large services and busy ones. Each test is alone in its process or measures nothing of the others: the
//! memory is the process's.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{BalancedChannel, Client, Directory, TxnOp};
use support::balanced::{Load, until_ready};
use support::echo::EchoServer;
use support::{TestResult, connect, eventually, key, soon};
use tokio::time::sleep;

const INSTANCES: usize = 10_000;

/// Held by each test: what they measure is all of the process's, and of the machine's.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A value as long as they are in earnest.
fn value(address: &str, weight: u32) -> String {
    format!(
        r#"{{"Op":0,"Addr":"{address}","Metadata":{{"weight":{weight},"zone":"eu-central-1a","version":"1.2.3","commit":"0123456789abcdef"}}}}"#
    )
}

fn address(n: usize) -> String {
    format!("10.{}.{}.{}:50051", n >> 16, (n >> 8) & 255, n & 255)
}

async fn fill(client: &Client, count: usize) -> TestResult {
    let ids: Vec<usize> = (0..count).collect();
    // As many operations as etcd takes in one transaction, by default 128.
    for some in ids.chunks(100) {
        let puts = some.iter().map(|n| {
            let address = address(*n);
            TxnOp::put(key(&address), value(&address, 100), None)
        });
        client.txn().and_then(puts).commit().await?;
    }
    Ok(())
}

/// The memory that the process has in use, in bytes.
fn memory() -> TestResult<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).ok_or("resident")?;
    Ok(pages.parse::<u64>()? * 4096)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_instances_then_they_are_there_within_1_s_and_a_change_within_50_ms()
-> TestResult {
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES).await?;
    let client = connect(etcd.endpoint()).await;
    client.ping().await?;

    // With all that the first list needs for a while, such as buffers.
    let before = memory()?;
    let begun = Instant::now();
    let directory = Directory::watch(&client, "greeter").await?;
    let first = begun.elapsed();
    assert_eq!(directory.snapshot().len(), INSTANCES);
    assert!(first < Duration::from_secs(1), "the first took {first:?}");
    let each = memory()?.saturating_sub(before) / INSTANCES as u64;
    assert!(each < 2048, "{each} bytes an instance");

    let mut took = Vec::new();
    for n in 0..50 {
        let address = address(n * 199);
        let weight = 200 + u32::try_from(n)?;
        let begun = Instant::now();
        writer
            .put(key(&address), value(&address, weight), None)
            .await?;
        let is_there = || {
            let snapshot = directory.snapshot();
            let at = goo_etcd_key(&snapshot, &key(&address));
            at == Some(weight)
        };
        soon("the change is there", async {
            while !is_there() {
                sleep(Duration::from_millis(1)).await;
            }
        })
        .await;
        took.push(begun.elapsed());
        sleep(Duration::from_millis(30)).await;
    }
    took.sort();
    // Of all, the machine's own pauses aside.
    let most = took[45];
    assert!(most < Duration::from_millis(50), "{took:?}");
    let after = memory()?.saturating_sub(before) / INSTANCES as u64;
    assert!(after < 2048, "{after} bytes an instance after changes");
    println!(
        "first {first:?}, {each} to {after} bytes an instance, a change {:?} to {most:?}",
        took[0]
    );
    Ok(())
}

fn goo_etcd_key(snapshot: &goo_etcd::Snapshot, key: &str) -> Option<u32> {
    let found = snapshot.iter().find(|(of, _)| of.as_str() == key);
    found.map(|(_, instance)| instance.weight)
}

/// Among thousands of others, which are not called: they have weight 0.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_instances_when_they_are_listed_anew_then_connections_are_not_disturbed()
-> TestResult {
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, INSTANCES).await?;
    let servers: Vec<EchoServer> = (0..3).map(|_| EchoServer::start()).collect();
    for server in &servers {
        let address = server.address();
        // A service beside it, of which connections can be made, listed anew by the same loss.
        writer
            .put(
                format!("services/called/{address}"),
                value(address, 100),
                None,
            )
            .await?;
    }
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    let mut differences = directory.discover();
    for _ in 0..INSTANCES {
        next(&mut differences).await;
    }
    let channel = BalancedChannel::connect(&client, "called").await?;
    until_ready(&channel, 3).await;
    let load = Load::start(&channel, 4);
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
    load.goes_on_for(200).await;
    load.finish().await.assert_no_failure();
    let accepted: usize = servers
        .iter()
        .map(|server| server.counts().accepted())
        .sum();
    assert_eq!(accepted, 3);
    Ok(())
}

async fn next(discovery: &mut goo_etcd::Discovery) -> String {
    use futures::StreamExt;
    let change = soon("a difference", discovery.next()).await;
    format!("{:?}", change)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_1_000_changes_a_second_for_30_s_then_the_consumer_converges_and_memory_stays_flat()
-> TestResult {
    let _alone = ALONE.lock().await;
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    fill(&writer, 1_000).await?;
    let client = connect(etcd.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    // A consumer that takes its time.
    let seen = Arc::new(Mutex::new((0, 0)));
    let consumer = tokio::spawn({
        let (mut changes, seen) = (directory.changes(), Arc::clone(&seen));
        async move {
            use futures::StreamExt;
            while let Some(snapshot) = changes.next().await {
                let weights: u64 = snapshot.instances().map(|i| u64::from(i.weight)).sum();
                *seen.lock().unwrap_or_else(PoisonError::into_inner) =
                    (snapshot.revision(), weights);
                sleep(Duration::from_millis(50)).await;
            }
        }
    });
    let written = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let mut samples = Vec::new();
    let mut turn = 0_usize;
    while begun.elapsed() < Duration::from_secs(30) {
        let due = begun.elapsed().as_millis() / 10;
        while (turn as u128) < due {
            let puts = (0..10).map(|n| {
                let address = address((turn * 10 + n) % 1_000);
                let weight = 1 + u32::try_from(turn % 500).unwrap_or_default();
                writer.put(key(&address), value(&address, weight), None)
            });
            futures::future::try_join_all(puts).await?;
            written.fetch_add(10, Ordering::Relaxed);
            turn += 1;
            if turn.is_multiple_of(500) {
                samples.push(memory()?);
                // Never far behind.
                let (revision, _) = *seen.lock().unwrap_or_else(PoisonError::into_inner);
                let behind = directory.snapshot().revision() - revision;
                assert!(behind < 1_000, "the consumer is {behind} revisions behind");
            }
        }
        sleep(Duration::from_millis(2)).await;
    }
    let answer = writer
        .get(key(""), goo_etcd::GetOptions::new().with_prefix())
        .await?;
    let last = answer
        .kvs()
        .iter()
        .map(|kv| kv.mod_revision())
        .max()
        .ok_or("keys")?;
    let truth = {
        let fresh = Directory::watch(&writer, "greeter").await?;
        let snapshot = fresh.snapshot();
        snapshot
            .instances()
            .map(|i| u64::from(i.weight))
            .sum::<u64>()
    };
    eventually("it converges", async || {
        *seen.lock().unwrap_or_else(PoisonError::into_inner) == (last, truth)
    })
    .await;
    let changes = written.load(Ordering::Relaxed);
    assert!(changes >= 20_000, "{changes} changes are no load");
    // From a sixth of the time on, when everything has been used once.
    let (early, late) = (samples[0], samples[samples.len() - 1]);
    assert!(late < early + early / 5, "from {early} to {late} bytes");
    println!("{changes} changes, memory {early} to {late} bytes");
    consumer.abort();
    Ok(())
}
