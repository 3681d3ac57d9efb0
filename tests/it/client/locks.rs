//! Locks, elections, and rarer uses of leases.

mod etcd_service;
mod loss;
mod other_keys;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{PATIENCE, TestResult, connect, leases, wait_for, wait_until};
use futures::StreamExt;
use goo_etcd::etcd_client::{AlarmAction, AlarmType, LeaseTimeToLiveOptions, LockOptions};
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error, GetOptions, KeyValue, PutOptions, TxnOp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tonic::Code;

/// Longer than any test, so that a lock that becomes free did not expire.
const TTL: Duration = Duration::from_secs(600);

#[tokio::test]
async fn lock_is_exclusive_while_members_restart() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let mut config = Config::default();
    config.endpoints = cluster.endpoints();
    config.dial_timeout = PATIENCE;
    let client = Client::new("main", config).await?;
    let inside = Arc::new(AtomicUsize::new(0));
    let done = Arc::new(AtomicUsize::new(0));
    let enough = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (client, inside, done) = (client.clone(), inside.clone(), done.clone());
        let enough = enough.clone();
        tasks.spawn(async move {
            while !enough.load(Ordering::SeqCst) {
                let lock = client.lock("busy", Duration::from_secs(30)).await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                sleep(Duration::from_millis(20)).await;
                assert!(lock.is_held());
                assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                done.fetch_add(1, Ordering::SeqCst);
                lock.unlock().await.unwrap();
            }
        });
    }
    for member in cluster.members().iter().take(2) {
        let before = done.load(Ordering::SeqCst);
        wait_until("the lock is taken again", async || {
            done.load(Ordering::SeqCst) > before
        })
        .await;
        member.kill().await?;
        member.start_again().await?;
    }
    let before = done.load(Ordering::SeqCst);
    wait_until("the lock is taken again", async || {
        done.load(Ordering::SeqCst) > before
    })
    .await;
    enough.store(true, Ordering::SeqCst);
    while let Some(ended) = timeout(PATIENCE * 3, tasks.join_next()).await? {
        ended?;
    }
    Ok(())
}

/// A new leader may not have applied a grant yet that another member has confirmed.
#[tokio::test]
async fn new_leases_are_found_after_a_change_of_leader() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let mut config = Config::default();
    config.endpoints = cluster.endpoints();
    config.dial_timeout = PATIENCE;
    let client = Client::new("main", config).await?;
    let confirmed = Arc::new(AtomicUsize::new(0));
    let enough = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (client, confirmed, enough) = (client.clone(), confirmed.clone(), enough.clone());
        tasks.spawn(async move {
            while !enough.load(Ordering::SeqCst) {
                let Ok(granted) = client.grant(60).await else {
                    continue;
                };
                match client.keep_alive_once(granted.id()).await {
                    Ok(_) => drop(confirmed.fetch_add(1, Ordering::SeqCst)),
                    Err(error) => assert!(!matches!(error, Error::LeaseNotFound { .. }), "{error}"),
                }
            }
        });
    }
    for member in cluster.members() {
        let before = confirmed.load(Ordering::SeqCst);
        wait_until("leases are granted", async || {
            confirmed.load(Ordering::SeqCst) > before + 50
        })
        .await;
        member.kill().await?;
        member.start_again().await?;
    }
    enough.store(true, Ordering::SeqCst);
    while let Some(ended) = timeout(PATIENCE * 3, tasks.join_next()).await? {
        ended?;
    }
    Ok(())
}

