//! Locks and elections, and the rest of what a client does with leases.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::etcd_client::{LeaseTimeToLiveOptions, LockOptions};
use goo_etcd::testing::{Etcd, EtcdCluster};
use goo_etcd::{Client, Config, Error, GetOptions, PutOptions, TxnOp};
use support::{PATIENCE, TestResult, connect, eventually, leases, soon};
use tokio::time::{sleep, timeout};

#[tokio::test]
async fn given_many_that_want_a_lock_then_each_holds_it_alone_while_members_die() -> TestResult {
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
                let lock = client.lock("busy", 30).await.unwrap();
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
        eventually("it goes on", async || done.load(Ordering::SeqCst) > before).await;
        member.kill().await?;
        member.start_again().await?;
    }
    let before = done.load(Ordering::SeqCst);
    eventually("it goes on", async || done.load(Ordering::SeqCst) > before).await;
    enough.store(true, Ordering::SeqCst);
    while let Some(ended) = timeout(PATIENCE * 3, tasks.join_next()).await? {
        ended?;
    }
    Ok(())
}

/// A leader answers from what it has applied, and another member may have told of the grant before.
#[tokio::test]
async fn given_leases_just_granted_then_none_is_said_to_be_gone_whoever_leads() -> TestResult {
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
        eventually("leases are granted", async || {
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
async fn given_a_lock_then_others_wait_for_it_those_of_etcd_too_and_get_it_in_turn() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let first = client.lock("l", 10).await?;
    assert!(client.try_lock("l", 10).await?.is_none());
    let second = tokio::spawn({
        let client = client.clone();
        async move { client.lock("l", 10).await }
    });
    eventually("it is in the queue", async || {
        let prefix = GetOptions::new().with_prefix();
        client.get("l/", prefix).await.unwrap().count() == 2
    })
    .await;
    // etcd's own lock service, third in turn.
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
    let second = soon("the second has it", second).await??;
    assert!(second.revision() > revision);
    assert!(!third.is_finished());
    // Dropped, it is given up as well.
    drop(second);
    soon("the third has it", third).await??;
    // And whoever gives up waiting leaves the queue.
    assert!(
        timeout(Duration::from_millis(300), client.lock("l", 60))
            .await
            .is_err()
    );
    eventually("nobody waits", async || {
        leases(&etcd).await.unwrap() == [lease]
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_a_lock_whose_lease_is_lost_then_it_says_so_and_its_guard_fails() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", 3).await?;
    let guarded = |lock: &goo_etcd::Lock| {
        let put = TxnOp::put("report", "mine", None);
        client.txn().when([lock.guard()]).and_then([put]).commit()
    };
    assert!(guarded(&lock).await?.succeeded());
    assert!(
        timeout(Duration::from_millis(100), lock.lost())
            .await
            .is_err()
    );
    let lease = leases(&etcd).await?[0];
    client.revoke(lease).await?;
    let why = soon("it is lost", lock.lost()).await;
    assert!(
        matches!(why, Error::LeaseNotFound { id } if id == lease),
        "{why}"
    );
    assert!(!lock.is_held());
    assert!(!guarded(&lock).await?.succeeded());
    lock.unlock().await?;

    // Cut off from etcd for the whole TTL, it may be somebody else's.
    let lock = client.lock("l", 3).await?;
    etcd.kill().await?;
    let why = soon("it is lost", lock.lost()).await;
    assert!(matches!(why, Error::LeaseUnconfirmed { .. }), "{why}");
    assert!(!lock.is_held());
    Ok(())
}

#[tokio::test]
async fn given_an_election_then_all_see_who_leads_with_which_value() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut leaders = client.observe("e");
    let mut next = async || {
        let leader = soon("a leader", leaders.next()).await.unwrap().unwrap();
        leader.value_str().unwrap().to_owned()
    };
    assert!(client.leader("e").await?.is_none());
    let first = client.campaign("e", "first", 10).await?;
    assert_eq!(next().await, "first");
    let second = tokio::spawn({
        let client = client.clone();
        async move { client.campaign("e", "second", 10).await }
    });
    first.proclaim("first still").await?;
    assert_eq!(next().await, "first still");
    let leader = client.leader("e").await?.ok_or("a leader")?;
    assert_eq!(
        (leader.key(), leader.value()),
        (first.key(), &b"first still"[..])
    );
    assert!(!second.is_finished());

    let of_old = first.guard();
    first.resign().await?;
    let second = soon("the second leads", second).await??;
    assert_eq!(next().await, "second");
    assert!(!client.txn().when([of_old]).commit().await?.succeeded());
    let lease = leases(&etcd).await?[0];
    client.revoke(lease).await?;
    soon("it is lost", second.lost()).await;
    let late = second.proclaim("late").await.unwrap_err();
    assert!(matches!(late, Error::LeaseNotFound { .. }), "{late}");
    client.close().await?;
    let end = soon("it ends", leaders.next()).await;
    assert!(matches!(end, Some(Err(Error::Closed { .. }))), "{end:?}");
    Ok(())
}

#[tokio::test]
async fn given_leases_then_they_are_listed_with_their_time_and_keys() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    assert_eq!(client.grant_with_id(0x77, 60).await?.id(), 0x77);
    let again = client.grant_with_id(0x77, 60).await.unwrap_err();
    assert_eq!(
        again.code(),
        Some(tonic::Code::FailedPrecondition),
        "{again}"
    );
    assert!(client.grant_with_id(0, 60).await.is_err());
    let on_lease = PutOptions::new().with_lease(0x77);
    client.put("key", "1", on_lease).await?;
    let options = LeaseTimeToLiveOptions::new().with_keys();
    let told = client.lease_time_to_live(0x77, options).await?;
    assert_eq!(
        (told.granted_ttl(), told.keys()),
        (60, &[b"key".to_vec()][..])
    );
    assert!((1..=60).contains(&told.ttl()), "{}", told.ttl());
    assert_eq!(client.leases().await?.leases().len(), 1);
    let missing = client.lease_time_to_live(7, None).await.unwrap_err();
    assert!(
        matches!(missing, Error::LeaseNotFound { id: 7 }),
        "{missing}"
    );
    Ok(())
}

/// All claims on the lock `l` but that of `first`.
async fn waiting(client: &Client, first: &goo_etcd::Lock) -> TestResult<Vec<goo_etcd::KeyValue>> {
    let options = GetOptions::new().with_prefix();
    let all = client.get("l/", options).await?;
    let others = all.kvs().iter().filter(|kv| kv.key() != first.key());
    Ok(others.cloned().collect())
}

#[tokio::test]
async fn given_a_waiter_whose_claim_is_gone_then_it_is_told_and_is_not_given_the_lock() -> TestResult
{
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for by_lease in [true, false] {
        let first = client.lock("l", 60).await?;
        let waiter = tokio::spawn({
            let client = client.clone();
            async move { client.lock("l", 60).await }
        });
        eventually("it waits", async || {
            waiting(&client, &first).await.unwrap().len() == 1
        })
        .await;
        // Its watch on the first is open.
        eventually("it watches", async || {
            support::watchers(&etcd).await.unwrap() == 1
        })
        .await;
        let theirs = waiting(&client, &first).await?.remove(0);
        if by_lease {
            client.revoke(theirs.lease()).await?;
        } else {
            client.delete(theirs.key(), None).await?;
        }
        first.unlock().await?;
        let ended = soon("it ends", waiter).await?;
        assert!(
            matches!(ended, Err(Error::LeaseNotFound { id }) if id == theirs.lease()),
            "{ended:?}"
        );
        let other = client.try_lock("l", 60).await?.ok_or("it is free")?;
        other.unlock().await?;
    }
    Ok(())
}

#[tokio::test]
async fn given_a_holder_that_is_cut_off_when_another_has_the_lock_then_it_knows() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = goo_etcd::testing::Proxy::start(etcd.endpoint()).await?;
    let (cut_off, other) = (
        connect(proxy.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let first = cut_off.lock("l", 6).await?;
    proxy.cut().await;
    let second = soon("another has it", async {
        loop {
            if let Some(lock) = other.try_lock("l", 6).await? {
                return TestResult::Ok(lock);
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await?;
    assert!(!first.is_held(), "two hold it");
    assert!(second.is_held());
    Ok(())
}

/// What asks whether a lease is there may leave one behind where there was none.
#[tokio::test]
async fn given_another_lease_in_the_place_of_one_that_is_gone_then_its_loss_is_told_all_the_same()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lease = client.grant(6).await?.id();
    client
        .put("k", "v", PutOptions::new().with_lease(lease))
        .await?;
    let mut kept = client.keep_alive(lease).await?;
    client.revoke(lease).await?;
    client.grant_with_id(lease, 61).await?;
    let end = soon("it ends", async {
        loop {
            match kept.next().await {
                Some(Ok(_)) => {}
                end => return end,
            }
        }
    })
    .await;
    assert!(
        matches!(end, Some(Err(Error::LeaseNotFound { id })) if id == lease),
        "{end:?}"
    );
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn given_a_lease_id_that_cannot_be_then_nothing_is_sent_and_the_error_names_it() -> TestResult
{
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for id in [0, -1] {
        let errors = [
            client.keep_alive(id).await.map(drop).unwrap_err(),
            client.keep_alive_once(id).await.map(drop).unwrap_err(),
            client.revoke(id).await.map(drop).unwrap_err(),
            client
                .lease_time_to_live(id, None)
                .await
                .map(drop)
                .unwrap_err(),
        ];
        for error in errors {
            let text = error.to_string();
            assert!(text.starts_with(&format!("invalid id \"{id}\"")), "{text}");
        }
    }
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn given_an_etcd_without_room_then_a_lost_lease_is_told_all_the_same() -> TestResult {
    // So small that a few values fill it.
    let etcd = Etcd::builder()
        .args(["--quota-backend-bytes", "16777216"])
        .start()
        .await?;
    let client = connect(etcd.endpoint()).await;
    let lease = client.grant(6).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    let full = async {
        for n in 0.. {
            if client
                .put(format!("{n}"), vec![7; 1 << 20], None)
                .await
                .is_err()
            {
                return;
            }
        }
    };
    soon("it is full", full).await;
    client.revoke(lease).await?;
    let end = soon("it ends", async {
        while let Some(answer) = kept.next().await {
            if let Err(error) = answer {
                return Some(error);
            }
        }
        None
    })
    .await;
    assert!(matches!(end, Some(Error::LeaseNotFound { .. })), "{end:?}");
    Ok(())
}
