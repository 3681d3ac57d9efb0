//! Servers that die, leave, come back or fall silent, under load: what a caller sees of it.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::{Duration, Instant};

use futures::channel::mpsc;
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{EndpointState, RetryPolicy};
use helloworld::echo::echo_client::EchoClient;
use helloworld::echo::{EchoReply, EchoRequest};
use nix::sys::signal::Signal;
use support::balanced::{
    Load, Sets, call, call_within, changing, fixed, hello, in_flight, instance, is_ready, refusing,
    status_of, until_ready,
};
use support::echo::{EchoServer, Options};
use support::eventually;
use support::process::EchoProcess;
use tonic::{Code, Streaming};

/// The program of [`EchoProcess`]; does nothing when it was not started as that.
#[test]
fn echo_server_process() {
    support::process::serve_as_process();
}

/// A bidirectional stream that is open on one server.
struct Talk {
    requests: mpsc::UnboundedSender<EchoRequest>,
    replies: Streaming<EchoReply>,
    server: String,
}

impl Talk {
    async fn begin(channel: &goo_etcd::BalancedChannel) -> Self {
        let (requests, receiver) = mpsc::unbounded();
        let mut client = EchoClient::new(channel.clone());
        let replies = client.bidi(receiver).await.unwrap().into_inner();
        let server = String::new();
        let mut talk = Self {
            requests,
            replies,
            server,
        };
        talk.server = talk.say().await;
        talk
    }

    /// Until each of the servers has one.
    async fn with_each(channel: &goo_etcd::BalancedChannel, servers: &[&str]) -> Vec<Self> {
        let mut talks: Vec<Self> = Vec::new();
        while !servers
            .iter()
            .all(|server| talks.iter().any(|talk| talk.server == *server))
        {
            assert!(talks.len() < 1_000, "a server gets no stream");
            talks.push(Self::begin(channel).await);
        }
        talks
    }

    /// A message and its answer: who answered.
    async fn say(&mut self) -> String {
        self.requests.unbounded_send(hello()).unwrap();
        let reply = self.replies.message().await.unwrap();
        reply.expect("the stream goes on").server
    }

    /// To the end, which must be the one that a healthy server makes.
    async fn finish(mut self) {
        assert_eq!(self.say().await, self.server);
        self.requests.close_channel();
        assert_eq!(self.replies.message().await.unwrap(), None);
    }
}

