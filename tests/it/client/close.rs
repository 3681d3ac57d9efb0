//! `Client::close`: calls in progress end, and locks are given back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use goo_etcd::testing::{Etcd, EtcdCluster};
use goo_etcd::{Client, Directory, Error, Instance, Registrar, Result, TxnOp};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{PATIENCE, TestResult, config, connect, leases, wait_for, wait_until};

/// Longer than any test, so that a lock that is free was given back and did not expire.
const LONG_TTL: Duration = Duration::from_secs(600);

/// The number of kinds of calls that [`make_call`] knows.
const CALL_KINDS: usize = 20;

/// Makes one call of a kind. A stream is followed to its first item.
async fn make_call(kind: usize, client: &Client, endpoint: &str) -> Result<()> {
    let name = format!("k{}", fastrand::u8(..));
    let ttl = LONG_TTL;
    match kind % CALL_KINDS {
        0 => client.put(name, "1", None).await.map(drop),
        1 => client.get(name, None).await.map(drop),
        2 => client.delete(name, None).await.map(drop),
        3 => {
            let put = TxnOp::put(name, "1", None);
            client.txn().and_then([put]).commit().await.map(drop)
        }
        4 => client.grant(60).await.map(drop),
        5 => client.revoke(client.grant(60).await?.id()).await.map(drop),
        6 => {
            let lease = client.grant(60).await?.id();
            client.lease_time_to_live(lease, None).await.map(drop)
        }
        7 => {
            let lease = client.grant(60).await?.id();
            client.keep_alive_once(lease).await.map(drop)
        }
        8 => {
            let lease = client.grant(60).await?.id();
            let mut kept = client.keep_alive(lease).await?;
            kept.next().await.expect("a response").map(drop)
        }
        9 => {
            let mut watch = client.watch(name.as_str(), None).await?;
            client.put(name, "1", None).await?;
            watch.next().await.expect("an event").map(drop)
        }
        10 => client.lock(name, ttl).await?.unlock().await,
        11 => match client.try_lock(name, ttl).await? {
            Some(lock) => lock.unlock().await,
            None => Ok(()),
        },
        12 => client.campaign(name, "me", ttl).await?.resign().await,
        13 => client.leader(name).await.map(drop),
        14 => {
            let mut leaders = client.observe(name.as_str());
            let leader = client.campaign(name, "me", ttl).await?;
            leaders.next().await.expect("a leader").map(drop)?;
            leader.resign().await
        }
        15 => client.ping().await,
        16 => client.status(endpoint).await.map(drop),
        17 => client.member_list().await.map(drop),
        18 => {
            let registrar = Registrar::new(client);
            let instance = Instance::new(name, "10.0.0.1:80");
            registrar.register(instance).await?.deregister().await
        }
        _ => Directory::watch(client, name).await.map(drop),
    }
}

/// No call ends with `Cancelled`, the status of the service beneath the client.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_call_during_close_ends_with_closed() -> TestResult {
    let etcd = Etcd::start().await?;
    let closed = Arc::new(AtomicUsize::new(0));
    for round in 0..30 {
        let client = connect(etcd.endpoint()).await;
        let mut calls = JoinSet::new();
        for kind in 0..100 {
            let (client, endpoint, closed) = (client.clone(), etcd.endpoint(), closed.clone());
            calls.spawn(async move {
                loop {
                    match make_call(kind, &client, &endpoint).await {
                        Ok(()) => {}
                        Err(Error::Closed { .. }) => break closed.fetch_add(1, Ordering::Relaxed),
                        Err(error) => panic!("call {}: {error:?}", kind % CALL_KINDS),
                    }
                }
            });
        }
        sleep(Duration::from_millis(round * 7 % 50)).await;
        client.close().await?;
        while let Some(ended) = wait_for("the end of a call", calls.join_next()).await {
            ended?;
        }
    }
    assert_eq!(closed.load(Ordering::Relaxed), 3_000);
    Ok(())
}

/// Waits until another client has the lock `l` and leads the election `e`.
async fn take_over(etcd: &Etcd) -> TestResult {
    let other = connect(etcd.endpoint()).await;
    let lock = wait_for("the lock", other.lock("l", LONG_TTL)).await?;
    let leader = wait_for("the election", other.campaign("e", "other", LONG_TTL)).await?;
    assert!(lock.is_held() && leader.is_held());
    lock.unlock().await?;
    leader.resign().await?;
    Ok(())
}

#[tokio::test]
async fn locks_and_leaderships_are_given_back() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", LONG_TTL).await?;
    let leader = client.campaign("e", "me", LONG_TTL).await?;
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.lock("l", LONG_TTL).await.map(drop) }
    });
    wait_until("three leases are granted", async || {
        leases(&etcd).await.unwrap().len() == 3
    })
    .await;

    client.close().await?;

    assert!(!lock.is_held() && !leader.is_held());
    for lost in [lock.lost().await, leader.lost().await] {
        assert!(matches!(lost, Error::Closed { .. }), "{lost}");
    }
    let waited = wait_for("the waiter ends", waiting).await?;
    assert!(matches!(waited, Err(Error::Closed { .. })), "{waited:?}");
    assert!(leases(&etcd).await?.is_empty());
    take_over(&etcd).await
}

#[tokio::test]
async fn lock_dropped_just_before_is_given_back() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    drop(client.lock("l", LONG_TTL).await?);
    drop(client.campaign("e", "me", LONG_TTL).await?);
    client.close().await?;
    assert!(leases(&etcd).await?.is_empty());
    take_over(&etcd).await
}

#[tokio::test]
async fn lock_is_given_back_beside_a_hung_member() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let leader = cluster.leader().await?;
    for hung in (0..3).filter(|member| *member != leader) {
        let client = Client::connect("test", config(cluster.endpoints())).await?;
        let lock = client.lock("l", LONG_TTL).await?;
        cluster.member(hung).pause().await?;
        client.close().await?;
        assert!(!lock.is_held());
        let other = connect(cluster.member(leader).endpoint()).await;
        let free = wait_for("the lock", other.lock("l", LONG_TTL)).await?;
        free.unlock().await?;
        cluster.member(hung).resume()?;
    }
    Ok(())
}

/// A lock whose etcd hangs stays for its TTL, but `close` returns.
#[tokio::test]
async fn is_bounded_while_etcd_hangs() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", LONG_TTL).await?;
    etcd.pause().await?;
    timeout(PATIENCE, client.close()).await??;
    assert!(!lock.is_held());
    // Closing again does not wait for etcd.
    client.close().now_or_never().ok_or("waits")??;
    etcd.resume()?;
    Ok(())
}

/// Dropping the future of `close` closes the connections.
#[tokio::test]
async fn dropped_call_still_closes() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", LONG_TTL).await?;
    let mut raw = client.client();
    etcd.pause().await?;
    assert!(
        timeout(Duration::from_millis(50), client.close())
            .await
            .is_err()
    );
    assert!(client.is_closed() && !lock.is_held());
    etcd.resume()?;
    assert!(
        wait_for("the raw call", raw.get("key", None))
            .await
            .is_err()
    );
    Ok(())
}
