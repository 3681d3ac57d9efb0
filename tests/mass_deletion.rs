//! G4: a burst of deletions does not empty a healthy fleet.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::{Duration, Instant};

use goo_etcd::balance::BalancedChannelBuilder;
use goo_etcd::format::{EtcdNaming, Format};
use goo_etcd::testing::Etcd;
use goo_etcd::{BalancedChannel, Client, Directory, Instance, PutOptions};
use support::balanced::{Load, call, call_within, until_ready};
use support::echo::EchoServer;
use support::{TestResult, connect, eventually, key, leases, value};
use tonic::Code;

/// For how long the guard keeps, in these tests: longer than any test waits for something else.
const KEEP: Duration = Duration::from_secs(12);

/// Servers, each registered under a lease of its own, as by processes that live on and cannot reach etcd.
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
        until_ready(&channel, self.servers.len()).await;
        Ok(channel)
    }

    /// All leases end, and the directory knows.
    async fn expire(&self) -> TestResult {
        for lease in leases(&self.etcd).await? {
            self.client.revoke(lease).await?;
        }
        eventually("all have vanished", async || {
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

fn retained(channel: &BalancedChannel) -> usize {
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
async fn given_all_leases_expire_and_healthy_servers_then_they_are_called_for_the_bounded_time_and_no_longer()
-> TestResult {
    let fleet = Fleet::start(5).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let load = Load::start(&channel, 8);
    let begun = Instant::now();
    fleet.expire().await?;
    eventually("they are kept", async || retained(&channel) == 5).await;
    // All of them serve on, also those that vanished before it was clear that most would.
    for server in &fleet.servers {
        load.reaches(server.address()).await;
    }
    load.goes_on_for(500).await;
    load.finish().await.assert_no_failure();
    eventually("the time is over", async || channel.endpoints().is_empty()).await;
    assert!(begun.elapsed() >= KEEP, "{:?}", begun.elapsed());
    assert_fails_as_empty(&channel).await;
    Ok(())
}

#[tokio::test]
async fn given_all_leases_expire_and_dead_servers_then_calls_fail_as_with_none_and_nothing_is_tried()
-> TestResult {
    let mut fleet = Fleet::start(3).await?;
    let channel = fleet
        .channel(|builder| builder.mass_deletion_guard(Duration::from_secs(600)))
        .await?;
    fleet.expire().await?;
    eventually("they are kept", async || retained(&channel) == 3).await;
    call(&channel).await?;
    for server in std::mem::take(&mut fleet.servers) {
        server.shutdown().await;
    }
    eventually("what is lost is dropped", async || {
        channel.endpoints().is_empty()
    })
    .await;
    let begun = Instant::now();
    assert_fails_as_empty(&channel).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "it hung");
    let status = call_within(&channel, Duration::from_millis(200))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    Ok(())
}

#[tokio::test]
async fn given_those_that_vanished_are_registered_again_then_they_are_known_as_before_on_the_same_connections()
-> TestResult {
    let fleet = Fleet::start(4).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let load = Load::start(&channel, 8);
    fleet.expire().await?;
    eventually("they are kept", async || retained(&channel) == 4).await;
    for server in &fleet.servers {
        fleet.register(server).await?;
    }
    eventually("they are known", async || retained(&channel) == 0).await;
    assert_eq!(channel.endpoints().len(), 4);
    for server in &fleet.servers {
        load.reaches(server.address()).await;
    }
    load.finish().await.assert_no_failure();
    assert_eq!(fleet.accepted(), 4, "connections were made anew");
    Ok(())
}

#[tokio::test]
async fn given_a_deletion_that_was_announced_then_it_is_honoured_at_once() -> TestResult {
    let fleet = Fleet::start(3).await?;
    let channel = fleet.channel(|builder| builder).await?;
    for server in &fleet.servers {
        let draining = Instance::new("greeter", server.address()).draining(true);
        let value = EtcdNaming.encode(&draining)?;
        let options = PutOptions::new().with_ignore_lease();
        let put = fleet.client.put(key(server.address()), value, options);
        put.await?;
    }
    eventually("it is known", async || {
        let snapshot = fleet.directory.snapshot();
        snapshot.instances().all(|instance| instance.draining)
    })
    .await;
    fleet.expire().await?;
    let begun = Instant::now();
    eventually("they are let go", async || channel.endpoints().is_empty()).await;
    assert!(begun.elapsed() < KEEP, "{:?}", begun.elapsed());
    assert_fails_as_empty(&channel).await;
    Ok(())
}

#[tokio::test]
async fn given_one_of_five_vanishes_then_it_gets_nothing_more() -> TestResult {
    let fleet = Fleet::start(5).await?;
    let channel = fleet.channel(|builder| builder).await?;
    let gone = &fleet.servers[0];
    fleet.client.delete(key(gone.address()), None).await?;
    eventually("it is let go", async || channel.endpoints().len() == 4).await;
    let before = gone.counts().calls();
    for _ in 0..100 {
        call(&channel).await?;
    }
    assert_eq!(gone.counts().calls(), before);
    eventually("its connection is closed", async || {
        gone.counts().connections() == 0
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_a_fleet_replaced_by_another_then_the_old_one_is_let_go() -> TestResult {
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
    eventually("only the new are there", async || {
        let endpoints = channel.endpoints();
        let is_new = |address: &str| others.iter().any(|other| other.address() == address);
        endpoints.len() == 3 && endpoints.iter().all(|endpoint| is_new(&endpoint.address))
    })
    .await;
    assert_eq!(retained(&channel), 0);
    Ok(())
}

#[tokio::test]
async fn given_the_guard_is_switched_off_then_what_vanishes_is_let_go() -> TestResult {
    let fleet = Fleet::start(3).await?;
    let off = |builder: BalancedChannelBuilder| builder.mass_deletion_guard(Duration::ZERO);
    let channel = fleet.channel(off).await?;
    fleet.expire().await?;
    eventually("they are let go", async || channel.endpoints().is_empty()).await;
    assert_eq!(retained(&channel), 0);
    assert_fails_as_empty(&channel).await;
    Ok(())
}

/// Recorded on the test's own thread, on which all of its tasks run.
#[cfg(feature = "metrics")]
#[tokio::test]
async fn given_a_mass_deletion_then_metrics_tell_of_it_and_of_how_many_are_kept() -> TestResult {
    use metrics_util::debugging::{DebugValue, DebuggingRecorder};

    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _installed = metrics::set_default_local_recorder(&recorder);
    // Each reading takes what there is away.
    let mut told = std::collections::BTreeMap::<String, f64>::new();
    let mut read = |name: &str| {
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let mut labels = key.key().labels();
            let label = labels.next().map(metrics::Label::value);
            assert_eq!(label, Some("services/greeter/"));
            *told.entry(key.key().name().to_owned()).or_default() += match value {
                DebugValue::Counter(count) => count as f64,
                DebugValue::Gauge(change) => change.into_inner(),
                DebugValue::Histogram(_) => panic!("there is none"),
            };
        }
        told.get(name).copied()
    };
    let fleet = Fleet::start(3).await?;
    let channel = fleet.channel(|builder| builder).await?;
    assert_eq!(read("goo_etcd_kept_endpoints"), None);
    // One by one, so that each is seen by itself.
    for (n, server) in fleet.servers.iter().enumerate() {
        fleet.client.delete(key(server.address()), None).await?;
        eventually("it is let go, or kept", async || {
            let endpoints = channel.endpoints();
            let in_set = endpoints
                .iter()
                .filter(|endpoint| !endpoint.retained)
                .count();
            in_set == 2 - n
        })
        .await;
    }
    assert_eq!(retained(&channel), 3);
    assert_eq!(read("goo_etcd_mass_deletions_total"), Some(1.0));
    assert_eq!(read("goo_etcd_kept_endpoints"), Some(3.0));
    fleet.register(&fleet.servers[0]).await?;
    eventually("it is known", async || retained(&channel) == 2).await;
    assert_eq!(read("goo_etcd_kept_endpoints"), Some(2.0));
    drop(channel);
    eventually("none is kept any more", async || {
        read("goo_etcd_kept_endpoints") == Some(0.0)
    })
    .await;
    Ok(())
}
