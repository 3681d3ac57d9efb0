//! How calls are shared among servers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::balanced::{
    Load, SetSender, call, dynamic_channel, hello, in_flight, instance, static_channel, status_of,
    wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::raw::RawServer;
use crate::support::{alone, wait_until};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, EndpointState, Source};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::{Channel, Endpoint};

fn three() -> [EchoServer; 3] {
    std::array::from_fn(|_| EchoServer::start())
}

/// A channel to both servers with these weights.
async fn weighted_channel(
    servers: &[EchoServer; 2],
    weights: [u32; 2],
    policy: BalancePolicy,
) -> BalancedChannel {
    let both = servers.iter().zip(weights);
    let both = both.map(|(server, weight)| instance(server.address()).weight(weight));
    let channel = BalancedChannel::builder(Source::fixed(both))
        .policy(policy)
        .build()
        .unwrap();
    wait_until_ready(&channel, 2).await;
    channel
}

/// Makes calls one after another, and counts the calls of each server.
async fn shares(channel: &BalancedChannel, calls: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..calls {
        *shares.entry(call(channel).await.unwrap()).or_default() += 1;
    }
    shares
}

#[tokio::test]
async fn round_robin_follows_weights_exactly() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = weighted_channel(&servers, [99, 1], BalancePolicy::RoundRobin).await;
    let shares = shares(&channel, 1_000).await;
    assert_eq!(shares[servers[0].address()], 990);
    assert_eq!(shares[servers[1].address()], 10);
}

#[tokio::test]
async fn least_request_follows_weights_when_idle() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = weighted_channel(&servers, [100, 50], BalancePolicy::LeastRequest).await;
    let shares = shares(&channel, 600).await;
    let heavy = shares[servers[0].address()];
    // Within eight standard deviations of 600 random draws.
    assert!((308..=492).contains(&heavy), "{heavy} of 600");
}

#[tokio::test]
async fn round_robin_calls_each_in_turn() {
    let servers = three();
    let channel = static_channel(servers.iter().map(EchoServer::address), |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, 3).await;
    for _ in 0..20 {
        let shares = shares(&channel, 3).await;
        assert_eq!(shares.len(), 3, "{shares:?}");
    }
}

#[tokio::test]
async fn every_policy_uses_all_endpoints() {
    let servers = three();
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let channel = static_channel(servers.iter().map(EchoServer::address), |builder| {
            builder.policy(policy)
        });
        wait_until_ready(&channel, 3).await;
        let load = Load::start(&channel, 8);
        for server in &servers {
            load.wait_until_called(server.address()).await;
        }
        load.finish().await.assert_no_failure();
    }
}

#[tokio::test]
async fn least_request_follows_weights_under_load() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = weighted_channel(&servers, [300, 100], BalancePolicy::LeastRequest).await;
    let mut client = EchoClient::new(channel.clone());
    let mut open = Vec::new();
    for _ in 0..80 {
        open.push(client.bidi(futures::stream::pending()).await.unwrap());
    }
    let heavy = status_of(&channel, servers[0].address()).unwrap().in_flight;
    assert!((59..=61).contains(&heavy), "{heavy} of 80");
    drop(open);
    wait_until("nothing is in flight", async || in_flight(&channel) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_and_weight_0_get_no_new_calls() {
    let servers = three();
    let addresses = servers.each_ref().map(EchoServer::address);
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let (sets, channel) = dynamic_channel(addresses, |builder| builder.policy(policy));
        wait_until_ready(&channel, 3).await;
        let load = Load::start(&channel, 8);
        load.wait_until_called(addresses[0]).await;
        load.wait_until_called(addresses[1]).await;

        sets.send([
            instance(addresses[0]).draining(true),
            instance(addresses[1]).weight(0),
            instance(addresses[2]),
        ]);
        wait_until("both drain", async || {
            addresses[..2].iter().all(|address| {
                let status = status_of(&channel, address).unwrap();
                status.state == EndpointState::Draining && status.in_flight == 0
            })
        })
        .await;
        // Calls picked before the change have ended by now.
        load.wait_for_calls(20).await;
        let calls = [0, 1].map(|which: usize| servers[which].counts().calls());
        load.wait_for_calls(300).await;
        assert_eq!(
            calls,
            [0, 1].map(|which: usize| servers[which].counts().calls())
        );

        // Both stayed connected, and are called again at once.
        sets.send(addresses.map(instance));
        load.wait_until_called(addresses[0]).await;
        load.wait_until_called(addresses[1]).await;
        load.finish().await.assert_no_failure();
        drop((sets, channel));
        for server in &servers {
            wait_until("the connections are closed", async || {
                server.counts().connections() == 0
            })
            .await;
        }
    }
    for server in &servers {
        assert_eq!(
            server.counts().accepted(),
            3,
            "one connection for each policy"
        );
    }
}

