//! A burst of deletions does not empty a healthy fleet.

use std::time::{Duration, Instant};

use crate::support::balanced::{Load, call, call_with_timeout, wait_until_ready};
use crate::support::echo::EchoServer;
use crate::support::{TestResult, connect, key, leases, value, wait_until};
use goo_etcd::balance::BalancedChannelBuilder;
use goo_etcd::format::{EtcdNaming, Format};
use goo_etcd::testing::Etcd;
use goo_etcd::{BalancedChannel, Client, Directory, Instance, PutOptions};
use tonic::Code;

/// How long the guard retains endpoints in these tests: longer than any other wait.
const KEEP: Duration = Duration::from_secs(12);

/// Servers, each registered under its own lease, as if they lived on without a connection to etcd.
struct Fleet {
    etcd: Etcd,
    client: Client,
    directory: Directory,
    servers: Vec<EchoServer>,
}

impl Fleet {
    async fn start(count: usize) -> TestResult<Self> {
        let etcd = Etcd::start().await?;
        let client = connect(etcd.endpoint()).await;
        let directory = Directory::watch(&client, "greeter").await?;
        let servers = (0..count).map(|_| EchoServer::start()).collect();
        let fleet = Self {
            etcd,
            client,
            directory,
            servers,
        };
        for server in &fleet.servers {
            fleet.register(server).await?;
        }
        Ok(fleet)
    }

    async fn register(&self, server: &EchoServer) -> TestResult {
        let lease = self.client.grant(600).await?.id();
        let options = PutOptions::new().with_lease(lease);
        let (key, value) = (key(server.address()), value(server.address()));
        self.client.put(key, value, options).await?;
        Ok(())
    }

    async fn channel(
        &self,
        settings: impl FnOnce(BalancedChannelBuilder) -> BalancedChannelBuilder,
    ) -> TestResult<BalancedChannel> {
        let builder = BalancedChannel::builder(&self.directory)
            .mass_deletion_guard(KEEP)
            .ready_timeout(Duration::from_secs(1));
        let channel = settings(builder).build()?;
        wait_until_ready(&channel, self.servers.len()).await;
        Ok(channel)
    }

    /// Revokes all leases, and waits until the directory is empty.
    async fn expire(&self) -> TestResult {
        for lease in leases(&self.etcd).await? {
            self.client.revoke(lease).await?;
        }
        wait_until("the directory is empty", async || {
            self.directory.snapshot().is_empty()
        })
        .await;
        Ok(())
    }

    fn accepted(&self) -> usize {
        let servers = self.servers.iter();
        servers.map(|server| server.counts().accepted()).sum()
    }
}

fn count_retained(channel: &BalancedChannel) -> usize {
    let endpoints = channel.endpoints();
    endpoints
        .iter()
        .filter(|endpoint| endpoint.retained)
        .count()
}

