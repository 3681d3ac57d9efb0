//! Leases that clients keep alive: on few streams, with few messages, and while members hang.

use std::future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{TestResult, config, connect, leases, metrics_page, wait_for, wait_until};
use futures::future::try_join_all;
use futures::{Stream, StreamExt};
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error, Instance, Lock, Registrar, Registration, RegistrationState};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Leases of each kind, and how many of them were lost: of locks, keep-alives and registrations.
#[derive(Default)]
struct Leased {
    locks: Vec<Lock>,
    registrations: Vec<Registration>,
    losses: Arc<[AtomicUsize; 3]>,
    watching: JoinSet<()>,
}

impl Leased {
    /// Takes `count` leases of each kind. Each has a client of its own, so that the streams of some
    /// clients go to the leader and of others to followers.
    async fn take(cluster: &EtcdCluster, count: usize, ttl: Duration) -> TestResult<Self> {
        let mut leased = Self::default();
        for n in 0..count {
            let client = Client::new("main", config(cluster.endpoints())).await?;
            let lock = client.lock(format!("lock-{n}"), ttl).await?;
            leased.locks.push(lock);

            let lease = client.grant(ttl.as_secs().try_into()?).await?.id();
            let kept = client.keep_alive(lease).await?;
            leased.count_losses(1, kept.filter(|item| future::ready(item.is_err())));

            let registrar = Registrar::builder(&client).ttl(ttl).build()?;
            let instance = Instance::new("greeter", "10.0.0.1:80").id(n.to_string());
            let registration = registrar.register(instance).await?;
            let is_lost = |state: &RegistrationState| *state != RegistrationState::Registered;
            let lost = registration.states();
            leased.count_losses(2, lost.filter(move |state| future::ready(is_lost(state))));
            leased.registrations.push(registration);
        }
        Ok(leased)
    }

    fn count_losses(&mut self, kind: usize, losses: impl Stream + Send + 'static) {
        let counts = Arc::clone(&self.losses);
        self.watching.spawn(losses.for_each(move |_| {
            counts[kind].fetch_add(1, Ordering::SeqCst);
            future::ready(())
        }));
    }

    fn losses(&self) -> [usize; 3] {
        let [_, kept, registrations] = [0, 1, 2].map(|n| self.losses[n].load(Ordering::SeqCst));
        let locks = self.locks.iter().filter(|lock| !lock.is_held()).count();
        [locks, kept, registrations]
    }
}

/// Stops the leader for more than a TTL, and returns the losses.
async fn stop_leader(count: usize, ttl: Duration) -> TestResult<[usize; 3]> {
    let cluster = EtcdCluster::start().await?;
    let leased = Leased::take(&cluster, count, ttl).await?;
    // Until the first renewals are over.
    sleep(ttl / 2).await;
    assert_eq!(leased.losses(), [0; 3]);
    let leader = cluster.leader().await?;
    cluster.member(leader).pause().await?;
    sleep(ttl * 5 / 4).await;
    let losses = leased.losses();
    cluster.member(leader).resume()?;
    Ok(losses)
}

/// The other members elect a leader in about 2 s, which leaves time for a renewal. Until then they
/// wait for the stopped leader with each renewal that they get, and they go on waiting afterwards.
#[tokio::test]
async fn stopped_leader_loses_no_lease() -> TestResult {
    // At 9 s a renewal has 6 s, of which a busy machine may take 4.
    let losses = stop_leader(6, Duration::from_secs(9)).await?;
    assert_eq!(losses, [0; 3]);
    Ok(())
}

/// etcd's own metrics of the streams of renewals.
#[derive(Debug)]
struct StreamMetrics {
    started: u64,
    ended: u64,
    messages: u64,
}

impl StreamMetrics {
    async fn read(etcd: &Etcd) -> TestResult<Self> {
        let page = metrics_page(etcd).await?;
        let sum = |name: &str| {
            let of_method = page
                .lines()
                .filter(|line| line.starts_with(name))
                .filter(|line| line.contains("grpc_method=\"LeaseKeepAlive\""))
                .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
            of_method.sum::<f64>() as u64
        };
        Ok(Self {
            started: sum("grpc_server_started_total"),
            ended: sum("grpc_server_handled_total"),
            messages: sum("grpc_server_msg_received_total"),
        })
    }
}

