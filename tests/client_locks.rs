//! Locks and elections, and the rest of what a client does with leases.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::etcd_client::{AlarmAction, AlarmType, LeaseTimeToLiveOptions, LockOptions};
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error, GetOptions, KeyValue, PutOptions, TxnOp};
use support::{PATIENCE, TestResult, connect, eventually, leases, soon};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tonic::Code;

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
        timeout(
            Duration::from_millis(300),
            client.lock("l", Duration::from_secs(60))
        )
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
    let lock = client.lock("l", Duration::from_secs(3)).await?;
    let guarded = |lock: &goo_etcd::Lock| {
        let put = TxnOp::put("report", "mine", None);
        client
            .txn()
            .when([lock.ownership()])
            .and_then([put])
            .commit()
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
    let lock = client.lock("l", Duration::from_secs(3)).await?;
    etcd.kill().await?;
    let why = soon("it is lost", lock.lost()).await;
    assert!(matches!(why, Error::LeaseUnconfirmed { .. }), "{why}");
    assert!(!lock.is_held());
    Ok(())
}

/// The key of whoever waits behind this one in the queue `l/`.
async fn waiting_behind(client: &Client, first: &[u8]) -> TestResult<KeyValue> {
    let all = || GetOptions::new().with_prefix();
    eventually("it is in the queue", async || {
        client.get("l/", all()).await.unwrap().count() == 2
    })
    .await;
    let queue = client.get("l/", all()).await?;
    let mut queue = queue.kvs().iter();
    Ok(queue.find(|kv| kv.key() != first).ok_or("it")?.clone())
}

/// With a lease that is renewed every 20 s: who relies on the renewals alone learns it late.
#[tokio::test]
async fn given_a_waiter_that_lost_its_place_then_it_ends_and_is_not_given_the_lock() -> TestResult {
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
            let place = waiting_behind(&client, first.key()).await?;
            if deleted {
                client.delete(place.key(), None).await?;
            } else {
                client.revoke(place.lease()).await?;
            }
            first.unlock().await?;
            let why = soon("it ends", waiting).await?.unwrap_err();
            let lease = place.lease();
            if deleted {
                assert_eq!(why.code(), Some(Code::FailedPrecondition), "{why}");
                assert!(why.to_string().contains(place.key_str()?), "{why}");
            } else {
                assert!(
                    matches!(why, Error::LeaseNotFound { id } if id == lease),
                    "{why}"
                );
            }
            eventually("nothing is left", async || {
                leases(&etcd).await.unwrap().is_empty()
            })
            .await;
        }
    }
    Ok(())
}

#[tokio::test]
async fn given_a_key_that_somebody_deletes_then_its_lock_or_leadership_is_lost_at_once()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lock = client.lock("l", Duration::from_secs(60)).await?;
    client.delete(lock.key(), None).await?;
    let why = timeout(Duration::from_secs(10), lock.lost()).await?;
    assert_eq!(why.code(), Some(Code::FailedPrecondition), "{why}");
    assert!(!lock.is_held());
    // The next one is not kept waiting for that lease.
    let next = client
        .try_lock("l", Duration::from_secs(60))
        .await?
        .ok_or("it is free")?;
    assert!(next.is_held());
    lock.unlock().await?;
    assert!(next.is_held());

    let leader = client.campaign("e", "me", Duration::from_secs(60)).await?;
    leader.proclaim("still me").await?;
    assert!(leader.is_held());
    client.delete(leader.key(), None).await?;
    let why = timeout(Duration::from_secs(10), leader.lost()).await?;
    assert_eq!(why.code(), Some(Code::FailedPrecondition), "{why}");
    assert!(!leader.is_held());
    let late = leader.proclaim("me again").await.unwrap_err();
    assert_eq!(late.code(), Some(Code::FailedPrecondition), "{late}");
    assert!(client.leader("e").await?.is_none());
    Ok(())
}