#[tokio::test]
async fn waiters_get_the_lock_in_order() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let first = client.lock("l", Duration::from_secs(10)).await?;
    assert!(
        client
            .try_lock("l", Duration::from_secs(10))
            .await?
            .is_none()
    );
    let second = tokio::spawn({
        let client = client.clone();
        async move { client.lock("l", Duration::from_secs(10)).await }
    });
    wait_until("it is in the queue", async || {
        let prefix = GetOptions::new().with_prefix();
        client.get("l/", prefix).await.unwrap().count() == 2
    })
    .await;
    // A caller of etcd's own lock service waits third in the queue.
    let lease = client.grant(60).await?.id();
    let mut raw = etcd.client().await?;
    let third = tokio::spawn(async move {
        raw.lock("l", Some(LockOptions::new().with_lease(lease)))
            .await
    });
    sleep(Duration::from_millis(300)).await;
    assert!(!second.is_finished() && !third.is_finished());

    let revision = first.revision();
    first.unlock().await?;
    let second = wait_for("the second lock", second).await??;
    assert!(second.revision() > revision);
    assert!(!third.is_finished());
    // Dropping a lock releases it.
    drop(second);
    wait_for("the third lock", third).await??;
    // A caller that stops waiting leaves the queue.
    assert!(
        timeout(
            Duration::from_millis(300),
            client.lock("l", Duration::from_secs(60))
        )
        .await
        .is_err()
    );
    wait_until("the queue has one lease", async || {
        leases(&etcd).await.unwrap() == [lease]
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn lost_lease_ends_the_lock() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", Duration::from_secs(3)).await?;
    let put_if_held = |lock: &goo_etcd::Lock| {
        let put = TxnOp::put("report", "mine", None);
        client
            .txn()
            .when([lock.ownership()])
            .and_then([put])
            .commit()
    };
    assert!(put_if_held(&lock).await?.succeeded());
    assert!(
        timeout(Duration::from_millis(100), lock.lost())
            .await
            .is_err()
    );
    let lease = leases(&etcd).await?[0];
    client.revoke(lease).await?;
    let cause = wait_for("the loss", lock.lost()).await;
    assert!(
        matches!(cause, Error::LeaseNotFound { id, .. } if id == lease),
        "{cause}"
    );
    assert!(!lock.is_held());
    assert!(!put_if_held(&lock).await?.succeeded());
    lock.unlock().await?;

    // After a whole TTL without etcd the lock may belong to another client.
    let lock = client.lock("l", Duration::from_secs(3)).await?;
    etcd.kill().await?;
    let cause = wait_for("the loss", lock.lost()).await;
    assert!(matches!(cause, Error::LeaseUnconfirmed { .. }), "{cause}");
    assert!(!lock.is_held());
    Ok(())
}

/// The key of the waiter behind `first` in the queue `l/`.
async fn find_waiter(client: &Client, first: &[u8]) -> TestResult<KeyValue> {
    let all = || GetOptions::new().with_prefix();
    wait_until("it is in the queue", async || {
        client.get("l/", all()).await.unwrap().count() == 2
    })
    .await;
    let queue = client.get("l/", all()).await?;
    let mut queue = queue.kvs().iter();
    Ok(queue
        .find(|kv| kv.key() != first)
        .ok_or("no waiter")?
        .clone())
}

/// The lease is renewed every 20 s, so a waiter that relied on renewals would fail late.
#[tokio::test]
async fn waiter_without_its_key_fails() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for deleted in [false, true] {
        for campaigns in [false, true] {
            let first = client.lock("l", Duration::from_secs(60)).await?;
            let waiting = tokio::spawn({
                let client = client.clone();
                async move {
                    if campaigns {
                        client
                            .campaign("l", "me", Duration::from_secs(60))
                            .await
                            .map(drop)
                    } else {
                        client.lock("l", Duration::from_secs(60)).await.map(drop)
                    }
                }
            });
            let entry = find_waiter(&client, first.key()).await?;
            if deleted {
                client.delete(entry.key(), None).await?;
            } else {
                client.revoke(entry.lease()).await?;
            }
            first.unlock().await?;
            let cause = wait_for("the end", waiting).await?.unwrap_err();
            let lease = entry.lease();
            if deleted {
                assert_eq!(cause.code(), Some(Code::FailedPrecondition), "{cause}");
                assert!(cause.to_string().contains(entry.key_str()?), "{cause}");
            } else {
                assert!(
                    matches!(cause, Error::LeaseNotFound { id, .. } if id == lease),
                    "{cause}"
                );
            }
            wait_until("all leases are revoked", async || {
                leases(&etcd).await.unwrap().is_empty()
            })
            .await;
        }
    }
    Ok(())
}