#[tokio::test]
async fn leases_share_a_stream_with_a_message_each() -> TestResult {
    const LEASES: usize = 100;
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let before = StreamMetrics::read(&etcd).await?;
    let leases = try_join_all((0..LEASES).map(|_| client.grant(6))).await?;
    let renew_thrice = async |id| {
        let mut kept = client.keep_alive(id).await?;
        for _ in 0..3 {
            wait_for("a response", kept.next()).await.unwrap()?;
        }
        Ok::<_, Error>(kept)
    };
    let _kept = try_join_all(leases.iter().map(|lease| renew_thrice(lease.id()))).await?;
    let responses = 3 * LEASES as u64;
    let after = StreamMetrics::read(&etcd).await?;
    // One stream suffices, unless the machine paused for a quarter of the TTL.
    let streams = after.started - before.started;
    assert!((1..=4).contains(&streams), "{streams} streams");
    let messages = after.messages - before.messages;
    // A lease that had its three responses early may have been renewed once or twice more.
    assert!(
        (responses..=responses + 2 * LEASES as u64).contains(&messages),
        "{messages} messages for {responses} responses"
    );
    Ok(())
}

/// A network that is slow, but loses nothing, costs no lease, and not a stream for each renewal.
#[tokio::test]
async fn slow_network_loses_no_lease() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let lease = client.grant(6).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    wait_for("a response", kept.next()).await.unwrap()?;
    let before = StreamMetrics::read(&etcd).await?;
    proxy.delay(Duration::from_millis(800));
    for _ in 0..3 {
        wait_for("a response", kept.next()).await.unwrap()?;
    }
    // The first response takes longer than expected. On a busy machine the second one does too.
    let streams = StreamMetrics::read(&etcd).await?.started - before.started;
    assert!(streams < 3, "{streams} further streams");
    Ok(())
}

/// A stream would otherwise stay at an address that was removed for as long as a lease is renewed.
#[tokio::test]
async fn removed_address_loses_its_stream() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let mut config = Config::default();
    config.endpoints = vec![proxy.endpoint()];
    config.auto_sync = true;
    config.auto_sync_interval = Duration::from_millis(500);
    let client = Client::new("main", config).await?;
    let lease = client.grant(2).await?.id();
    let kept = client.keep_alive(lease).await?;
    wait_until("the proxy has no connection", async || {
        proxy.connections() == 0
    })
    .await;
    let kept: Vec<_> = kept.take(2).collect().await;
    assert!(kept.iter().all(Result::is_ok), "{kept:?}");
    Ok(())
}

async fn has_open_stream(etcd: &Etcd) -> TestResult<bool> {
    let metrics = StreamMetrics::read(etcd).await?;
    Ok(metrics.started > metrics.ended)
}

#[tokio::test]
async fn stream_ends_with_the_last_keep_alive() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let lease = client.grant(60).await?.id();
    let first = client.keep_alive(lease).await?;
    let second = client.keep_alive(lease).await?;
    drop(first);
    client.keep_alive_once(lease).await?;
    assert!(has_open_stream(&etcd).await?);
    drop(second);
    wait_until("the stream ends", async || {
        !has_open_stream(&etcd).await.unwrap()
    })
    .await;
    client.keep_alive_once(lease).await?;
    wait_until("a renewal leaves no stream", async || {
        !has_open_stream(&etcd).await.unwrap()
    })
    .await;
    Ok(())
}

/// No TTL is reserved, because a Go session may have any.
#[tokio::test]
async fn lease_of_13_s_is_a_lease_like_any_other() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for ttl in 12..=15 {
        let other = etcd.client().await?.lease_grant(ttl, None).await?.id();
        let own = client.grant(ttl).await?;
        assert_eq!(own.ttl(), ttl);
        let chosen = client.grant_with_id(ttl, ttl).await?;
        assert_eq!((chosen.id(), chosen.ttl()), (ttl, ttl));
        for id in [other, own.id(), chosen.id()] {
            let lease = client.lease_time_to_live(id, None).await?;
            assert_eq!(lease.granted_ttl(), ttl);
            assert_eq!(client.keep_alive_once(id).await?.ttl(), ttl);
            let mut kept = client.keep_alive(id).await?;
            assert_eq!(kept.next().await.unwrap()?.ttl(), ttl);
            assert!(leases(&etcd).await?.contains(&id));
        }
        client.revoke(other).await?;
        let gone = client.keep_alive_once(other).await.unwrap_err();
        assert!(matches!(gone, Error::LeaseNotFound { .. }), "{gone}");
        assert!(!leases(&etcd).await?.contains(&other));
    }
    Ok(())
}