#[tokio::test]
async fn changed_metadata_keeps_the_endpoint() {
    let server = EchoServer::start();
    let other = EchoServer::start();
    let (sets, channel) = dynamic_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let slow = EchoRequest {
        delay_ms: 300,
        ..hello()
    };
    client.unary(slow).await.unwrap();
    let _open = client.bidi(futures::stream::pending()).await.unwrap();

    sets.send([
        instance(server.address())
            .weight(7)
            .zone("elsewhere")
            .metadata("changed", "yes"),
        instance(other.address()),
    ]);
    wait_until_ready(&channel, 2).await;
    let status = status_of(&channel, server.address()).unwrap();
    assert_eq!(status.weight, 7);
    assert_eq!(status.in_flight, 1);
    assert!(status.latency.unwrap() > Duration::from_millis(20));
    sets.send([instance(server.address())]);
    wait_until_ready(&channel, 1).await;
    let status = status_of(&channel, server.address()).unwrap();
    assert_eq!(status.in_flight, 1);
    assert!(status.latency.unwrap() > Duration::from_millis(20));
    assert_eq!(
        server.counts().accepted(),
        1,
        "the endpoint was connected again"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fast_failures_do_not_attract_calls() {
    let failed = Arc::<AtomicU64>::default();
    let counter = Arc::clone(&failed);
    let failing = RawServer::start(move |_, mut respond| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move {
            let head = http::Response::builder()
                .header("content-type", "application/grpc")
                .header("grpc-status", "14");
            respond.send_response(head.body(()).unwrap(), true).ok();
        }
    })
    .await;
    let slow = || Options {
        delay: Duration::from_millis(10),
        ..Options::default()
    };
    let healthy = [
        EchoServer::start_with(slow()),
        EchoServer::start_with(slow()),
    ];
    let addresses = [
        failing.address(),
        healthy[0].address(),
        healthy[1].address(),
    ];
    const TASKS: usize = 8;
    for policy in [BalancePolicy::PeakEwma, BalancePolicy::LeastRequest] {
        let channel = static_channel(addresses, |builder| builder.policy(policy));
        wait_until_ready(&channel, 3).await;
        let started = Instant::now();
        let load = Load::start(&channel, TASKS);
        load.wait_for_calls(1_000).await;
        let report = load.finish().await;
        let failed = failed.swap(0, Ordering::SeqCst);
        // A random policy would send a third of the calls there, and a policy that only sees its
        // latency even more. Each task may try the server once before its first failure is known,
        // and then once per second.
        println!(
            "{policy:?}: {failed} of {} calls went to the failing server",
            report.calls()
        );
        let tries = (started.elapsed().as_secs() + 2) * TASKS as u64;
        assert!(
            failed <= tries,
            "{policy:?}: {failed} of {}, more than {tries}",
            report.calls()
        );
    }
}

#[tokio::test]
async fn server_that_hangs_from_the_start_is_avoided() {
    let delayed = |delay| {
        EchoServer::start_with(Options {
            delay,
            ..Options::default()
        })
    };
    let hangs = delayed(10 * crate::support::PATIENCE);
    let healthy = delayed(Duration::from_millis(5));
    let channel = static_channel([hangs.address(), healthy.address()], |builder| builder);
    wait_until_ready(&channel, 2).await;
    const CALLS: usize = 40;
    for _ in 0..CALLS {
        // The caller's own timeout, of which the channel only sees the cancellation.
        let limit = Duration::from_millis(500);
        if let Ok(server) = tokio::time::timeout(limit, call(&channel)).await {
            assert_eq!(server.unwrap(), healthy.address());
        }
    }
    let received = hangs.counts().calls() as usize;
    let latency = status_of(&channel, hangs.address()).unwrap().latency;
    assert!(latency.is_some() == (received > 0), "{latency:?}");
    // A random policy would send half of the calls there. One call is enough to notice, but stalls
    // of the machine make the other server look alike for a while.
    assert!(received <= CALLS / 8, "{received} of {CALLS}");
}

/// Delays in the ratio of 50 to 1, and few tasks, so that the servers' delays limit the throughput
/// even in an unoptimized build on a busy machine.
const SLOW: Duration = Duration::from_millis(1_000);
const FAST: Duration = Duration::from_millis(20);
const TASKS: usize = 10;
const MEASURED: Duration = Duration::from_secs(3);

/// The calls per second of [`TASKS`] tasks.
async fn throughput<T>(channel: T) -> f64
where
    T: GrpcService<Body> + Clone + Send + 'static,
    T::Future: Send,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let started = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let mut client = EchoClient::new(channel.clone());
        tasks.spawn(async move {
            let mut calls = 0u64;
            while started.elapsed() < MEASURED {
                client.unary(hello()).await.unwrap();
                calls += 1;
            }
            calls
        });
    }
    let calls: u64 = tasks.join_all().await.into_iter().sum();
    calls as f64 / started.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_slow_server_gives_5_times_tonics_throughput() {
    let _alone = alone().await;
    let servers = [SLOW, FAST, FAST].map(|delay| {
        EchoServer::start_with(Options {
            delay,
            ..Options::default()
        })
    });
    let addresses = servers.each_ref().map(EchoServer::address);
    let mut ratios = Vec::new();
    // Both are measured in turn on new channels. The median of three rounds counts, so that a stall
    // of the machine in one round does not matter.
    for _ in 0..3 {
        let tonics = Channel::balance_list(addresses.into_iter().map(|address| {
            let endpoint = Endpoint::from_shared(format!("http://{address}"));
            endpoint.unwrap().tcp_nodelay(true)
        }));
        // Connects to the servers before the measurement.
        for _ in 0..5 {
            EchoClient::new(tonics.clone())
                .unary(hello())
                .await
                .unwrap();
        }
        let tonics = throughput(tonics).await;
        let channel = static_channel(addresses, |builder| builder);
        wait_until_ready(&channel, 3).await;
        let ours = throughput(channel).await;
        let ratio = ours / tonics;
        println!("{ours:.0} calls/s against {tonics:.0}: {ratio:.1}");
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    assert!(ratios[1] >= 5.0, "{ratios:?}");
}

#[tokio::test]
async fn round_robin_follows_changed_weights() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let (sets, source) = SetSender::new();
    let channel = BalancedChannel::builder(source)
        .policy(BalancePolicy::RoundRobin)
        .build()
        .unwrap();
    for (weights, expected) in [
        ([1, 1], [100, 100]),
        ([3, 1], [150, 50]),
        ([1, 4], [40, 160]),
    ] {
        sets.send(
            servers
                .iter()
                .zip(weights)
                .map(|(server, weight)| instance(server.address()).weight(weight)),
        );
        wait_until_ready(&channel, 2).await;
        wait_until("the weights are applied", async || {
            servers.iter().zip(weights).all(|(server, weight)| {
                status_of(&channel, server.address()).is_some_and(|s| s.weight == weight)
            })
        })
        .await;
        // The picker follows the statuses.
        wait_until("the picker has the weights", async || {
            let shares = shares(&channel, 20).await;
            shares[servers[0].address()].abs_diff(expected[0] / 10) <= 2
        })
        .await;
        let shares = shares(&channel, 200).await;
        for (server, expected) in servers.iter().zip(expected) {
            let share = shares[server.address()];
            assert!(share.abs_diff(expected) <= 4, "{weights:?}: {share}");
        }
    }
}
