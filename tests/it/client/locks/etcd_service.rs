//! Locks and elections together with etcd's own services, which use the recipes of Go's
//! `concurrency`.

use std::time::Duration;

use goo_etcd::etcd_client::{LockOptions, ResignOptions};
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, GetOptions};
use tokio::time::sleep;

use super::TTL;
use crate::support::{TestResult, connect, wait_for, wait_until};

/// Waits until the queue `name` has `count` entries.
async fn wait_for_entries(client: &Client, name: &str, count: i64) {
    wait_until("the queue is as long as expected", async || {
        let all = GetOptions::new().with_prefix().with_count_only();
        let found = client.get(format!("{name}/"), all).await.unwrap();
        found.count() == count
    })
    .await;
}

/// The create revision of Go's `Mutex.Key()` is the number that corresponds to ours. Go's
/// `Mutex.Header().Revision`, which etcd's lock service returns in its header, is out of order.
#[tokio::test]
async fn create_revisions_order_all_holders() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let first = client.lock("l", TTL).await?;
    let mut raw = etcd.client().await?;
    let lease = client.grant(600).await?.id();
    let second = tokio::spawn(async move {
        let options = LockOptions::new().with_lease(lease);
        raw.lock("l", Some(options)).await
    });
    wait_for_entries(&client, "l", 2).await;
    let third = tokio::spawn({
        let client = client.clone();
        async move { client.lock("l", TTL).await }
    });
    wait_for_entries(&client, "l", 3).await;

    let first_revision = first.revision();
    first.unlock().await?;
    let second = wait_for("the second lock", second).await??;
    sleep(Duration::from_millis(100)).await;
    assert!(!third.is_finished());
    let key = client.get(second.key(), None).await?;
    let second_revision = key.kvs()[0].create_revision();
    let second_header = second.header().ok_or("no header")?.revision();
    client.revoke(lease).await?;
    let third = wait_for("the third lock", third).await??;

    assert!(first_revision < second_revision && second_revision < third.revision());
    assert!(second_header > third.revision(), "{second_header}");
    third.unlock().await?;
    Ok(())
}

#[tokio::test]
async fn elections_are_shared_with_etcds_own() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let ours = client.campaign("e", "ours", TTL).await?;
    let lease = client.grant(600).await?.id();
    let mut raw = etcd.client().await?;
    let theirs = tokio::spawn({
        let mut raw = raw.clone();
        async move { raw.campaign("e", "theirs", lease).await }
    });
    wait_for_entries(&client, "e", 2).await;
    let shown = raw.leader("e").await?;
    assert_eq!(shown.kv().ok_or("no leader")?.key(), ours.key());
    let next = tokio::spawn({
        let client = client.clone();
        async move { client.campaign("e", "next", TTL).await }
    });
    wait_for_entries(&client, "e", 3).await;

    ours.resign().await?;
    let theirs = wait_for("their leadership", theirs).await??;
    sleep(Duration::from_millis(100)).await;
    assert!(!next.is_finished());
    let leader = client.leader("e").await?.ok_or("no leader")?;
    assert_eq!(leader.value(), b"theirs");
    let key = theirs.leader().ok_or("no key")?.clone();
    assert_eq!(leader.key(), key.key());
    raw.resign(Some(ResignOptions::new().with_leader(key)))
        .await?;
    let next = wait_for("the next leadership", next).await??;
    let shown = raw.leader("e").await?;
    assert_eq!(shown.kv().ok_or("no leader")?.key(), next.key());
    next.resign().await?;
    Ok(())
}

/// Go waits for each key below the name. A Go client that waits so keeps its place in the queue.
#[tokio::test]
async fn waiting_lock_of_etcd_keeps_its_place() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client.put("l/config", "1", None).await?;
    let first = client.lock("l", TTL).await?;
    let lease = client.grant(600).await?.id();
    let mut raw = etcd.client().await?;
    let second = tokio::spawn(async move {
        let options = LockOptions::new().with_lease(lease);
        raw.lock("l", Some(options)).await
    });
    wait_for_entries(&client, "l", 3).await;
    first.unlock().await?;
    assert!(client.try_lock("l", TTL).await?.is_none());
    assert!(!second.is_finished());
    client.delete("l/config", None).await?;
    wait_for("their lock", second).await??;
    assert!(client.try_lock("l", TTL).await?.is_none());
    Ok(())
}
