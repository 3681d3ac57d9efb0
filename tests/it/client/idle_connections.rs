//! Connections to etcd without operations. etcd ends a connection with "too_many_pings" when it is
//! pinged more often than every 5 s, or every 2 hours while no stream is open.

use std::time::Duration;

use goo_etcd::testing::{EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Directory};
use tokio::time::sleep;

use crate::support::{TestResult, config, etcd_versions, key, value};

/// The shortest that a client may have.
const INTERVAL: Duration = Duration::from_secs(5);

/// Longer than six pings at the interval. The fourth was one too many.
const IDLE: Duration = Duration::from_secs(32);

fn pinging(endpoints: impl IntoIterator<Item = String>) -> Config {
    let mut config = config(endpoints);
    config.keep_alive_interval = INTERVAL;
    config
}

#[tokio::test]
async fn idle_client_keeps_its_connection() -> TestResult {
    let kept = etcd_versions().into_iter().map(|builder| async {
        let etcd = builder.start().await?;
        let proxy = Proxy::start(etcd.endpoint()).await?;
        let client = Client::new("main", pinging([proxy.endpoint()])).await?;
        client.put("key", "value", None).await?;
        sleep(IDLE).await;
        client.get("key", None).await?;
        assert_eq!(proxy.accepted(), 1);
        TestResult::Ok(())
    });
    futures::future::try_join_all(kept).await?;
    Ok(())
}

#[tokio::test]
async fn directory_keeps_one_connection_to_each_member() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let mut proxies = Vec::new();
    for member in cluster.members() {
        proxies.push(Proxy::start(member.endpoint()).await?);
    }
    let client = Client::new("main", pinging(proxies.iter().map(Proxy::endpoint))).await?;
    client.put(key("one"), value("127.0.0.1:1"), None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    sleep(IDLE).await;
    for _ in 0..30 {
        client.get("key", None).await?;
    }
    assert!(directory.snapshot().freshness().is_live());
    let accepted: Vec<u64> = proxies.iter().map(Proxy::accepted).collect();
    assert_eq!(accepted, [1, 1, 1]);
    Ok(())
}
