//! Every snapshot of a directory is a state that etcd had, through every fault.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use crate::support::greeter::{GreeterServer, call_greeter};
use crate::support::history::{assert_matches_history, history};
use crate::support::{
    SnapshotRecorder, TestResult, connect, key, listing, value, wait_for, wait_until, watcher_count,
};
use futures::{FutureExt, StreamExt};
use goo_etcd::format::{DecodeError, EtcdNaming, Format, KeyContext, KeyRange};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Directory, Freshness, Instance, TxnOp};
use tower::discover::Change;

async fn put(client: &Client, id: &str, address: &str) -> TestResult {
    client.put(key(id), value(address), None).await?;
    Ok(())
}

#[tokio::test]
async fn changed_value_replaces_the_endpoint() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (old, new) = (GreeterServer::start().await, GreeterServer::start().await);
    put(&client, "one", old.address()).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    let mut discovery = directory.discover();
    let Some(Ok(Change::Insert(first_key, first))) = wait_for("a change", discovery.next()).await
    else {
        panic!("expected the instance");
    };
    assert_eq!(first.address, old.address());
    assert_eq!(call_greeter(&channel).await?, old.address());

    put(&client, "one", new.address()).await?;

    match wait_for("a change", discovery.next()).await {
        Some(Ok(Change::Insert(second_key, second))) => {
            assert_eq!(second_key, first_key);
            assert_eq!(second.address, new.address());
        }
        other => panic!("expected its replacement, got {other:?}"),
    }
    assert!(discovery.next().now_or_never().is_none());
    assert_eq!(
        listing(&directory.snapshot()),
        [format!("one={}", new.address())]
    );
    wait_until("the new server is called", async || {
        call_greeter(&channel).await.unwrap() == new.address()
    })
    .await;
    for _ in 0..20 {
        assert_eq!(call_greeter(&channel).await?, new.address());
    }
    Ok(())
}

#[tokio::test]
async fn transactions_are_shown_whole() -> TestResult {
    const GENERATIONS: usize = 200;
    const WIDTH: usize = 5;
    let id = |generation: usize, at: usize| format!("{generation:03}-{at}");
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let next_generation = |generation: usize| {
        let added = (0..WIDTH)
            .map(move |at| TxnOp::put(key(&id(generation, at)), value("10.0.0.1:80"), None));
        let deleted = (0..WIDTH)
            .filter(move |_| generation > 0)
            .map(move |at| TxnOp::delete(key(&id(generation - 1, at)), None));
        client
            .txn()
            .and_then(added.chain(deleted).collect::<Vec<_>>())
            .commit()
    };
    next_generation(0).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = SnapshotRecorder::new(&directory);
    for generation in 1..GENERATIONS {
        next_generation(generation).await?;
    }
    let last = id(GENERATIONS - 1, 0);
    let is_last = |ids: &[String]| ids.iter().any(|id| id.starts_with(&last));
    wait_until("the last generation is shown", async || {
        seen.last()
            .is_some_and(|snapshot| is_last(&listing(&snapshot)))
    })
    .await;

    let snapshots = seen.all();
    for snapshot in &snapshots {
        let generations: BTreeSet<String> = snapshot
            .instances()
            .map(|instance| instance.id[..3].to_owned())
            .collect();
        assert_eq!(generations.len(), 1, "two generations in {snapshot:?}");
        assert_eq!(snapshot.len(), WIDTH, "half a generation in {snapshot:?}");
    }
    assert!(snapshots.len() > 2, "no snapshot in between");
    assert_matches_history(&history(&etcd).await?, "greeter", &snapshots);
    Ok(())
}