#[tokio::test]
async fn given_a_holder_cut_off_from_etcd_then_it_knows_before_another_has_the_lock() -> TestResult
{
    let etcd = Etcd::start().await?;
    let way = Proxy::start(etcd.endpoint()).await?;
    let lock = connect(way.endpoint())
        .await
        .lock("l", Duration::from_secs(10))
        .await?;
    way.cut().await;
    let other = connect(etcd.endpoint()).await;
    let theirs = soon("it is free", async {
        loop {
            // On a machine that is busy a try may take too long.
            if let Ok(Some(theirs)) = other.try_lock("l", Duration::from_secs(10)).await {
                return theirs;
            }
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(theirs.is_held() && !lock.is_held());
    let why = soon("it is lost", lock.lost()).await;
    assert!(
        matches!(&why, Error::LeaseUnconfirmed { after, .. } if after.as_secs() >= 10),
        "{why}"
    );
    // The way back does not give it back.
    way.restore().await?;
    assert!(!lock.is_held());
    lock.unlock().await?;
    assert!(theirs.is_held());
    Ok(())
}

/// A way to etcd on which the answer to one grant is lost: of the lease that is asked for. And whether it
/// has been.
async fn losing_a_grant(etcd: &Etcd, lease: i64) -> TestResult<(String, Arc<AtomicBool>)> {
    // Field 2 of a message: it is the second only of a grant.
    let mut sign = vec![0x10];
    let mut rest = lease.unsigned_abs();
    while rest >= 0x80 {
        sign.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    sign.push(rest as u8);
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
            let (sign, lost) = (sign.clone(), lost.clone());
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let down =
                    tokio::spawn(
                        async move { tokio::io::copy(&mut from_server, &mut to_client).await },
                    );
                let mut piece = vec![0; 1 << 14];
                while let Ok(read @ 1..) = from_client.read(&mut piece).await {
                    let is_it = piece[..read].windows(sign.len()).any(|w| w == sign);
                    if is_it && !lost.swap(true, Ordering::SeqCst) {
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

/// Whether a lease is gone is asked by granting it: what is granted then is not what was lost.
#[tokio::test]
async fn given_the_answer_is_lost_to_whether_a_lease_is_gone_then_no_renewal_finds_it() -> TestResult
{
    let etcd = Etcd::start().await?;
    let direct = connect(etcd.endpoint()).await;
    for ttl in [2, 3, 60] {
        let lease = direct.grant(ttl).await?.id();
        direct.revoke(lease).await?;
        let (way, is_lost) = losing_a_grant(&etcd, lease).await?;
        let once = connect(way).await.keep_alive_once(lease).await.unwrap_err();
        assert!(
            matches!(once, Error::LeaseNotFound { id } if id == lease),
            "{once}"
        );
        assert!(is_lost.load(Ordering::SeqCst));
        assert!(leases(&etcd).await?.is_empty());
    }
    Ok(())
}

#[tokio::test]
async fn given_the_answer_is_lost_to_whether_a_lease_is_gone_then_its_keep_alive_ends() -> TestResult
{
    let etcd = Etcd::start().await?;
    let direct = connect(etcd.endpoint()).await;
    let lease = direct.grant(3).await?.id();
    let (way, is_lost) = losing_a_grant(&etcd, lease).await?;
    let client = connect(way).await;
    let mut kept = client.keep_alive(lease).await?;
    direct.revoke(lease).await?;
    let end = soon("it is over", async {
        loop {
            match kept.next().await {
                // Until it is noticed, and as long as it is not known.
                Some(Ok(answer)) => assert_eq!(answer.ttl(), 3),
                Some(Err(Error::LeaseUnconfirmed { .. })) => {}
                end => return end,
            }
        }
    })
    .await;
    assert!(
        matches!(end, Some(Err(Error::LeaseNotFound { id })) if id == lease),
        "{end:?}"
    );
    assert!(is_lost.load(Ordering::SeqCst));
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn given_an_etcd_without_room_then_a_lease_that_is_gone_is_said_to_be() -> TestResult {
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
    let why = soon("it is lost", lock.lost()).await;
    assert!(gone(&why), "{why}");
    let once = client.keep_alive_once(lease).await.unwrap_err();
    assert!(gone(&once), "{once}");
    let end = soon("it ends", async {
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
async fn given_ids_that_no_lease_has_then_they_are_refused_and_nothing_is_sent() -> TestResult {
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
    // The TTL that the client keeps for itself is not given to its user.
    let granted = client.grant(13).await?;
    assert_eq!(granted.ttl(), 14);
    assert_eq!(client.keep_alive_once(granted.id()).await?.ttl(), 14);
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

    let of_old = first.ownership();
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
    assert_eq!(again.code(), Some(Code::FailedPrecondition), "{again}");
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
