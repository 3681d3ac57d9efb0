//! Which server gets how many calls.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, EndpointState, Source};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use support::balanced::{
    Load, Sets, call, changing, fixed, hello, in_flight, instance, status_of, until_ready,
};
use support::echo::{EchoServer, Options};
use support::eventually;
use support::raw::RawServer;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::transport::{Channel, Endpoint};

fn three() -> [EchoServer; 3] {
    std::array::from_fn(|_| EchoServer::start())
}

/// To both, with these weights.
async fn weighted(
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
    until_ready(&channel, 2).await;
    channel
}

/// How many of so many calls, one after another, each server answers.
async fn shares(channel: &BalancedChannel, calls: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..calls {
        *shares.entry(call(channel).await.unwrap()).or_default() += 1;
    }
    shares
}

#[tokio::test]
async fn given_weights_99_and_1_when_1_000_calls_go_round_then_they_are_990_and_10() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = weighted(&servers, [99, 1], BalancePolicy::RoundRobin).await;
    let shares = shares(&channel, 1_000).await;
    assert_eq!(shares[servers[0].address()], 990);
    assert_eq!(shares[servers[1].address()], 10);
}

#[tokio::test]
async fn given_weights_100_and_50_when_called_one_at_a_time_then_least_request_gives_2_to_1() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = weighted(&servers, [100, 50], BalancePolicy::LeastRequest).await;
    let shares = shares(&channel, 600).await;
    let heavy = shares[servers[0].address()];
    // Eight standard deviations of what 600 draws give.
    assert!((308..=492).contains(&heavy), "{heavy} of 600");
}

#[tokio::test]
async fn given_equal_weights_when_calls_go_round_then_each_is_called_in_turn() {
    let servers = three();
    let channel = fixed(servers.iter().map(EchoServer::address), |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    until_ready(&channel, 3).await;
    for _ in 0..20 {
        let shares = shares(&channel, 3).await;
        assert_eq!(shares.len(), 3, "{shares:?}");
    }
}

#[tokio::test]
async fn given_any_policy_when_all_are_alike_then_every_one_is_called() {
    let servers = three();
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let channel = fixed(servers.iter().map(EchoServer::address), |builder| {
            builder.policy(policy)
        });
        until_ready(&channel, 3).await;
        let load = Load::start(&channel, 8);
        for server in &servers {
            load.reaches(server.address()).await;
        }
        load.finish().await.assert_no_failure();
    }
}

#[tokio::test]
async fn given_weights_3_and_1_when_streams_stay_open_then_least_request_holds_them_3_to_1() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = weighted(&servers, [300, 100], BalancePolicy::LeastRequest).await;
    let mut client = EchoClient::new(channel.clone());
    let mut open = Vec::new();
    for _ in 0..80 {
        open.push(client.bidi(futures::stream::pending()).await.unwrap());
    }
    let heavy = status_of(&channel, servers[0].address()).unwrap().in_flight;
    assert!((59..=61).contains(&heavy), "{heavy} of 80");
    drop(open);
    eventually("nothing is in flight", async || in_flight(&channel) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_load_when_an_instance_drains_or_has_weight_0_then_it_gets_nothing_new() {
    let servers = three();
    let addresses = servers.each_ref().map(EchoServer::address);
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let (sets, channel) = changing(addresses, |builder| builder.policy(policy));
        until_ready(&channel, 3).await;
        let load = Load::start(&channel, 8);
        load.reaches(addresses[0]).await;
        load.reaches(addresses[1]).await;

        sets.send([
            instance(addresses[0]).draining(true),
            instance(addresses[1]).weight(0),
            instance(addresses[2]),
        ]);
        eventually("both drain", async || {
            addresses[..2].iter().all(|address| {
                let status = status_of(&channel, address).unwrap();
                status.state == EndpointState::Draining && status.in_flight == 0
            })
        })
        .await;
        // Those that were picked before have ended by now.
        load.goes_on_for(20).await;
        let calls = [0, 1].map(|which: usize| servers[which].counts().calls());
        load.goes_on_for(300).await;
        assert_eq!(
            calls,
            [0, 1].map(|which: usize| servers[which].counts().calls())
        );

        // They stayed connected, and are there at once when they are wanted again.
        sets.send(addresses.map(instance));
        load.reaches(addresses[0]).await;
        load.reaches(addresses[1]).await;
        load.finish().await.assert_no_failure();
        drop((sets, channel));
        for server in &servers {
            eventually("the connections are closed", async || {
                server.counts().connections() == 0
            })
            .await;
        }
    }
    for server in &servers {
        assert_eq!(server.counts().accepted(), 3, "one for each policy");
    }
}

