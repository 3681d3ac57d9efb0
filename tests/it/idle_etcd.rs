//! An etcd without changes for a long time, of the usual version and of the newest.

use std::time::Duration;

use crate::support::{TestResult, connect, key, value, wait_for, wait_until};
use futures::StreamExt;
use goo_etcd::{Directory, Snapshot, WatchOptions};
use tokio::time::timeout;

/// Longer than twice the time a stream may be silent: it may be reopened once, and must then stay
/// open.
const IDLE: Duration = Duration::from_secs(33);

#[tokio::test]
async fn watch_from_the_next_revision_is_kept() -> TestResult {
    let kept = crate::support::etcd_versions()
        .into_iter()
        .map(|builder| async {
            let etcd = builder.start().await?;
            let client = connect(etcd.endpoint()).await;
            let put = client.put("n", "0", None).await?;
            let next = put.header().map_or(0, |header| header.revision()) + 1;
            let from_next = WatchOptions::new().with_start_revision(next);
            let mut watch = client.watch("n", from_next).await?;
            // etcd may not respond to the first progress request; the watch is then reopened once.
            let idle = timeout(IDLE, watch.next()).await;
            assert!(idle.is_err(), "{idle:?}");
            let opened = crate::support::call_count(&etcd, "Watch").await?;
            assert!(opened <= 2, "{opened} streams");
            client.put("n", "1", None).await?;
            client.put("n", "2", None).await?;
            let mut seen = Vec::new();
            while seen.len() < 2 {
                let response = wait_for("an event", watch.next()).await.unwrap()?;
                let values = response.events().iter().filter_map(|event| event.kv());
                seen.extend(values.map(|kv| kv.value().to_vec()));
            }
            assert_eq!(seen, [b"1", b"2"]);
            TestResult::Ok(())
        });
    futures::future::try_join_all(kept).await?;
    Ok(())
}

#[tokio::test]
async fn directory_stays_live_and_lists_once() -> TestResult {
    let followed = crate::support::etcd_versions()
        .into_iter()
        .map(|builder| async {
            let etcd = builder.start().await?;
            let client = connect(etcd.endpoint()).await;
            client.put(key("one"), value("127.0.0.1:1"), None).await?;
            let directory = Directory::watch(&client, "greeter").await?;
            let lists = crate::support::call_count(&etcd, "Range").await?;
            let mut changes = directory.changes();
            while let Ok(Some(snapshot)) = timeout(IDLE, changes.next()).await {
                assert!(snapshot.freshness().is_live(), "{:?}", snapshot.freshness());
            }
            assert_eq!(crate::support::call_count(&etcd, "Range").await?, lists);
            client.put(key("two"), value("127.0.0.1:2"), None).await?;
            let both = |snapshot: &Snapshot| snapshot.instances().count() == 2;
            wait_until("both are shown", async || both(&directory.snapshot())).await;
            TestResult::Ok(())
        });
    futures::future::try_join_all(followed).await?;
    Ok(())
}