async fn finish_all(talks: Vec<Talk>) {
    for talk in talks {
        talk.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_one_live_and_one_refusing_when_32_tasks_make_20_000_calls_then_none_fails() {
    let live = EchoServer::start();
    let dead = refusing();
    let channel = fixed([live.address(), &dead], |builder| builder);
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let channel = channel.clone();
        tasks.spawn(async move {
            for _ in 0..625 {
                call(&channel).await.unwrap();
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert_eq!(live.counts().calls(), 20_000);
    assert!(!is_ready(&channel, &dead));
    let error = status_of(&channel, &dead).unwrap().last_error.unwrap();
    assert!(error.contains("Connection refused"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_load_on_three_when_one_is_killed_then_only_calls_in_flight_on_it_fail() {
    const TASKS: usize = 32;
    let mut servers = [
        EchoProcess::start().await,
        EchoProcess::start().await,
        EchoProcess::start().await,
    ];
    let addresses: Vec<String> = servers.iter().map(|s| s.address().to_owned()).collect();
    let channel = fixed(addresses.iter().map(String::as_str), |builder| builder);
    until_ready(&channel, 3).await;
    let load = Load::start(&channel, TASKS);
    for address in &addresses {
        load.reaches(address).await;
    }

    let killed = addresses[0].as_str();
    servers[0].signal(Signal::SIGKILL);
    eventually("it is out of the picker", async || {
        !is_ready(&channel, killed)
    })
    .await;
    let gone = Instant::now();
    load.goes_on_for(2_000).await;
    let report = load.finish().await;

    for failure in &report.failures {
        assert!(failure.begun < gone, "begun after it was gone: {failure:?}");
        assert_eq!(failure.status.code(), Code::Unavailable);
        assert!(failure.status.message().contains(killed), "{failure:?}");
    }
    println!(
        "{} of {} calls failed",
        report.failures.len(),
        report.calls()
    );
    // One of each task at the most: who has seen it fail calls another.
    assert!(report.failures.len() <= TASKS, "{}", report.failures.len());
    servers[0].ended().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_retry_policy_of_two_attempts_when_one_of_three_is_killed_then_no_call_fails() {
    let servers = [
        EchoProcess::start().await,
        EchoProcess::start().await,
        EchoProcess::start().await,
    ];
    let addresses: Vec<String> = servers.iter().map(|s| s.address().to_owned()).collect();
    let channel = fixed(addresses.iter().map(String::as_str), |builder| {
        builder.retry(RetryPolicy::new(2))
    });
    until_ready(&channel, 3).await;
    let load = Load::start(&channel, 32);
    load.reaches(&addresses[0]).await;
    servers[0].signal(Signal::SIGKILL);
    eventually("it is out of the picker", async || {
        !is_ready(&channel, &addresses[0])
    })
    .await;
    load.goes_on_for(1_000).await;
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_long_streams_when_one_of_three_shuts_down_gracefully_then_nothing_fails() {
    let mut leaving = EchoServer::start();
    let staying = [EchoServer::start(), EchoServer::start()];
    let addresses = [
        leaving.address().to_owned(),
        staying[0].address().to_owned(),
        staying[1].address().to_owned(),
    ];
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let channel = fixed(addresses.iter().copied(), |builder| builder);
    until_ready(&channel, 3).await;
    let mut talks = Talk::with_each(&channel, &addresses).await;
    let load = Load::start(&channel, 32);
    load.reaches(addresses[0]).await;

    leaving.begin_shutdown();
    eventually("it is out of the picker", async || {
        !is_ready(&channel, addresses[0])
    })
    .await;
    load.goes_on_for(1_000).await;
    for talk in &mut talks {
        assert_eq!(talk.say().await, talk.server);
    }
    assert!(!leaving.has_ended(), "its stream is still open");
    finish_all(talks).await;
    leaving.shutdown().await;
    load.goes_on_for(300).await;
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_load_when_all_three_are_restarted_one_after_another_then_no_call_fails() {
    let mut servers = [
        EchoServer::start(),
        EchoServer::start(),
        EchoServer::start(),
    ];
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let channel = fixed(addresses.iter().map(String::as_str), |builder| builder);
    until_ready(&channel, 3).await;
    let load = Load::start(&channel, 32);
    for (server, address) in servers.iter_mut().zip(&addresses) {
        load.reaches(address).await;
        let old = std::mem::replace(server, EchoServer::start());
        old.shutdown().await;
        load.goes_on_for(100).await;
        *server = EchoServer::start_at(address);
        until_ready(&channel, 3).await;
        load.reaches(address).await;
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_more_calls_than_streams_when_a_server_shuts_down_then_those_that_wait_move_on() {
    let few = || Options {
        max_concurrent_streams: Some(2),
        delay: Duration::from_millis(5),
        ..Options::default()
    };
    let servers = [EchoServer::with(few()), EchoServer::with(few())];
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let channel = fixed(addresses.iter().map(String::as_str), |builder| builder);
    let [mut leaving, mut staying] = servers;
    until_ready(&channel, 2).await;
    let load = Load::start(&channel, 32);
    for _ in 0..10 {
        load.reaches(leaving.address()).await;
        load.goes_on_for(20).await;
        let address = leaving.address().to_owned();
        leaving.shutdown().await;
        leaving = EchoServer::with(Options {
            address: Some(address),
            ..few()
        });
        until_ready(&channel, 2).await;
        std::mem::swap(&mut leaving, &mut staying);
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_load_and_open_streams_when_an_endpoint_is_removed_then_they_finish_and_it_closes() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let (sets, channel) = changing(addresses.iter().copied(), |builder| builder);
    until_ready(&channel, 2).await;
    let talks = Talk::with_each(&channel, &addresses).await;
    let load = Load::start(&channel, 32);
    load.reaches(addresses[0]).await;

    sets.send([instance(addresses[1])]);
    eventually("it is not shown any more", async || {
        status_of(&channel, addresses[0]).is_none()
    })
    .await;
    load.goes_on_for(300).await;
    // Those that were picked before have been sent by now.
    let calls = servers[0].counts().calls();
    load.goes_on_for(1_000).await;
    assert_eq!(servers[0].counts().calls(), calls, "it was called again");
    assert_eq!(
        servers[0].counts().connections(),
        1,
        "its streams need it still"
    );
    finish_all(talks).await;
    eventually("its connection is closed", async || {
        servers[0].counts().connections() == 0
    })
    .await;
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_load_when_endpoints_come_and_go_all_the_time_then_no_call_fails() {
    let few = || Options {
        max_concurrent_streams: Some(4),
        ..Options::default()
    };
    let servers = [few(), few(), few()].map(EchoServer::with);
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let (sets, channel) = changing(addresses.iter().map(String::as_str), |builder| builder);
    until_ready(&channel, 3).await;
    let load = Load::start(&channel, 32);
    for round in 0..60 {
        let without = &addresses[round % 3];
        let others = addresses.iter().filter(|address| *address != without);
        sets.send(others.map(|address| instance(address)));
        load.goes_on_for(10).await;
        sets.send(addresses.iter().map(|address| instance(address)));
        until_ready(&channel, 3).await;
    }
    load.finish().await.assert_no_failure();
    for server in &servers {
        eventually("one connection is left", async || {
            server.counts().connections() == 1
        })
        .await;
    }
}

#[tokio::test]
async fn given_a_call_that_waits_when_the_only_server_restarts_then_it_succeeds() {
    let server = EchoServer::start();
    let address = server.address().to_owned();
    let channel = fixed([address.as_str()], |builder| {
        builder.ready_timeout(support::PATIENCE)
    });
    until_ready(&channel, 1).await;
    drop(server);
    eventually("it is lost", async || !is_ready(&channel, &address)).await;
    let waiting = tokio::spawn({
        let channel = channel.clone();
        async move { call(&channel).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    let _server = EchoServer::start_at(&address);
    assert_eq!(waiting.await.unwrap().unwrap(), address);
}

const INTERVAL: Duration = Duration::from_millis(1_000);
/// Longer than a busy machine keeps a peer from answering that is there.
const TIMEOUT: Duration = Duration::from_millis(1_000);

/// What scheduling on a busy machine adds to the promised time.
const MARGIN: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_an_idle_channel_when_a_peer_falls_silent_then_keep_alive_takes_it_out_in_time() {
    let servers = [EchoProcess::start().await, EchoProcess::start().await];
    let silent = servers[0].address();
    let channel = fixed(servers.iter().map(EchoProcess::address), |builder| {
        builder
            .http2_keep_alive_interval(Some(INTERVAL))
            .keep_alive_timeout(TIMEOUT)
    });
    until_ready(&channel, 2).await;
    // It holds while the peer answers, for longer than it takes to be found silent.
    tokio::time::sleep(2 * (INTERVAL + TIMEOUT)).await;
    assert!(is_ready(&channel, silent));

    servers[0].pause().await;
    let stopped = Instant::now();
    eventually("it is out of the picker", async || {
        !is_ready(&channel, silent)
    })
    .await;
    let took = stopped.elapsed();
    assert!(took <= INTERVAL + TIMEOUT + MARGIN, "{took:?}");
    let error = status_of(&channel, silent).unwrap().last_error.unwrap();
    assert!(error.contains("keep-alive"), "{error}");
    for _ in 0..100 {
        assert_eq!(call(&channel).await.unwrap(), servers[1].address());
    }

    servers[0].signal(Signal::SIGCONT);
    until_ready(&channel, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_calls_in_flight_on_a_peer_that_falls_silent_then_they_fail_in_time() {
    let server = EchoProcess::start().await;
    let channel = fixed([server.address()], |builder| {
        builder
            .http2_keep_alive_interval(Some(INTERVAL))
            .keep_alive_timeout(TIMEOUT)
    });
    until_ready(&channel, 1).await;
    // Not idle: the last sign of life is as recent as can be.
    tokio::time::sleep(INTERVAL / 10).await;
    call(&channel).await.unwrap();
    server.pause().await;
    let stopped = Instant::now();
    let error = call(&channel).await.unwrap_err();
    let took = stopped.elapsed();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(error.message().contains(server.address()), "{error:?}");
    assert!(took <= INTERVAL + TIMEOUT + MARGIN, "{took:?}");
    assert_eq!(in_flight(&channel), 0);
    server.signal(Signal::SIGCONT);
}

#[tokio::test]
async fn given_a_peer_that_accepts_and_says_nothing_when_called_then_only_the_other_is_used() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    let _accepting = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((io, _)) = listener.accept().await {
            held.push(io);
        }
    }));
    let live = EchoServer::start();
    let channel = fixed([silent.as_str(), live.address()], |builder| {
        builder.connect_timeout(Duration::from_millis(300))
    });
    for _ in 0..100 {
        assert_eq!(call(&channel).await.unwrap(), live.address());
    }
    eventually("it is given up", async || {
        status_of(&channel, &silent).unwrap().last_error.is_some()
    })
    .await;
    let error = status_of(&channel, &silent).unwrap().last_error.unwrap();
    assert!(
        error.contains("HTTP/2 handshake took more than 300ms"),
        "{error}"
    );
}

#[tokio::test]
async fn given_an_idle_channel_when_the_set_changes_then_the_first_call_finds_it_connected() {
    let old = EchoServer::start();
    let new = EchoServer::start();
    let (sets, channel) = changing([old.address()], |builder| builder.wait_for_ready(false));
    until_ready(&channel, 1).await;
    sets.send([instance(new.address())]);
    eventually("the change is applied without a call", async || {
        is_ready(&channel, new.address()) && channel.endpoints().len() == 1
    })
    .await;
    assert_eq!(new.counts().connections(), 1);
    eventually("the old connection is closed without a call", async || {
        old.counts().connections() == 0
    })
    .await;
    assert_eq!(call(&channel).await.unwrap(), new.address());
    assert_eq!(new.counts().accepted(), 1);
    assert_eq!(old.counts().calls(), 0);
}

#[tokio::test]
async fn given_an_instance_that_vanished_when_it_comes_back_elsewhere_then_its_old_address_is_not_called()
 {
    let old = EchoServer::start();
    let others = [EchoServer::start(), EchoServer::start()];
    let elsewhere = refusing();
    let moving = |address: &str| instance(address).id("moving");
    let staying = || others.iter().map(|other| instance(other.address()));
    let (sets, source) = Sets::new();
    let channel = BalancedChannel::builder(source)
        .mass_deletion_guard(support::PATIENCE)
        .mass_deletion_window(10 * support::PATIENCE)
        .build()
        .unwrap();
    sets.send(staying().chain([moving(old.address())]));
    until_ready(&channel, 3).await;
    // Alone, so that it is taken at its word.
    sets.send(staying());
    until_ready(&channel, 2).await;
    sets.send(staying().chain([moving(&elsewhere)]));
    eventually("it is known where it is now", async || {
        status_of(&channel, &elsewhere).is_some()
    })
    .await;
    assert!(status_of(&channel, old.address()).is_none());
    for _ in 0..100 {
        call(&channel).await.unwrap();
    }
    assert_eq!(old.counts().calls(), 0);
    eventually("its old connection is closed", async || {
        old.counts().connections() == 0
    })
    .await;
}

#[tokio::test]
async fn given_an_instance_that_is_kept_when_it_comes_back_elsewhere_then_it_is_kept_where_it_was()
{
    let servers = [EchoServer::start(), EchoServer::start()];
    let addresses = servers.each_ref().map(EchoServer::address);
    let elsewhere = refusing();
    let (sets, source) = Sets::new();
    let channel = BalancedChannel::builder(source)
        .mass_deletion_guard(10 * support::PATIENCE)
        .build()
        .unwrap();
    let moving = |address: &str| instance(address).id("moving");
    sets.send([moving(addresses[0]), instance(addresses[1])]);
    until_ready(&channel, 2).await;
    let is_retained = |address| status_of(&channel, address).is_some_and(|status| status.retained);
    sets.send([]);
    eventually("both are kept", async || {
        addresses.into_iter().all(is_retained)
    })
    .await;
    sets.send([moving(&elsewhere)]);
    eventually("it is known where it is now", async || {
        status_of(&channel, &elsewhere).is_some()
    })
    .await;
    assert!(addresses.into_iter().all(is_retained));
    let load = Load::start(&channel, 4);
    for address in addresses {
        load.reaches(address).await;
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test]
async fn given_a_source_that_ends_when_its_last_set_is_used_then_calls_go_on() {
    let server = EchoServer::start();
    let (sets, channel) = changing([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    drop::<Sets>(sets);
    tokio::task::yield_now().await;
    for _ in 0..10 {
        call(&channel).await.unwrap();
    }
}

#[tokio::test]
async fn given_the_last_clone_is_dropped_when_calls_have_ended_then_connections_close() {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| {
        builder.connections_per_endpoint(3)
    });
    eventually("three connections", async || {
        status_of(&channel, server.address()).is_some_and(|status| status.connections == 3)
    })
    .await;
    let talk = Talk::begin(&channel).await;
    let clone = channel.clone();
    drop(channel);
    call(&clone).await.unwrap();
    drop(clone);
    eventually("only the connection with the stream is left", async || {
        server.counts().connections() == 1
    })
    .await;
    talk.finish().await;
    eventually("no connection is left", async || {
        server.counts().connections() == 0
    })
    .await;
}

#[tokio::test]
async fn given_a_server_that_is_not_there_yet_when_it_comes_up_then_it_becomes_ready() {
    let address = refusing();
    let channel = fixed([address.as_str()], |builder| builder);
    eventually("the first attempt has failed", async || {
        status_of(&channel, &address).is_some_and(|e| e.state == EndpointState::Backoff)
    })
    .await;
    let _server = EchoServer::start_at(&address);
    let answer = call_within(&channel, support::PATIENCE).await.unwrap();
    assert_eq!(answer, address);
}
