//! Losing a lock without a message from etcd: the clock, and overwritten keys.

use std::time::Duration;

use futures::FutureExt;
use goo_etcd::testing::Etcd;
use goo_etcd::{Error, GetOptions};
use tokio::runtime::Runtime;
use tokio::time::sleep;

use super::TTL;
use crate::support::{TestResult, connect, wait_for, wait_until};

/// The shortest TTL that etcd grants by default.
const SHORT_TTL: Duration = Duration::from_secs(2);

/// Long enough that even a machine which stalls renews the leases in time.
const SAFE_TTL: Duration = Duration::from_secs(8);

/// A process that is stopped, or whose runtime is blocked, cannot renew its leases. The runtime of
/// this test has one thread, which waits until another client has the lock.
#[tokio::test]
async fn blocked_runtime_does_not_hide_the_loss() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", SAFE_TTL).await?;
    let leader = client.campaign("e", "me", SAFE_TTL).await?;
    let mut waiting = std::pin::pin!(lock.lost());
    assert!((&mut waiting).now_or_never().is_none());

    let endpoint = etcd.endpoint();
    let others = std::thread::spawn(move || {
        Runtime::new().unwrap().block_on(async {
            let other = connect(endpoint).await;
            let lock = wait_for("the lock", other.lock("l", TTL)).await.unwrap();
            let leader = wait_for("the election", other.campaign("e", "other", TTL))
                .await
                .unwrap();
            assert!(lock.is_held() && leader.is_held());
        });
    });
    others.join().map_err(|_| "the other client failed")?;

    // No task of this runtime has run since.
    assert!(!lock.is_held() && !leader.is_held());
    for lost in [(&mut waiting).now_or_never(), leader.lost().now_or_never()] {
        let cause = lost.ok_or("still waiting")?;
        assert!(
            matches!(&cause, Error::LeaseUnconfirmed { after, .. } if *after >= SAFE_TTL),
            "{cause}"
        );
    }
    let late = leader
        .proclaim("late")
        .now_or_never()
        .ok_or("still waiting")?;
    assert!(
        matches!(late, Err(Error::LeaseUnconfirmed { .. })),
        "{late:?}"
    );
    Ok(())
}

/// A lock that the clock ended stays lost, although its lease survives in etcd.
#[tokio::test]
async fn lock_that_was_lost_is_not_held_again() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", SHORT_TTL).await?;
    etcd.pause().await?;
    wait_until("the loss", async || !lock.is_held()).await;
    etcd.resume()?;
    wait_until("etcd responds", async || client.ping().await.is_ok()).await;
    for _ in 0..10 {
        assert!(!lock.is_held());
        sleep(SHORT_TTL / 10).await;
    }
    let cause = wait_for("the loss", lock.lost()).await;
    assert!(matches!(cause, Error::LeaseUnconfirmed { .. }), "{cause}");
    lock.unlock().await?;
    Ok(())
}

/// An overwritten key no longer ends with the lease, so the lock would never be free again.
///
/// From etcd 3.7 on the response to a keys-only range carries no lease (etcd#22209). With
/// such reads, every key would look like an overwritten one.
#[tokio::test]
async fn overwritten_key_ends_lock_and_wait() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", TTL).await?;
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.lock("l", TTL).await }
    });
    let all = || GetOptions::new().with_prefix();
    wait_until("two entries", async || {
        client.get("l/", all()).await.unwrap().count() == 2
    })
    .await;
    let queue = client.get("l/", all()).await?;
    let waiter = queue.kvs().iter().find(|entry| entry.key() != lock.key());
    client
        .put(waiter.ok_or("no waiter")?.key(), "mine", None)
        .await?;
    let cause = wait_for("the end of the wait", waiting).await?.unwrap_err();
    assert!(matches!(cause, Error::KeyLost { .. }), "{cause}");
    let next = tokio::spawn({
        let client = client.clone();
        async move { client.lock("l", TTL).await }
    });
    sleep(Duration::from_millis(100)).await;
    assert!(!next.is_finished());
    client.put(lock.key(), "mine", None).await?;
    let cause = wait_for("the loss", lock.lost()).await;
    assert!(matches!(cause, Error::KeyLost { .. }), "{cause}");
    assert!(!lock.is_held());
    let next = wait_for("the next lock", next).await??;
    assert!(next.is_held());
    next.unlock().await?;
    Ok(())
}

#[tokio::test]
async fn own_value_is_not_taken_for_a_loss() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let leader = client.campaign("e", "0", TTL).await?;
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.campaign("e", "next", TTL).await }
    });
    for value in 1..50 {
        leader.proclaim(value.to_string()).await?;
    }
    assert!(leader.is_held() && !waiting.is_finished());
    leader.resign().await?;
    wait_for("the next leader", waiting)
        .await??
        .resign()
        .await?;
    Ok(())
}
