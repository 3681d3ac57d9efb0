//! Clusters of `goo_etcd::testing` from which one member is cut off.

use std::time::Duration;

use crate::support::{TestResult, metrics_page, wait_for, wait_until};
use goo_etcd::testing::{Etcd, EtcdCluster};
use tokio::time::{sleep, timeout};

/// Renews a lease through this member; the response has the new TTL.
async fn renew(member: &Etcd, lease: i64) -> TestResult<i64> {
    let mut client = member.client().await?;
    let (mut keeper, mut renewals) = client.lease_keep_alive(lease).await?;
    keeper.keep_alive().await?;
    let renewal = renewals.message().await?;
    Ok(renewal.map_or(0, |renewal| renewal.ttl()))
}

/// The bytes that this member has received from peers, by its own counters: from the peer with this
/// id, or from all.
async fn received_bytes(member: &Etcd, from: &str) -> TestResult<f64> {
    let page = metrics_page(member).await?;
    let counters = page
        .lines()
        .filter(|line| line.starts_with("etcd_network_peer_received_bytes_total{"))
        .filter(|line| line.contains(from))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    Ok(counters.sum())
}

/// The bytes that the isolated member has received from the others, and they from it.
async fn passed_bytes(cluster: &EtcdCluster, isolated: usize) -> TestResult<[f64; 3]> {
    let member = cluster.member(isolated);
    let list = member.client().await?.member_list().await?;
    let listed = list.members().iter().find(|m| m.name() == member.name());
    let from = format!("From=\"{:x}\"", listed.ok_or("listed")?.id());
    let [one, other] = [1, 2].map(|n| cluster.member((isolated + n) % 3));
    Ok([
        received_bytes(member, "").await?,
        received_bytes(one, &from).await?,
        received_bytes(other, &from).await?,
    ])
}

/// Isolates a follower, then the leader. A follower forwards renewals to the leader without saying
/// who it is.
#[tokio::test]
async fn only_the_isolated_member_is_cut_off() -> TestResult {
    let cluster = EtcdCluster::start_partitionable().await?;
    let mut client = cluster.member(0).client().await?;
    let lease = client.lease_grant(600, None).await?.id();
    for distance in [1, 0] {
        let leader = cluster.leader().await?;
        let isolated = (leader + distance) % 3;
        let others: Vec<_> = (0..3).filter(|member| *member != isolated).collect();
        for member in cluster.members() {
            assert_eq!(renew(member, lease).await?, 600);
        }

        cluster.isolate(isolated).await;
        let passed = passed_bytes(&cluster, isolated).await?;
        if distance == 1 {
            // The follower still knows the leader.
            let renewal = timeout(
                Duration::from_secs(2),
                renew(cluster.member(isolated), lease),
            );
            assert!(
                !matches!(renewal.await, Ok(Ok(600))),
                "it reached the leader"
            );
        }
        wait_until("the others have a leader", async || {
            let mut client = cluster.member(others[0]).client().await.unwrap();
            let put = timeout(Duration::from_secs(2), client.put("key", "value", None));
            matches!(put.await, Ok(Ok(_)))
        })
        .await;
        let usual = async {
            for n in 0..40 {
                let member = cluster.member(others[n % 2]);
                assert_eq!(renew(member, lease).await?, 600);
                let mut client = member.client().await?;
                client.put("key", n.to_string(), None).await?;
                assert_eq!(
                    client.get("key", None).await?.kvs()[0].value_str()?,
                    n.to_string()
                );
            }
            TestResult::Ok(())
        };
        wait_for("renewals, writes and reads", usual).await?;
        sleep(Duration::from_secs(1)).await;
        assert_eq!(passed_bytes(&cluster, isolated).await?, passed);

        cluster.rejoin(isolated);
        wait_until("the member is back", async || {
            let mut client = cluster.member(isolated).client().await.unwrap();
            let get = timeout(Duration::from_secs(2), client.get("key", None));
            matches!(get.await, Ok(Ok(_)))
        })
        .await;
    }
    Ok(())
}
