//! A directory never goes back in time, even if a member lags, is isolated, or the cluster is
//! wiped.

use std::time::Duration;

use crate::support::{PATIENCE, SnapshotRecorder, TestResult, key, listing, value, wait_until};
use goo_etcd::testing::{EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Directory};

async fn client_of(cluster: &EtcdCluster) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints(cluster.endpoints())
        .dial_timeout(PATIENCE)
        // Short, so that the directory soon moves to the member that lags.
        .keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(1))
        .build()?;
    Ok(Client::new("main", config).await?)
}

/// Without the others the member has no quorum, and its own state is older than the shown one.
#[tokio::test]
async fn lagging_member_never_shows_an_older_state() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = client_of(&cluster).await?;
    client.put(key("a"), value("h:1"), None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = SnapshotRecorder::new(&directory);

    let behind = (cluster.leader().await? + 1) % 3;
    let others: Vec<_> = (0..3).filter(|member| *member != behind).collect();
    cluster.member(behind).pause().await?;
    // More than the socket buffers hold, because the member reads those when it resumes.
    for _ in 0..64 {
        let put = async || client.put("elsewhere", vec![0; 1 << 20], None).await;
        wait_until("the key is put", async || put().await.is_ok()).await;
    }
    for n in 2..20 {
        let put = async || client.put(key("a"), value(&format!("h:{n}")), None).await;
        wait_until("the key is put", async || put().await.is_ok()).await;
    }
    wait_until("the last change is shown", async || {
        listing(&directory.snapshot()) == ["a=h:19"]
    })
    .await;
    let revision = directory.snapshot().revision();

    for other in &others {
        cluster.member(*other).pause().await?;
    }
    cluster.member(behind).resume()?;
    wait_until("the directory is stale", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    // The lagging member has time to respond, and serves reads that need no quorum.
    let mut alone = cluster.member(behind).client().await?;
    let own = goo_etcd::GetOptions::new().with_serializable();
    let own = alone.get(key("a"), Some(own)).await?;
    assert_ne!(
        own.kvs()[0].value_str()?,
        value("h:19"),
        "the member does not lag"
    );
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(listing(&directory.snapshot()), ["a=h:19"]);
    assert_eq!(directory.snapshot().revision(), revision);

    for other in &others {
        cluster.member(*other).resume()?;
    }
    wait_until("the directory is live again", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;
    client.put(key("a"), value("h:20"), None).await?;
    wait_until("the next change is shown", async || {
        listing(&directory.snapshot()) == ["a=h:20"]
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
async fn wiped_cluster_is_followed() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = client_of(&cluster).await?;
    for n in 0..20 {
        client
            .put(key("old"), value(&format!("h:{n}")), None)
            .await?;
    }
    let directory = Directory::watch(&client, "greeter").await?;
    let before = directory.snapshot().revision();
    let seen = SnapshotRecorder::new(&directory);
    cluster.wipe_and_restart().await?;
    let put = async || client.put(key("new"), value("h:1"), None).await;
    wait_until("the key is put", async || put().await.is_ok()).await;
    wait_until("the new history is shown", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && listing(&snapshot) == ["new=h:1"]
    })
    .await;
    assert!(directory.snapshot().revision() < before);
    // The revision falls once: from the old history to the new one.
    let revisions: Vec<i64> = seen
        .all()
        .iter()
        .map(|snapshot| snapshot.revision())
        .collect();
    let falls = revisions.windows(2).filter(|pair| pair[1] < pair[0]);
    assert_eq!(falls.count(), 1, "{revisions:?}");
    Ok(())
}

/// The watch is on the member that gets isolated, and would stay silent forever.
async fn watch_on_isolated_member_is_replaced(
    cluster: &EtcdCluster,
    isolated: usize,
    writer: &mut goo_etcd::etcd_client::Client,
    directory: &Directory,
) -> TestResult {
    cluster.isolate(isolated).await;
    writer.put(key("a"), value("h:41"), None).await?;
    wait_until("the directory is stale", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    assert_eq!(listing(&directory.snapshot()), ["a=h:40"]);
    cluster.rejoin(isolated);
    wait_until("the directory is live again", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && listing(&snapshot) == ["a=h:41"]
    })
    .await;
    Ok(())
}

/// The isolated member is the only reachable one. The member serves reads that need no quorum, but
/// its state is older than the shown one. The others have a quorum and cannot be reached.
#[tokio::test]
async fn isolated_member_never_shows_an_older_state() -> TestResult {
    let cluster = EtcdCluster::start_partitionable().await?;
    let isolated = (cluster.leader().await? + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|member| *member != isolated).collect();
    let mut proxies = Vec::new();
    for member in cluster.members() {
        proxies.push(Proxy::start(member.endpoint()).await?);
    }
    let config = Config::builder()
        .endpoints(proxies.iter().map(Proxy::endpoint))
        .dial_timeout(PATIENCE)
        .build()?;
    let client = Client::new("main", config).await?;
    // The writer uses a member of the majority.
    let mut writer = cluster.member(others[0]).client().await?;
    writer.put(key("a"), value("h:1"), None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = SnapshotRecorder::new(&directory);

    // The directory follows a member of the majority, and sees the newer state.
    proxies[isolated].cut().await;
    cluster.isolate(isolated).await;
    for n in 2..20 {
        writer.put(key("a"), value(&format!("h:{n}")), None).await?;
    }
    wait_until("the last change is shown", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && listing(&snapshot) == ["a=h:19"]
    })
    .await;
    let revision = directory.snapshot().revision();

    let before = proxies[isolated].bytes_down();
    for other in &others {
        proxies[*other].cut().await;
    }
    proxies[isolated].restore().await?;
    wait_until("the directory is stale", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    let serializable = || Some(goo_etcd::GetOptions::new().with_serializable());
    let mut alone = cluster.member(isolated).client().await?;
    for n in 20..40 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let snapshot = directory.snapshot();
        assert!(!snapshot.freshness().is_live(), "live without a quorum");
        assert_eq!(listing(&snapshot), ["a=h:19"]);
        assert_eq!(snapshot.revision(), revision);
        // The majority goes on; the isolated member does not get its writes.
        writer.put(key("a"), value(&format!("h:{n}")), None).await?;
        let own = alone.get(key("a"), serializable()).await?;
        assert_eq!(
            own.kvs()[0].value_str()?,
            value("h:1"),
            "the member is not isolated"
        );
    }
    // The isolated member did respond to the client.
    assert!(
        proxies[isolated].bytes_down() > before,
        "the member did not respond"
    );

    cluster.rejoin(isolated);
    wait_until(
        "the directory is live through the same member",
        async || {
            let snapshot = directory.snapshot();
            snapshot.freshness().is_live() && listing(&snapshot) == ["a=h:39"]
        },
    )
    .await;
    writer.put(key("a"), value("h:40"), None).await?;
    wait_until("the next change is shown", async || {
        listing(&directory.snapshot()) == ["a=h:40"]
    })
    .await;

    watch_on_isolated_member_is_replaced(&cluster, isolated, &mut writer, &directory).await?;
    let revisions = seen.all();
    let revisions: Vec<i64> = revisions.iter().map(|s| s.revision()).collect();
    assert!(revisions.is_sorted(), "{revisions:?}");
    Ok(())
}
