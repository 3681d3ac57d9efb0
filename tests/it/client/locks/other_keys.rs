//! Keys below the name of a lock or an election that are no entries of its queue.

use std::time::Duration;

use futures::StreamExt;
use goo_etcd::etcd_client::LockOptions;
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, PutOptions, TxnOp};

use super::TTL;
use crate::support::{TestResult, call_count, config, connect, wait_for, wait_until};

/// How many keys are put in one transaction: etcd's default limit.
const TXN_OPS: usize = 128;

/// Applies an operation to each of `count` keys, with names by `key`.
async fn for_each_key(
    client: &Client,
    count: usize,
    key: impl Fn(usize) -> String,
    operation: impl Fn(String) -> TxnOp,
) -> TestResult {
    let operations: Vec<_> = (0..count).map(|i| operation(key(i))).collect();
    for operations in operations.chunks(TXN_OPS) {
        client.txn().and_then(operations.to_vec()).commit().await?;
    }
    Ok(())
}

async fn put_many(client: &Client, count: usize, key: impl Fn(usize) -> String) -> TestResult {
    for_each_key(client, count, key, |key| TxnOp::put(key, "1", None)).await
}

async fn lock_and_unlock(client: &Client) -> TestResult {
    let lock = client.try_lock("a", TTL).await?.ok_or("not free")?;
    lock.unlock().await?;
    Ok(())
}

/// How many reads etcd receives during `work`.
async fn count_reads(etcd: &Etcd, work: impl Future<Output = TestResult>) -> TestResult<u64> {
    let before = call_count(etcd, "Range").await?;
    work.await?;
    Ok(call_count(etcd, "Range").await? - before)
}

#[tokio::test]
async fn other_queues_and_keys_do_not_count() -> TestResult {
    let etcd = Etcd::start().await?;
    let (client, mut raw) = (connect(etcd.endpoint()).await, etcd.client().await?);
    // A client that holds locks with names inside of each other does not wait for itself.
    let inner = client.lock("a/b", TTL).await?;
    let slash = client.lock("a/", TTL).await?;
    let hex = client.lock("a/1f", TTL).await?;
    let lease = client.grant(600).await?.id();
    let options = LockOptions::new().with_lease(lease);
    let theirs = raw.lock("a/b/c", Some(options)).await?;
    for key in [
        "a/config", "a/", "a/1f", "a/cafe", "a/00", "a/-1", "a/zone", "a/1F",
    ] {
        client.put(key, "1", None).await?;
    }
    // The name of a lease, under another lease.
    let on_lease = PutOptions::new().with_lease(lease);
    client.put("a/beef", "1", on_lease).await?;

    let lock = client.try_lock("a", TTL).await?.ok_or("not free")?;
    assert!(client.try_lock("a", TTL).await?.is_none());
    for held in [&inner, &slash, &hex] {
        assert!(held.is_held());
        let name = held.key().rsplitn(2, |byte| *byte == b'/').last().unwrap();
        assert!(client.try_lock(name, TTL).await?.is_none());
    }
    assert!(client.try_lock("a/b/c", TTL).await?.is_none());
    lock.unlock().await?;
    raw.unlock(theirs.key()).await?;
    Ok(())
}

#[tokio::test]
async fn leader_of_another_election_is_not_shown() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client.put("e/config", "1", None).await?;
    let inner = client.campaign("e/f", "inner", TTL).await?;
    assert!(client.leader("e").await?.is_none());

    let mut leaders = client.observe("e");
    let mut first = tokio::spawn(async move { (leaders.next().await, leaders) });
    inner.proclaim("inner still").await?;
    client.put("e/cafe", "1", None).await?;
    let early = tokio::time::timeout(Duration::from_millis(300), &mut first).await;
    assert!(early.is_err(), "{early:?}");

    let outer = client.campaign("e", "outer", TTL).await?;
    let (shown, _) = wait_for("the leader", first).await?;
    let shown = shown.ok_or("the end")??;
    assert_eq!((shown.key(), shown.value()), (outer.key(), &b"outer"[..]));
    let leader = client.leader("e").await?.ok_or("no leader")?;
    assert_eq!(leader.key(), outer.key());
    let leader = client.leader("e/f").await?.ok_or("no leader")?;
    assert_eq!(leader.value(), b"inner still");
    inner.resign().await?;
    Ok(())
}

/// etcd filters neither by lease nor by form, so the keys between the entries are read or skipped.
#[tokio::test]
async fn many_other_keys_cost_few_reads() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    // A folder below the name is skipped.
    put_many(&client, 20_000, |i| format!("a/b/{i}")).await?;
    let with_leader = async {
        lock_and_unlock(&client).await?;
        assert!(client.leader("a").await?.is_none());
        Ok(())
    };
    let reads = count_reads(&etcd, with_leader).await?;
    assert!(reads <= 10, "{reads}");

    // Names that could be leases are read in pages.
    put_many(&client, 20_000, |i| format!("a/{i}")).await?;
    let reads = count_reads(&etcd, lock_and_unlock(&client)).await?;
    assert!(reads <= 40, "{reads}");
    Ok(())
}

/// A waiter and an observer do not read the queue again when other keys change.
#[tokio::test]
async fn changes_of_other_keys_cause_no_reads() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("a", TTL).await?;
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.lock("a", TTL).await }
    });
    let mut leaders = client.observe("a");
    wait_for("the leader", leaders.next())
        .await
        .ok_or("the end")??;
    let observing = tokio::spawn(async move { leaders.next().await });
    wait_until("the waiter is in the queue", async || {
        client.leases().await.unwrap().leases().len() == 2
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;

    let changes = async {
        let key = |i| format!("a/{i}");
        put_many(&client, 1_000, key).await?;
        for_each_key(&client, 1_000, key, |key| TxnOp::delete(key, None)).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(())
    };
    let reads = count_reads(&etcd, changes).await?;
    assert!(reads <= 5, "{reads}");
    assert!(!waiting.is_finished() && !observing.is_finished());

    lock.unlock().await?;
    wait_for("the lock", waiting).await??.unlock().await?;
    Ok(())
}

/// The values of other keys are read too, in pages that fit into messages.
#[tokio::test]
async fn large_values_fit_into_messages() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut config = config([etcd.endpoint()]);
    config.max_call_recv_msg_size = 1 << 20;
    let client = Client::connect("main", config).await?;
    for i in 1..40 {
        client
            .put(format!("a/{i}"), vec![b'x'; 200_000], None)
            .await?;
    }
    let lock = client.try_lock("a", TTL).await?.ok_or("not free")?;
    assert!(client.try_lock("a", TTL).await?.is_none());
    let leader = client.leader("a").await?.ok_or("no leader")?;
    assert_eq!(leader.key(), lock.key());
    lock.unlock().await?;
    Ok(())
}