#[tokio::test]
async fn deletions_behind_a_compaction_are_noticed() -> TestResult {
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    for id in ["ghost", "stays", "moves"] {
        put(&writer, id, "10.0.0.1:80").await?;
    }
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    let mut discovery = directory.discover();
    for _ in 0..3 {
        assert!(matches!(
            wait_for("a change", discovery.next()).await,
            Some(Ok(Change::Insert(..)))
        ));
    }

    proxy.cut().await;
    writer.delete(key("ghost"), None).await?;
    put(&writer, "moves", "10.0.0.2:80").await?;
    put(&writer, "newborn", "10.0.0.3:80").await?;
    // Added and deleted while the directory is disconnected.
    put(&writer, "mayfly", "10.0.0.4:80").await?;
    writer.delete(key("mayfly"), None).await?;
    etcd.compact().await?;
    wait_until("the loss is noticed", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    assert_eq!(directory.snapshot().len(), 3);
    proxy.restore().await?;
    wait_until("it is live again", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;

    let truth = [
        "moves=10.0.0.2:80",
        "newborn=10.0.0.3:80",
        "stays=10.0.0.1:80",
    ];
    assert_eq!(listing(&directory.snapshot()), truth);
    let mut changes = Vec::new();
    while let Some(Some(Ok(change))) = discovery.next().now_or_never() {
        changes.push(match change {
            Change::Insert(key, instance) => format!("+{key}={}", instance.address),
            Change::Remove(key) => format!("-{key}"),
        });
    }
    let difference = [
        "-services/greeter/ghost",
        "+services/greeter/moves=10.0.0.2:80",
        "+services/greeter/newborn=10.0.0.3:80",
    ];
    assert_eq!(changes, difference);

    // The watch goes on from there.
    writer.delete(key("stays"), None).await?;
    wait_until("a later deletion is seen", async || {
        directory.snapshot().len() == 2
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn undecodable_value_is_counted() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    put(&client, "good", "10.0.0.1:80").await?;
    client.put(key("bad-in-list"), "no JSON", None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    assert_eq!(listing(&directory.snapshot()), ["good=10.0.0.1:80"]);
    assert_eq!(directory.snapshot().undecodable(), 1);

    client.put(key("bad-in-watch"), [0xff, 0xfe], None).await?;
    put(&client, "later", "10.0.0.2:80").await?;
    wait_until("the later instance is shown", async || {
        directory.snapshot().len() == 2
    })
    .await;
    assert_eq!(directory.snapshot().undecodable(), 2);

    // An invalid value does not remove the instance.
    client.put(key("good"), r#"{"Op":0}"#, None).await?;
    wait_until("the value is counted", async || {
        directory.snapshot().undecodable() == 3
    })
    .await;
    let both = ["good=10.0.0.1:80", "later=10.0.0.2:80"];
    assert_eq!(listing(&directory.snapshot()), both);

    client.delete(key("bad-in-list"), None).await?;
    put(&client, "bad-in-watch", "10.0.0.3:80").await?;
    put(&client, "good", "10.0.0.4:80").await?;
    wait_until("all values are decodable", async || {
        let snapshot = directory.snapshot();
        snapshot.undecodable() == 0 && snapshot.len() == 3
    })
    .await;
    Ok(())
}

/// More instances than two pages of a list.
const MANY: usize = 2_500;

/// A custom format with a bug.
#[derive(Debug)]
struct Careless;

impl Format for Careless {
    fn name(&self) -> &'static str {
        "careless"
    }
    fn default_prefix(&self) -> &'static str {
        EtcdNaming.default_prefix()
    }
    fn default_ttl(&self) -> Duration {
        EtcdNaming.default_ttl()
    }
    fn key(&self, prefix: &str, instance: &Instance) -> String {
        EtcdNaming.key(prefix, instance)
    }
    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        EtcdNaming.range(prefix, service)
    }
    fn encode(&self, instance: &Instance) -> goo_etcd::Result<Vec<u8>> {
        EtcdNaming.encode(instance)
    }
    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        assert!(!value.is_empty(), "an empty value");
        EtcdNaming.decode(context, value)
    }
}

#[tokio::test]
async fn panicking_format_is_contained() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    put(&client, "a", "h:1").await?;
    client.put(key("b"), "", None).await?;
    let directory = Directory::builder(&client, "greeter").format(Careless);
    let directory = directory.watch().await?;
    assert_eq!(listing(&directory.snapshot()), ["a=h:1"]);
    assert_eq!(directory.snapshot().undecodable(), 1);
    client.put(key("a"), "", None).await?;
    put(&client, "c", "h:3").await?;
    wait_until("the later instance is shown", async || {
        listing(&directory.snapshot()) == ["a=h:1", "c=h:3"]
    })
    .await;
    assert_eq!(directory.snapshot().undecodable(), 2);
    assert!(directory.snapshot().freshness().is_live());
    Ok(())
}

async fn put_many(client: &Client) -> TestResult {
    let ids: Vec<usize> = (0..MANY).collect();
    // etcd allows 128 operations in a transaction by default.
    for ids in ids.chunks(100) {
        let puts = ids
            .iter()
            .map(|id| TxnOp::put(key(&format!("{id:04}")), value("10.0.0.1:80"), None));
        client
            .txn()
            .and_then(puts.collect::<Vec<_>>())
            .commit()
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn all_pages_of_a_list_are_shown() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    put_many(&client).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let snapshot = directory.snapshot();
    let expected: Vec<String> = (0..MANY).map(|id| format!("{id:04}=10.0.0.1:80")).collect();
    assert_eq!(listing(&snapshot), expected);
    Ok(())
}

#[tokio::test]
async fn every_snapshot_is_a_state_of_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    put_many(&writer).await?;
    // Each transaction moves an instance from the last page to before the first. Pages of different
    // revisions would show it twice or not at all.
    let done = Arc::new(AtomicBool::new(false));
    let moving = tokio::spawn({
        let done = Arc::clone(&done);
        let writer = writer.clone();
        async move {
            let mut id = MANY;
            while !done.load(Ordering::Relaxed) && id > 0 {
                id -= 1;
                writer
                    .txn()
                    .and_then([
                        TxnOp::delete(key(&format!("{id:04}")), None),
                        TxnOp::put(key(&format!("!{id:04}")), value("10.0.0.2:80"), None),
                    ])
                    .commit()
                    .await
                    .unwrap();
                // Slow enough that some are left at the end.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            MANY - id
        }
    });
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let mut collected = Vec::new();
    for _ in 0..4 {
        let directory = Directory::watch(&client, "greeter").await?;
        let seen = SnapshotRecorder::new(&directory);
        let before = directory.snapshot().revision();
        wait_until("changes are seen", async || {
            directory.snapshot().revision() > before + 25
        })
        .await;
        proxy.disconnect().await?;
        wait_until("the loss was noticed", async || {
            seen.all().iter().any(|s| !s.freshness().is_live())
        })
        .await;
        wait_until("it is live again", async || {
            directory.snapshot().freshness().is_live()
        })
        .await;
        collected.push((directory, seen));
    }
    done.store(true, Ordering::Relaxed);
    let moved = moving.await?;
    assert!((100..MANY).contains(&moved), "moved {moved}");

    let history = history(&etcd).await?;
    let end = history.last().map_or(0, |change| change.revision);
    for (directory, seen) in &collected {
        wait_until("the end is shown", async || {
            directory.snapshot().revision() >= end
        })
        .await;
        assert_matches_history(&history, "greeter", &seen.all());
        assert_matches_history(&history, "greeter", &[directory.snapshot()]);
    }
    Ok(())
}

#[tokio::test]
async fn outage_keeps_instances_and_shows_their_age() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    put(&client, "one", "10.0.0.1:80").await?;
    let directory = Directory::watch(&client, "greeter").await?;
    assert!(directory.snapshot().freshness().is_live());
    assert_eq!(directory.snapshot().freshness().age(), Duration::ZERO);

    let before = SystemTime::now();
    etcd.stop().await?;
    wait_until("the loss is noticed", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    let snapshot = directory.snapshot();
    let Freshness::Stale { since, reason, .. } = snapshot.freshness() else {
        unreachable!("not live");
    };
    assert!(*since >= before && *since <= SystemTime::now());
    assert!(reason.contains("services/greeter/"), "{reason}");
    assert_eq!(listing(&snapshot), ["one=10.0.0.1:80"]);
    let young = snapshot.freshness().age();
    wait_until("the age grows", async || {
        directory.snapshot().freshness().age() > young + Duration::from_secs(2)
    })
    .await;
    // The age counts from the loss, through all attempts to reconnect.
    assert_eq!(directory.snapshot().freshness(), snapshot.freshness());
    assert_eq!(listing(&directory.snapshot()), ["one=10.0.0.1:80"]);

    etcd.start_again().await?;
    wait_until("it is live again", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;
    assert_eq!(listing(&directory.snapshot()), ["one=10.0.0.1:80"]);
    put(&client, "two", "10.0.0.2:80").await?;
    wait_until("changes are seen again", async || {
        directory.snapshot().len() == 2
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn wiped_etcd_is_followed() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for _ in 0..20 {
        put(&client, "ghost", "10.0.0.1:80").await?;
    }
    let directory = Directory::watch(&client, "greeter").await?;
    let before = directory.snapshot().revision();

    etcd.wipe_and_restart().await?;
    put(&client, "newborn", "10.0.0.2:80").await?;
    let newborn = ["newborn=10.0.0.2:80"];
    wait_until("the new history is shown", async || {
        listing(&directory.snapshot()) == newborn
    })
    .await;
    assert!(directory.snapshot().revision() < before);
    put(&client, "second", "10.0.0.3:80").await?;
    wait_until("the next change is shown", async || {
        directory.snapshot().len() == 2
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn dropping_the_last_handle_ends_the_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    let changes = directory.changes();
    let discovery = directory.discover();
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    drop(directory);
    // The stream, the discovery and the channel each keep the directory alive.
    put(&client, "one", "10.0.0.1:80").await?;
    let mut changes = changes.skip_while(|snapshot| std::future::ready(snapshot.is_empty()));
    assert_eq!(
        wait_for("the instance", changes.next())
            .await
            .map(|snapshot| snapshot.len()),
        Some(1)
    );
    wait_until("one watch is open", async || {
        watcher_count(&etcd).await.unwrap() == 1
    })
    .await;
    drop(changes);
    drop(discovery);
    drop(channel);
    wait_until("no watch is open", async || {
        watcher_count(&etcd).await.unwrap() == 0
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn list_larger_than_a_message_is_shown() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    // 6 MB in total; a message holds 2 MiB.
    let metadata = "m".repeat(20_000);
    for number in 0..300 {
        let value = format!(
            r#"{{"Op":0,"Addr":"10.0.0.1:{}","Metadata":"{metadata}"}}"#,
            number + 1
        );
        client.put(key(&format!("{number}")), value, None).await?;
    }
    let directory = Directory::watch(&client, "greeter").await?;
    assert_eq!(directory.snapshot().len(), 300);
    Ok(())
}