#[tokio::test]
async fn deleted_key_ends_lock_and_leadership() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", Duration::from_secs(60)).await?;
    client.delete(lock.key(), None).await?;
    let cause = timeout(Duration::from_secs(10), lock.lost()).await?;
    assert_eq!(cause.code(), Some(Code::FailedPrecondition), "{cause}");
    assert!(!lock.is_held());
    // The next caller does not wait for the old lease.
    let next = client
        .try_lock("l", Duration::from_secs(60))
        .await?
        .ok_or("not free")?;
    assert!(next.is_held());
    lock.unlock().await?;
    assert!(next.is_held());

    let leader = client.campaign("e", "me", Duration::from_secs(60)).await?;
    leader.proclaim("still me").await?;
    assert!(leader.is_held());
    client.delete(leader.key(), None).await?;
    let cause = timeout(Duration::from_secs(10), leader.lost()).await?;
    assert_eq!(cause.code(), Some(Code::FailedPrecondition), "{cause}");
    assert!(!leader.is_held());
    let late = leader.proclaim("me again").await.unwrap_err();
    assert_eq!(late.code(), Some(Code::FailedPrecondition), "{late}");
    assert!(client.leader("e").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn disconnected_holder_learns_of_the_loss_first() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let lock = connect(proxy.endpoint())
        .await
        .lock("l", Duration::from_secs(10))
        .await?;
    proxy.cut().await;
    let other = connect(etcd.endpoint()).await;
    let theirs = wait_for("the lock", async {
        loop {
            // On a busy machine an attempt may time out.
            if let Ok(Some(theirs)) = other.try_lock("l", Duration::from_secs(10)).await {
                return theirs;
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(theirs.is_held() && !lock.is_held());
    let cause = wait_for("the loss", lock.lost()).await;
    assert!(
        matches!(&cause, Error::LeaseUnconfirmed { after, .. } if after.as_secs() >= 10),
        "{cause}"
    );
    // Reconnecting does not return the lock.
    proxy.restore().await?;
    assert!(!lock.is_held());
    lock.unlock().await?;
    assert!(theirs.is_held());
    Ok(())
}

/// Starts a proxy to etcd that loses the response to one grant: of this lease. Returns its address,
/// and whether the response has been lost.
async fn start_losing_proxy(etcd: &Etcd, lease: i64) -> TestResult<(String, Arc<AtomicBool>)> {
    // The lease id as field 2 of a message. Only a grant has the id as its second field.
    let mut pattern = vec![0x10];
    let mut rest = lease.unsigned_abs();
    while rest >= 0x80 {
        pattern.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    pattern.push(rest as u8);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (address, target) = (
        listener.local_addr()?.to_string(),
        etcd.endpoint().to_owned(),
    );
    let is_lost = Arc::new(AtomicBool::new(false));
    let lost = is_lost.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(&target).await.unwrap();
            let (pattern, lost) = (pattern.clone(), lost.clone());
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let down =
                    tokio::spawn(
                        async move { tokio::io::copy(&mut from_server, &mut to_client).await },
                    );
                let mut piece = vec![0; 1 << 14];
                while let Ok(read @ 1..) = from_client.read(&mut piece).await {
                    let is_grant = piece[..read].windows(pattern.len()).any(|w| w == pattern);
                    if is_grant && !lost.swap(true, Ordering::SeqCst) {
                        down.abort();
                        to_server.write_all(&piece[..read]).await.unwrap();
                        sleep(Duration::from_millis(300)).await;
                        return;
                    }
                    if to_server.write_all(&piece[..read]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok((address, is_lost))
}

/// The client probes whether a lease is gone by granting one with its id. That probe must not be
/// taken for the lost lease.
#[tokio::test]
async fn lost_probe_response_creates_no_lease() -> TestResult {
    let etcd = Etcd::start().await?;
    let direct = connect(etcd.endpoint()).await;
    for ttl in [2, 3, 60] {
        let lease = direct.grant(ttl).await?.id();
        direct.revoke(lease).await?;
        let (proxy, is_lost) = start_losing_proxy(&etcd, lease).await?;
        let once = connect(proxy)
            .await
            .keep_alive_once(lease)
            .await
            .unwrap_err();
        assert!(
            matches!(once, Error::LeaseNotFound { id, .. } if id == lease),
            "{once}"
        );
        assert!(is_lost.load(Ordering::SeqCst));
        assert!(leases(&etcd).await?.is_empty());
    }
    Ok(())
}

#[tokio::test]
async fn lost_probe_response_ends_the_keep_alive() -> TestResult {
    let etcd = Etcd::start().await?;
    let direct = connect(etcd.endpoint()).await;
    let lease = direct.grant(3).await?.id();
    let (proxy, is_lost) = start_losing_proxy(&etcd, lease).await?;
    let client = connect(proxy).await;
    let mut kept = client.keep_alive(lease).await?;
    direct.revoke(lease).await?;
    let end = wait_for("the end of the keep-alive", async {
        loop {
            match kept.next().await {
                // Before the loss is noticed, and while the probe has no response.
                Some(Ok(response)) => assert_eq!(response.ttl(), 3),
                Some(Err(Error::LeaseUnconfirmed { .. })) => {}
                end => return end,
            }
        }
    })
    .await;
    assert!(
        matches!(end, Some(Err(Error::LeaseNotFound { id, .. })) if id == lease),
        "{end:?}"
    );
    assert!(is_lost.load(Ordering::SeqCst));
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn full_etcd_still_reports_missing_leases() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lease = client.grant(3).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    let lock = client.lock("l", Duration::from_secs(3)).await?;
    etcd.client()
        .await?
        .alarm(AlarmAction::Activate, AlarmType::Nospace, None)
        .await?;
    let full = client.grant(60).await.unwrap_err();
    assert_eq!(full.code(), Some(Code::ResourceExhausted), "{full}");
    for lease in leases(&etcd).await? {
        client.revoke(lease).await?;
    }
    let gone = |error: &Error| matches!(error, Error::LeaseNotFound { .. });
    let cause = wait_for("the loss", lock.lost()).await;
    assert!(gone(&cause), "{cause}");
    let once = client.keep_alive_once(lease).await.unwrap_err();
    assert!(gone(&once), "{once}");
    let end = wait_for("the end", async {
        loop {
            if let Err(error) = kept.next().await.unwrap() {
                return error;
            }
        }
    })
    .await;
    assert!(gone(&end), "{end}");
    Ok(())
}

#[tokio::test]
async fn invalid_lease_ids_are_refused() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for id in [0, -1, i64::MIN] {
        for error in [
            client.keep_alive_once(id).await.unwrap_err(),
            client.keep_alive(id).await.unwrap_err(),
            client.revoke(id).await.unwrap_err(),
            client.lease_time_to_live(id, None).await.unwrap_err(),
            client.grant_with_id(id, 60).await.unwrap_err(),
        ] {
            assert!(
                matches!(&error, Error::Invalid { field: "id", value, .. } if *value == id.to_string()),
                "{error}"
            );
        }
    }
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn lock_ttl_is_rounded_up_and_validated() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", Duration::from_millis(2_001)).await?;
    let lease = leases(&etcd).await?[0];
    let granted = client.lease_time_to_live(lease, None).await?;
    assert_eq!(granted.granted_ttl(), 3);
    lock.unlock().await?;

    for ttl in [Duration::ZERO, Duration::MAX] {
        let given = format!("{ttl:?}");
        for error in [
            client.lock("l", ttl).await.unwrap_err(),
            client.try_lock("l", ttl).await.unwrap_err(),
            client.campaign("e", "me", ttl).await.unwrap_err(),
        ] {
            assert!(
                matches!(&error, Error::Invalid { field: "ttl", value, .. } if *value == given),
                "{error}"
            );
        }
    }
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn election_is_observed() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut leaders = client.observe("e");
    let mut next = async || {
        let leader = wait_for("a leader", leaders.next()).await.unwrap().unwrap();
        leader.value_str().unwrap().to_owned()
    };
    assert!(client.leader("e").await?.is_none());
    let first = client
        .campaign("e", "first", Duration::from_secs(10))
        .await?;
    assert_eq!(next().await, "first");
    let second = tokio::spawn({
        let client = client.clone();
        async move {
            client
                .campaign("e", "second", Duration::from_secs(10))
                .await
        }
    });
    first.proclaim("first still").await?;
    assert_eq!(next().await, "first still");
    let leader = client.leader("e").await?.ok_or("a leader")?;
    assert_eq!(
        (leader.key(), leader.value()),
        (first.key(), &b"first still"[..])
    );
    assert!(!second.is_finished());

    let old = first.ownership();
    first.resign().await?;
    let second = wait_for("the second leader", second).await??;
    assert_eq!(next().await, "second");
    assert!(!client.txn().when([old]).commit().await?.succeeded());
    let lease = leases(&etcd).await?[0];
    client.revoke(lease).await?;
    wait_for("the loss", second.lost()).await;
    let late = second.proclaim("late").await.unwrap_err();
    assert!(matches!(late, Error::LeaseNotFound { .. }), "{late}");
    client.close().await?;
    let end = wait_for("the end", leaders.next()).await;
    assert!(matches!(end, Some(Err(Error::Closed { .. }))), "{end:?}");
    Ok(())
}

#[tokio::test]
async fn leases_are_listed_with_ttl_and_keys() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    assert_eq!(client.grant_with_id(0x77, 60).await?.id(), 0x77);
    let again = client.grant_with_id(0x77, 60).await.unwrap_err();
    assert_eq!(again.code(), Some(Code::FailedPrecondition), "{again}");
    assert!(client.grant_with_id(0, 60).await.is_err());
    let on_lease = PutOptions::new().with_lease(0x77);
    client.put("key", "1", on_lease).await?;
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let lease = client.lease_time_to_live(0x77, options).await?;
    assert_eq!(
        (lease.granted_ttl(), lease.keys()),
        (60, &[b"key".to_vec()][..])
    );
    assert!((1..=60).contains(&lease.ttl()), "{}", lease.ttl());
    assert_eq!(client.leases().await?.leases().len(), 1);
    let missing = client.lease_time_to_live(7, None).await.unwrap_err();
    assert!(
        matches!(missing, Error::LeaseNotFound { id: 7, .. }),
        "{missing}"
    );
    Ok(())
}
