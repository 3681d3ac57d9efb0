//! Servers that crash, shut down, return or fall silent while calls are made.

use std::time::{Duration, Instant};

use crate::support::balanced::{
    Load, SetSender, call, call_with_timeout, dynamic_channel, hello, in_flight, instance,
    is_ready, static_channel, status_of, unused_address, wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::echo_process::EchoProcess;
use crate::support::wait_until;
use futures::channel::mpsc;
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{EndpointState, RetryPolicy};
use helloworld::echo::echo_client::EchoClient;
use helloworld::echo::{EchoReply, EchoRequest};
use nix::sys::signal::Signal;
use tonic::{Code, Streaming};

/// An open bidirectional stream.
struct OpenStream {
    requests: mpsc::UnboundedSender<EchoRequest>,
    replies: Streaming<EchoReply>,
    /// The server at the other end.
    server: String,
}

impl OpenStream {
    async fn open(channel: &goo_etcd::BalancedChannel) -> Self {
        let (requests, receiver) = mpsc::unbounded();
        let mut client = EchoClient::new(channel.clone());
        let replies = client.bidi(receiver).await.unwrap().into_inner();
        let server = String::new();
        let mut stream = Self {
            requests,
            replies,
            server,
        };
        stream.server = stream.exchange().await;
        stream
    }

    /// Opens streams until each server has one.
    async fn open_on_each(channel: &goo_etcd::BalancedChannel, servers: &[&str]) -> Vec<Self> {
        let mut streams: Vec<Self> = Vec::new();
        while !servers
            .iter()
            .all(|server| streams.iter().any(|stream| stream.server == *server))
        {
            assert!(streams.len() < 1_000, "a server gets no stream");
            streams.push(Self::open(channel).await);
        }
        streams
    }

    /// Sends a message and returns the server that replied.
    async fn exchange(&mut self) -> String {
        self.requests.unbounded_send(hello()).unwrap();
        let reply = self.replies.message().await.unwrap();
        reply.expect("the stream is open").server
    }

    /// Ends the stream, which must end with the status OK.
    async fn finish(mut self) {
        assert_eq!(self.exchange().await, self.server);
        self.requests.close_channel();
        assert_eq!(self.replies.message().await.unwrap(), None);
    }
}

async fn finish_all(streams: Vec<OpenStream>) {
    for stream in streams {
        stream.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_endpoint_fails_no_call() {
    let live = EchoServer::start();
    let dead = unused_address();
    let channel = static_channel([live.address(), &dead], |builder| builder);
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
async fn killed_server_fails_only_calls_in_flight_on_it() {
    const TASKS: usize = 32;
    let mut servers = [
        EchoProcess::start().await,
        EchoProcess::start().await,
        EchoProcess::start().await,
    ];
    let addresses: Vec<String> = servers.iter().map(|s| s.address().to_owned()).collect();
    let channel = static_channel(addresses.iter().map(String::as_str), |builder| builder);
    wait_until_ready(&channel, 3).await;
    let load = Load::start(&channel, TASKS);
    for address in &addresses {
        load.wait_until_called(address).await;
    }

    let killed = addresses[0].as_str();
    servers[0].signal(Signal::SIGKILL);
    wait_until("the endpoint is not ready", async || {
        !is_ready(&channel, killed)
    })
    .await;
    let removed = Instant::now();
    load.wait_for_calls(2_000).await;
    let report = load.finish().await;

    for failure in &report.failures {
        assert!(
            failure.started < removed,
            "started after the endpoint was removed: {failure:?}"
        );
        assert_eq!(failure.status.code(), Code::Unavailable);
        assert!(failure.status.message().contains(killed), "{failure:?}");
    }
    println!(
        "{} of {} calls failed",
        report.failures.len(),
        report.calls()
    );
    // At most one per task: after a failure the task's next call goes to another server.
    assert!(report.failures.len() <= TASKS, "{}", report.failures.len());
    servers[0].wait().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retry_hides_a_killed_server() {
    let servers = [
        EchoProcess::start().await,
        EchoProcess::start().await,
        EchoProcess::start().await,
    ];
    let addresses: Vec<String> = servers.iter().map(|s| s.address().to_owned()).collect();
    let channel = static_channel(addresses.iter().map(String::as_str), |builder| {
        builder.retry(RetryPolicy::new(2))
    });
    wait_until_ready(&channel, 3).await;
    let load = Load::start(&channel, 32);
    load.wait_until_called(&addresses[0]).await;
    servers[0].signal(Signal::SIGKILL);
    wait_until("the endpoint is not ready", async || {
        !is_ready(&channel, &addresses[0])
    })
    .await;
    load.wait_for_calls(1_000).await;
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn graceful_shutdown_finishes_long_streams() {
    let mut leaving = EchoServer::start();
    let staying = [EchoServer::start(), EchoServer::start()];
    let addresses = [
        leaving.address().to_owned(),
        staying[0].address().to_owned(),
        staying[1].address().to_owned(),
    ];
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let channel = static_channel(addresses.iter().copied(), |builder| builder);
    wait_until_ready(&channel, 3).await;
    let mut streams = OpenStream::open_on_each(&channel, &addresses).await;
    let load = Load::start(&channel, 32);
    load.wait_until_called(addresses[0]).await;

    leaving.begin_shutdown();
    wait_until("the endpoint is not ready", async || {
        !is_ready(&channel, addresses[0])
    })
    .await;
    load.wait_for_calls(1_000).await;
    for stream in &mut streams {
        assert_eq!(stream.exchange().await, stream.server);
    }
    assert!(!leaving.has_ended(), "the server ended before its stream");
    finish_all(streams).await;
    leaving.shutdown().await;
    load.wait_for_calls(300).await;
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rolling_restart_fails_no_call() {
    let mut servers = [
        EchoServer::start(),
        EchoServer::start(),
        EchoServer::start(),
    ];
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let channel = static_channel(addresses.iter().map(String::as_str), |builder| builder);
    wait_until_ready(&channel, 3).await;
    let load = Load::start(&channel, 32);
    for (server, address) in servers.iter_mut().zip(&addresses) {
        load.wait_until_called(address).await;
        let old = std::mem::replace(server, EchoServer::start());
        old.shutdown().await;
        load.wait_for_calls(100).await;
        *server = EchoServer::start_at(address);
        wait_until_ready(&channel, 3).await;
        load.wait_until_called(address).await;
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_calls_leave_a_server_that_shuts_down() {
    let few = || Options {
        max_concurrent_streams: Some(2),
        delay: Duration::from_millis(5),
        ..Options::default()
    };
    let servers = [EchoServer::start_with(few()), EchoServer::start_with(few())];
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let channel = static_channel(addresses.iter().map(String::as_str), |builder| builder);
    let [mut leaving, mut staying] = servers;
    wait_until_ready(&channel, 2).await;
    let load = Load::start(&channel, 32);
    for _ in 0..10 {
        load.wait_until_called(leaving.address()).await;
        load.wait_for_calls(20).await;
        let address = leaving.address().to_owned();
        leaving.shutdown().await;
        leaving = EchoServer::start_with(Options {
            address: Some(address),
            ..few()
        });
        wait_until_ready(&channel, 2).await;
        std::mem::swap(&mut leaving, &mut staying);
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn removed_endpoint_finishes_streams_then_closes() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
    let (sets, channel) = dynamic_channel(addresses.iter().copied(), |builder| builder);
    wait_until_ready(&channel, 2).await;
    let streams = OpenStream::open_on_each(&channel, &addresses).await;
    let load = Load::start(&channel, 32);
    load.wait_until_called(addresses[0]).await;

    sets.send([instance(addresses[1])]);
    wait_until("the endpoint is removed", async || {
        status_of(&channel, addresses[0]).is_none()
    })
    .await;
    load.wait_for_calls(300).await;
    // Calls that had picked the endpoint before its removal have been sent by now.
    let calls = servers[0].counts().calls();
    load.wait_for_calls(1_000).await;
    assert_eq!(
        servers[0].counts().calls(),
        calls,
        "the removed server was called"
    );
    assert_eq!(
        servers[0].counts().connections(),
        1,
        "the connection closed before its streams"
    );
    finish_all(streams).await;
    wait_until("the connection is closed", async || {
        servers[0].counts().connections() == 0
    })
    .await;
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changing_set_fails_no_call() {
    let few = || Options {
        max_concurrent_streams: Some(4),
        ..Options::default()
    };
    let servers = [few(), few(), few()].map(EchoServer::start_with);
    let addresses = servers.each_ref().map(|s| s.address().to_owned());
    let (sets, channel) = dynamic_channel(addresses.iter().map(String::as_str), |builder| builder);
    wait_until_ready(&channel, 3).await;
    let load = Load::start(&channel, 32);
    for round in 0..60 {
        let without = &addresses[round % 3];
        let others = addresses.iter().filter(|address| *address != without);
        sets.send(others.map(|address| instance(address)));
        load.wait_for_calls(10).await;
        sets.send(addresses.iter().map(|address| instance(address)));
        wait_until_ready(&channel, 3).await;
    }
    load.finish().await.assert_no_failure();
    for server in &servers {
        wait_until("one connection is left", async || {
            server.counts().connections() == 1
        })
        .await;
    }
}

#[tokio::test]
async fn waiting_call_survives_restart_of_the_only_server() {
    let server = EchoServer::start();
    let address = server.address().to_owned();
    let channel = static_channel([address.as_str()], |builder| {
        builder.ready_timeout(crate::support::PATIENCE)
    });
    wait_until_ready(&channel, 1).await;
    drop(server);
    wait_until("the connection is lost", async || {
        !is_ready(&channel, &address)
    })
    .await;
    let waiting = tokio::spawn({
        let channel = channel.clone();
        async move { call(&channel).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    let _server = EchoServer::start_at(&address);
    assert_eq!(waiting.await.unwrap().unwrap(), address);
}

const INTERVAL: Duration = Duration::from_millis(500);

/// Long enough for a healthy peer on a busy machine to acknowledge a ping.
const TIMEOUT: Duration = Duration::from_secs(3);

/// The time in which a silent peer must be found, for a busy machine. Without keep-alive it is
/// never found.
const FOUND_WITHIN: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keep_alive_removes_a_silent_peer_from_an_idle_channel() {
    let servers = [EchoProcess::start().await, EchoProcess::start().await];
    let silent = servers[0].address();
    let channel = static_channel(servers.iter().map(EchoProcess::address), |builder| {
        builder
            .http2_keep_alive_interval(Some(INTERVAL))
            .keep_alive_timeout(TIMEOUT)
    });
    wait_until_ready(&channel, 2).await;
    // An idle connection is pinged only twice.
    servers[0].pause().await;
    let stopped = Instant::now();
    wait_until("the endpoint is not ready", async || {
        !is_ready(&channel, silent)
    })
    .await;
    let took = stopped.elapsed();
    assert!(took <= FOUND_WITHIN, "{took:?}");
    let error = status_of(&channel, silent).unwrap().last_error.unwrap();
    assert!(error.contains("keep-alive"), "{error}");
    for _ in 0..100 {
        assert_eq!(call(&channel).await.unwrap(), servers[1].address());
    }

    servers[0].signal(Signal::SIGCONT);
    wait_until_ready(&channel, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keep_alive_fails_calls_in_flight_on_a_silent_peer() {
    let server = EchoProcess::start().await;
    let channel = static_channel([server.address()], |builder| {
        builder
            .http2_keep_alive_interval(Some(INTERVAL))
            .keep_alive_timeout(TIMEOUT)
    });
    wait_until_ready(&channel, 1).await;
    // The channel is not idle: a call has just ended.
    tokio::time::sleep(INTERVAL / 10).await;
    call(&channel).await.unwrap();
    server.pause().await;
    let stopped = Instant::now();
    let error = call(&channel).await.unwrap_err();
    let took = stopped.elapsed();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(error.message().contains(server.address()), "{error:?}");
    assert!(took <= FOUND_WITHIN, "{took:?}");
    assert_eq!(in_flight(&channel), 0);
    server.signal(Signal::SIGCONT);
}

#[tokio::test]
async fn peer_without_http2_handshake_gets_no_calls() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = listener.local_addr().unwrap().to_string();
    let _accepting = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((io, _)) = listener.accept().await {
            held.push(io);
        }
    }));
    let live = EchoServer::start();
    let channel = static_channel([silent.as_str(), live.address()], |builder| {
        builder.connect_timeout(Duration::from_millis(300))
    });
    for _ in 0..100 {
        assert_eq!(call(&channel).await.unwrap(), live.address());
    }
    wait_until("the handshake has timed out", async || {
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
async fn idle_channel_follows_changes_of_the_set() {
    let old = EchoServer::start();
    let new = EchoServer::start();
    let (sets, channel) = dynamic_channel([old.address()], |builder| builder.wait_for_ready(false));
    wait_until_ready(&channel, 1).await;
    sets.send([instance(new.address())]);
    wait_until("the change is applied without a call", async || {
        is_ready(&channel, new.address()) && channel.endpoints().len() == 1
    })
    .await;
    assert_eq!(new.counts().connections(), 1);
    wait_until("the old connection is closed without a call", async || {
        old.counts().connections() == 0
    })
    .await;
    assert_eq!(call(&channel).await.unwrap(), new.address());
    assert_eq!(new.counts().accepted(), 1);
    assert_eq!(old.counts().calls(), 0);
}

#[tokio::test]
async fn returning_instance_is_not_called_at_its_old_address() {
    let old = EchoServer::start();
    let others = [EchoServer::start(), EchoServer::start()];
    let elsewhere = unused_address();
    let moving = |address: &str| instance(address).id("moving");
    let staying = || others.iter().map(|other| instance(other.address()));
    let (sets, source) = SetSender::new();
    let channel = BalancedChannel::builder(source)
        .mass_deletion_guard(crate::support::PATIENCE)
        .mass_deletion_window(10 * crate::support::PATIENCE)
        .build()
        .unwrap();
    sets.send(staying().chain([moving(old.address())]));
    wait_until_ready(&channel, 3).await;
    // A single removal is no mass deletion, so the endpoint is not retained.
    sets.send(staying());
    wait_until_ready(&channel, 2).await;
    sets.send(staying().chain([moving(&elsewhere)]));
    wait_until("the new address is an endpoint", async || {
        status_of(&channel, &elsewhere).is_some()
    })
    .await;
    assert!(status_of(&channel, old.address()).is_none());
    for _ in 0..100 {
        call(&channel).await.unwrap();
    }
    assert_eq!(old.counts().calls(), 0);
    wait_until("the old connection is closed", async || {
        old.counts().connections() == 0
    })
    .await;
}

#[tokio::test]
async fn retained_endpoint_stays_when_its_instance_moves() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let addresses = servers.each_ref().map(EchoServer::address);
    let elsewhere = unused_address();
    let (sets, source) = SetSender::new();
    let channel = BalancedChannel::builder(source)
        .mass_deletion_guard(10 * crate::support::PATIENCE)
        .build()
        .unwrap();
    let moving = |address: &str| instance(address).id("moving");
    sets.send([moving(addresses[0]), instance(addresses[1])]);
    wait_until_ready(&channel, 2).await;
    let is_retained = |address| status_of(&channel, address).is_some_and(|status| status.retained);
    sets.send([]);
    wait_until("both are retained", async || {
        addresses.into_iter().all(is_retained)
    })
    .await;
    sets.send([moving(&elsewhere)]);
    wait_until("the new address is an endpoint", async || {
        status_of(&channel, &elsewhere).is_some()
    })
    .await;
    assert!(addresses.into_iter().all(is_retained));
    let load = Load::start(&channel, 4);
    for address in addresses {
        load.wait_until_called(address).await;
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test]
async fn ended_source_keeps_its_last_set() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    drop::<SetSender>(sets);
    tokio::task::yield_now().await;
    for _ in 0..10 {
        call(&channel).await.unwrap();
    }
}

#[tokio::test]
async fn dropping_the_last_clone_closes_connections() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| {
        builder.connections_per_endpoint(3)
    });
    wait_until("there are three connections", async || {
        status_of(&channel, server.address()).is_some_and(|status| status.connections == 3)
    })
    .await;
    let stream = OpenStream::open(&channel).await;
    let clone = channel.clone();
    drop(channel);
    call(&clone).await.unwrap();
    drop(clone);
    wait_until("only the connection with the stream is left", async || {
        server.counts().connections() == 1
    })
    .await;
    stream.finish().await;
    wait_until("no connection is left", async || {
        server.counts().connections() == 0
    })
    .await;
}

#[tokio::test]
async fn server_that_starts_later_becomes_ready() {
    let address = unused_address();
    let channel = static_channel([address.as_str()], |builder| builder);
    wait_until("the first attempt has failed", async || {
        status_of(&channel, &address).is_some_and(|e| e.state == EndpointState::Backoff)
    })
    .await;
    let _server = EchoServer::start_at(&address);
    let server = call_with_timeout(&channel, crate::support::PATIENCE)
        .await
        .unwrap();
    assert_eq!(server, address);
}