async fn assert_fails_as_empty(channel: &BalancedChannel) {
    let status = call(channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let empty = "no instances under services/greeter/";
    assert!(status.message().starts_with(empty), "{status}");
}

#[tokio::test]
async fn healthy_fleet_is_retained_for_a_limited_time() -> TestResult {
    let fleet = Fleet::start(5).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let load = Load::start(&channel, 8);
    let started = Instant::now();
    fleet.expire().await?;
    wait_until("all endpoints are retained", async || {
        count_retained(&channel) == 5
    })
    .await;
    // All servers are called, even those removed before the guard could know of a mass deletion.
    for server in &fleet.servers {
        load.wait_until_called(server.address()).await;
    }
    load.wait_for_calls(500).await;
    load.finish().await.assert_no_failure();
    wait_until("the guard has ended", async || {
        channel.endpoints().is_empty()
    })
    .await;
    assert!(started.elapsed() >= KEEP, "{:?}", started.elapsed());
    assert_fails_as_empty(&channel).await;
    Ok(())
}

#[tokio::test]
async fn lost_connections_are_not_retained() -> TestResult {
    let mut fleet = Fleet::start(3).await?;
    let channel = fleet
        .channel(|builder| builder.mass_deletion_guard(Duration::from_secs(600)))
        .await?;
    fleet.expire().await?;
    wait_until("all endpoints are retained", async || {
        count_retained(&channel) == 3
    })
    .await;
    call(&channel).await?;
    for server in std::mem::take(&mut fleet.servers) {
        server.shutdown().await;
    }
    wait_until("lost endpoints are dropped", async || {
        channel.endpoints().is_empty()
    })
    .await;
    let started = Instant::now();
    assert_fails_as_empty(&channel).await;
    assert!(started.elapsed() < Duration::from_secs(20), "the call hung");
    let status = call_with_timeout(&channel, Duration::from_millis(200))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    Ok(())
}

#[tokio::test]
async fn registering_again_keeps_the_connections() -> TestResult {
    let fleet = Fleet::start(4).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let load = Load::start(&channel, 8);
    fleet.expire().await?;
    wait_until("all endpoints are retained", async || {
        count_retained(&channel) == 4
    })
    .await;
    for server in &fleet.servers {
        fleet.register(server).await?;
    }
    wait_until("no endpoint is retained", async || {
        count_retained(&channel) == 0
    })
    .await;
    assert_eq!(channel.endpoints().len(), 4);
    for server in &fleet.servers {
        load.wait_until_called(server.address()).await;
    }
    load.finish().await.assert_no_failure();
    assert_eq!(fleet.accepted(), 4, "a server was connected again");
    Ok(())
}

#[tokio::test]
async fn draining_endpoints_are_never_retained() -> TestResult {
    let fleet = Fleet::start(3).await?;
    let channel = fleet.channel(|builder| builder).await?;
    for server in &fleet.servers {
        let draining = Instance::new("greeter", server.address()).draining(true);
        let value = EtcdNaming.encode(&draining)?;
        let options = PutOptions::new().with_ignore_lease();
        let put = fleet.client.put(key(server.address()), value, options);
        put.await?;
    }
    wait_until("the directory shows them as draining", async || {
        let snapshot = fleet.directory.snapshot();
        snapshot.instances().all(|instance| instance.draining)
    })
    .await;
    fleet.expire().await?;
    let started = Instant::now();
    wait_until("all endpoints are dropped", async || {
        channel.endpoints().is_empty()
    })
    .await;
    assert!(started.elapsed() < KEEP, "{:?}", started.elapsed());
    assert_fails_as_empty(&channel).await;
    Ok(())
}

#[tokio::test]
async fn single_deletion_is_applied_at_once() -> TestResult {
    let fleet = Fleet::start(5).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let removed = &fleet.servers[0];
    fleet.client.delete(key(removed.address()), None).await?;
    wait_until("the endpoint is dropped", async || {
        channel.endpoints().len() == 4
    })
    .await;
    let before = removed.counts().calls();
    for _ in 0..100 {
        call(&channel).await?;
    }
    assert_eq!(removed.counts().calls(), before);
    wait_until("the connection is closed", async || {
        removed.counts().connections() == 0
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn replaced_fleet_is_not_retained() -> TestResult {
    let fleet = Fleet::start(3).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let others: Vec<EchoServer> = (0..3).map(|_| EchoServer::start()).collect();
    let old = leases(&fleet.etcd).await?;
    for server in &others {
        fleet.register(server).await?;
    }
    for lease in old {
        fleet.client.revoke(lease).await?;
    }
    wait_until("only the new servers are endpoints", async || {
        let endpoints = channel.endpoints();
        let is_new = |address: &str| others.iter().any(|other| other.address() == address);
        endpoints.len() == 3 && endpoints.iter().all(|endpoint| is_new(&endpoint.address))
    })
    .await;
    assert_eq!(count_retained(&channel), 0);
    Ok(())
}

#[tokio::test]
async fn disabled_guard_retains_nothing() -> TestResult {
    let fleet = Fleet::start(3).await?;
    let off = |builder: BalancedChannelBuilder| builder.mass_deletion_guard(Duration::ZERO);
    let channel = fleet.channel(off).await?;
    fleet.expire().await?;
    wait_until("all endpoints are dropped", async || {
        channel.endpoints().is_empty()
    })
    .await;
    assert_eq!(count_retained(&channel), 0);
    assert_fails_as_empty(&channel).await;
    Ok(())
}

/// The recorder belongs to the test's thread, on which all of its tasks run.
#[cfg(feature = "metrics")]
#[tokio::test]
async fn metrics_count_mass_deletions_and_retained_endpoints() -> TestResult {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _installed = metrics::set_default_local_recorder(&recorder);
    // Each snapshot resets the recorder, so the readings are added up.
    let mut totals = std::collections::BTreeMap::<String, f64>::new();
    let mut read = |name: &str| {
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let mut labels = key.key().labels();
            let label = labels.next().map(metrics::Label::value);
            assert_eq!(label, Some("services/greeter/"));
            *totals.entry(key.key().name().to_owned()).or_default() += match value {
                DebugValue::Counter(count) => count as f64,
                DebugValue::Gauge(change) => change.into_inner(),
                DebugValue::Histogram(_) => panic!("there are no histograms"),
            };
        }
        totals.get(name).copied()
    };
    let fleet = Fleet::start(3).await?;
    let channel = fleet.channel(|builder| builder).await?;
    assert_eq!(read("goo_etcd_retained_endpoints"), None);
    // One by one, so that each deletion is a change of its own.
    for (n, server) in fleet.servers.iter().enumerate() {
        fleet.client.delete(key(server.address()), None).await?;
        wait_until("the endpoint is dropped or retained", async || {
            let endpoints = channel.endpoints();
            let in_set = endpoints
                .iter()
                .filter(|endpoint| !endpoint.retained)
                .count();
            in_set == 2 - n
        })
        .await;
    }
    assert_eq!(count_retained(&channel), 3);
    assert_eq!(read("goo_etcd_mass_deletions_total"), Some(1.0));
    assert_eq!(read("goo_etcd_retained_endpoints"), Some(3.0));
    fleet.register(&fleet.servers[0]).await?;
    wait_until("one endpoint is registered again", async || {
        count_retained(&channel) == 2
    })
    .await;
    assert_eq!(read("goo_etcd_retained_endpoints"), Some(2.0));
    drop(channel);
    wait_until("no endpoint is retained", async || {
        read("goo_etcd_retained_endpoints") == Some(0.0)
    })
    .await;
    Ok(())
}