#[tokio::test]
async fn given_calls_in_flight_when_metadata_changes_then_the_endpoint_is_the_same() {
    let server = EchoServer::start();
    let other = EchoServer::start();
    let (sets, channel) = changing([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
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
    until_ready(&channel, 2).await;
    let status = status_of(&channel, server.address()).unwrap();
    assert_eq!(status.weight, 7);
    assert_eq!(status.in_flight, 1);
    assert!(status.latency.unwrap() > Duration::from_millis(20));
    sets.send([instance(server.address())]);
    until_ready(&channel, 1).await;
    let status = status_of(&channel, server.address()).unwrap();
    assert_eq!(status.in_flight, 1);
    assert!(status.latency.unwrap() > Duration::from_millis(20));
    assert_eq!(server.counts().accepted(), 1, "it was connected once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_one_of_three_that_fails_fast_when_called_then_it_does_not_look_fast() {
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
    let healthy = [EchoServer::with(slow()), EchoServer::with(slow())];
    let addresses = [
        failing.address(),
        healthy[0].address(),
        healthy[1].address(),
    ];
    const TRIERS: usize = 8;
    for policy in [BalancePolicy::PeakEwma, BalancePolicy::LeastRequest] {
        let channel = fixed(addresses, |builder| builder.policy(policy));
        until_ready(&channel, 3).await;
        let begun = Instant::now();
        let load = Load::start(&channel, TRIERS);
        load.goes_on_for(1_000).await;
        let report = load.finish().await;
        let failed = failed.swap(0, Ordering::SeqCst);
        // At random it would get a third, and more if it looked as fast as it is. Each task may try it once
        // before its first failure is known, and once a second after.
        println!(
            "{policy:?}: {failed} of {} calls went to it",
            report.calls()
        );
        let tries = (begun.elapsed().as_secs() + 2) * TRIERS as u64;
        assert!(
            failed <= tries,
            "{policy:?}: {failed} of {}, more than {tries}",
            report.calls()
        );
    }
}

#[tokio::test]
async fn given_a_server_that_hangs_from_the_beginning_when_callers_give_up_then_it_is_left_alone() {
    let delayed = |delay| {
        EchoServer::with(Options {
            delay,
            ..Options::default()
        })
    };
    let hangs = delayed(10 * support::PATIENCE);
    let answers = delayed(Duration::from_millis(5));
    let channel = fixed([hangs.address(), answers.address()], |builder| builder);
    until_ready(&channel, 2).await;
    const CALLS: usize = 40;
    let mut in_vain = 0;
    for _ in 0..CALLS {
        // A time-out of the caller's own, of which the channel knows nothing.
        let limit = Duration::from_millis(200);
        match tokio::time::timeout(limit, call(&channel)).await {
            Ok(answer) => assert_eq!(answer.unwrap(), answers.address()),
            Err(_) => in_vain += 1,
        }
    }
    let latency = status_of(&channel, hangs.address()).unwrap().latency;
    assert!(latency.is_some() == (in_vain > 0), "{latency:?}");
    // At random it would get half; once is enough to know it, and stalls of the machine make the other look
    // like it for a while.
    assert!(in_vain <= CALLS / 8, "{in_vain} of {CALLS}");
}

/// 50 to 1, as 100 ms to 2 ms, but long enough that waiting takes the time and not an unoptimized
/// build on a busy machine.
const SLOW: Duration = Duration::from_millis(1_000);
const FAST: Duration = Duration::from_millis(20);
const TASKS: usize = 30;
const MEASURED: Duration = Duration::from_secs(3);

/// Calls per second of several tasks.
async fn throughput<T>(channel: T) -> f64
where
    T: GrpcService<Body> + Clone + Send + 'static,
    T::Future: Send,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let mut client = EchoClient::new(channel.clone());
        tasks.spawn(async move {
            let mut calls = 0u64;
            while begun.elapsed() < MEASURED {
                client.unary(hello()).await.unwrap();
                calls += 1;
            }
            calls
        });
    }
    let calls: u64 = tasks.join_all().await.into_iter().sum();
    calls as f64 / begun.elapsed().as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_one_slow_of_three_when_30_tasks_call_then_5_times_what_tonics_balancing_does() {
    let servers = [SLOW, FAST, FAST].map(|delay| {
        EchoServer::with(Options {
            delay,
            ..Options::default()
        })
    });
    let addresses = servers.each_ref().map(EchoServer::address);
    let mut ratios = Vec::new();
    // In turn, and each time on new channels: what a stall of the machine does to one round, the other
    // two outvote.
    for _ in 0..3 {
        let tonics = Channel::balance_list(addresses.into_iter().map(|address| {
            let endpoint = Endpoint::from_shared(format!("http://{address}"));
            endpoint.unwrap().tcp_nodelay(true)
        }));
        // Connected, both, before it counts.
        for _ in 0..5 {
            EchoClient::new(tonics.clone())
                .unary(hello())
                .await
                .unwrap();
        }
        let tonics = throughput(tonics).await;
        let channel = fixed(addresses, |builder| builder);
        until_ready(&channel, 3).await;
        let ours = throughput(channel).await;
        let ratio = ours / tonics;
        println!("{ours:.0} calls/s against {tonics:.0}: {ratio:.1}");
        ratios.push(ratio);
    }
    ratios.sort_by(f64::total_cmp);
    assert!(ratios[1] >= 5.0, "{ratios:?}");
}

#[tokio::test]
async fn given_an_instance_whose_weight_changes_when_calls_go_round_then_the_shares_follow() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let (sets, source) = Sets::new();
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
        until_ready(&channel, 2).await;
        eventually("the weights are applied", async || {
            servers.iter().zip(weights).all(|(server, weight)| {
                status_of(&channel, server.address()).is_some_and(|s| s.weight == weight)
            })
        })
        .await;
        // The picker follows the statuses.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let shares = shares(&channel, 200).await;
        for (server, expected) in servers.iter().zip(expected) {
            let share = shares[server.address()];
            assert!(share.abs_diff(expected) <= 4, "{weights:?}: {share}");
        }
    }
}
