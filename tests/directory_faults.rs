//! A directory on a cluster whose members are behind, cut off or wiped: it never goes back.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::Duration;

use goo_etcd::testing::{EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Directory};
use support::{PATIENCE, Seen, TestResult, eventually, key, shown, value};

async fn client_of(cluster: &EtcdCluster) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints(cluster.endpoints())
        .dial_timeout(PATIENCE)
        // Soon, so that the directory looks for another member and finds the one that is behind.
        .keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(1))
        .build()?;
    Ok(Client::new("main", config).await?)
}

/// With the others gone it cannot ask a quorum, and what it has itself is older than what was shown.
#[tokio::test]
async fn given_a_member_that_is_behind_and_alone_then_nothing_older_is_ever_shown() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = client_of(&cluster).await?;
    client.put(key("a"), value("h:1"), None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = Seen::by(&directory);

    let behind = (cluster.leader().await? + 1) % 3;
    let others: Vec<_> = (0..3).filter(|member| *member != behind).collect();
    cluster.member(behind).pause().await?;
    // More than the system keeps for it between the processes, which it would read when it goes on.
    for _ in 0..64 {
        let put = async || client.put("elsewhere", vec![0; 1 << 20], None).await;
        eventually("it is written", async || put().await.is_ok()).await;
    }
    for n in 2..20 {
        let put = async || client.put(key("a"), value(&format!("h:{n}")), None).await;
        eventually("it is written", async || put().await.is_ok()).await;
    }
    eventually("it is shown", async || {
        shown(&directory.snapshot()) == ["a=h:19"]
    })
    .await;
    let revision = directory.snapshot().revision();

    for other in &others {
        cluster.member(*other).pause().await?;
    }
    cluster.member(behind).resume()?;
    eventually("it says that it is not current", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    // The one that is behind has time to answer, and does answer what needs no quorum.
    let mut alone = cluster.member(behind).client().await?;
    let own = goo_etcd::GetOptions::new().with_serializable();
    let own = alone.get(key("a"), Some(own)).await?;
    assert_ne!(own.kvs()[0].value_str()?, value("h:19"), "it is not behind");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(shown(&directory.snapshot()), ["a=h:19"]);
    assert_eq!(directory.snapshot().revision(), revision);

    for other in &others {
        cluster.member(*other).resume()?;
    }
    eventually("it is current again", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;
    client.put(key("a"), value("h:20"), None).await?;
    eventually("it follows", async || {
        shown(&directory.snapshot()) == ["a=h:20"]
    })
    .await;
    let revisions: Vec<i64> = seen
        .all()
        .iter()
        .map(|snapshot| snapshot.revision())
        .collect();
    assert!(revisions.is_sorted(), "{revisions:?}");
    Ok(())
}

#[tokio::test]
async fn given_a_wiped_cluster_then_directories_follow_to_its_new_history() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = client_of(&cluster).await?;
    for n in 0..20 {
        client
            .put(key("old"), value(&format!("h:{n}")), None)
            .await?;
    }
    let directory = Directory::watch(&client, "greeter").await?;
    let before = directory.snapshot().revision();
    let seen = Seen::by(&directory);
    cluster.wipe_and_restart().await?;
    let put = async || client.put(key("new"), value("h:1"), None).await;
    eventually("it is written", async || put().await.is_ok()).await;
    eventually("the new history is shown", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && shown(&snapshot) == ["new=h:1"]
    })
    .await;
    assert!(directory.snapshot().revision() < before);
    // Once: from the old to the new, and not back.
    let revisions: Vec<i64> = seen
        .all()
        .iter()
        .map(|snapshot| snapshot.revision())
        .collect();
    let falls = revisions.windows(2).filter(|pair| pair[1] < pair[0]);
    assert_eq!(falls.count(), 1, "{revisions:?}");
    Ok(())
}

/// It is reached, answers what needs no quorum, and is the only one left to ask. It has seen less than what
/// was shown, and the others, which go on without it, cannot be asked.
#[tokio::test]
async fn given_only_a_member_that_is_cut_off_from_the_others_then_nothing_older_is_ever_shown()
-> TestResult {
    let cluster = EtcdCluster::start_partitionable().await?;
    let isolated = (cluster.leader().await? + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|member| *member != isolated).collect();
    let mut ways = Vec::new();
    for member in cluster.members() {
        ways.push(Proxy::start(member.endpoint()).await?);
    }
    let config = Config::builder()
        .endpoints(ways.iter().map(Proxy::endpoint))
        .dial_timeout(PATIENCE)
        .build()?;
    let client = Client::new("main", config).await?;
    // Of those that stay together.
    let mut writer = cluster.member(others[0]).client().await?;
    writer.put(key("a"), value("h:1"), None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = Seen::by(&directory);

    // What is newer is shown by another than the one that does not get it.
    ways[isolated].cut().await;
    cluster.isolate(isolated).await;
    for n in 2..20 {
        writer.put(key("a"), value(&format!("h:{n}")), None).await?;
    }
    eventually("it is shown", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && shown(&snapshot) == ["a=h:19"]
    })
    .await;
    let revision = directory.snapshot().revision();

    let before = ways[isolated].bytes_down();
    for other in &others {
        ways[*other].cut().await;
    }
    ways[isolated].restore().await?;
    eventually("it says that it is not current", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    let serializable = || Some(goo_etcd::GetOptions::new().with_serializable());
    let mut alone = cluster.member(isolated).client().await?;
    for n in 20..40 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let snapshot = directory.snapshot();
        assert!(!snapshot.freshness().is_live(), "nobody can know that");
        assert_eq!(shown(&snapshot), ["a=h:19"]);
        assert_eq!(snapshot.revision(), revision);
        // The others go on, and it does not hear of it.
        writer.put(key("a"), value(&format!("h:{n}")), None).await?;
        let own = alone.get(key("a"), serializable()).await?;
        assert_eq!(own.kvs()[0].value_str()?, value("h:1"), "it is not cut off");
    }
    // It was asked, and not only not found.
    assert!(ways[isolated].bytes_down() > before, "it has not answered");

    cluster.rejoin(isolated);
    eventually("it is current, through the same member", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && shown(&snapshot) == ["a=h:39"]
    })
    .await;
    writer.put(key("a"), value("h:40"), None).await?;
    eventually("it follows", async || {
        shown(&directory.snapshot()) == ["a=h:40"]
    })
    .await;

    // Its watch is on that member, and would be silent without end.
    cluster.isolate(isolated).await;
    writer.put(key("a"), value("h:41"), None).await?;
    eventually("it says that it is not current", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    assert_eq!(shown(&directory.snapshot()), ["a=h:40"]);
    cluster.rejoin(isolated);
    eventually("it follows again", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && shown(&snapshot) == ["a=h:41"]
    })
    .await;
    let revisions = seen.all();
    let revisions: Vec<i64> = revisions.iter().map(|s| s.revision()).collect();
    assert!(revisions.is_sorted(), "{revisions:?}");
    Ok(())
}
