//! Servers that allow fewer streams than there are calls.

use std::time::{Duration, Instant};

use crate::support::PATIENCE;
use crate::support::balanced::{
    call, call_with_timeout, dynamic_channel, hello, in_flight, instance, is_ready, static_channel,
    wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::wait_until;
use futures::channel::mpsc;
use futures::future::join_all;
use futures::{StreamExt, stream};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::BalancePolicy;
use helloworld::echo::echo_client::EchoClient;
use helloworld::echo::{EchoReply, EchoRequest};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming};

const LIMIT: u32 = 2;

/// A server that allows [`LIMIT`] streams per connection.
fn limited_server(options: Options) -> EchoServer {
    EchoServer::start_with(Options {
        max_concurrent_streams: Some(LIMIT),
        ..options
    })
}

/// An open bidirectional stream.
struct OpenStream {
    requests: mpsc::UnboundedSender<EchoRequest>,
    replies: Streaming<EchoReply>,
}

impl OpenStream {
    async fn open(channel: &BalancedChannel) -> Self {
        let (requests, receiver) = mpsc::unbounded();
        let replies = EchoClient::new(channel.clone()).bidi(receiver).await;
        let replies = replies.unwrap().into_inner();
        let mut stream = Self { requests, replies };
        stream.exchange().await;
        stream
    }

    /// Opens as many streams as the server allows.
    async fn fill(channel: &BalancedChannel) -> [Self; LIMIT as usize] {
        [Self::open(channel).await, Self::open(channel).await]
    }

    async fn exchange(&mut self) {
        self.requests.unbounded_send(hello()).unwrap();
        let reply = timeout(PATIENCE, self.replies.message()).await.unwrap();
        reply.unwrap().unwrap();
    }
}

/// Starts ten calls, each in its own task.
fn spawn_ten_calls(channel: &BalancedChannel) -> Vec<JoinHandle<Result<String, Status>>> {
    let calls = (0..10).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move { call(&channel).await })
    });
    calls.collect()
}

#[tokio::test]
async fn cancelled_waiting_calls_never_reach_the_server() {
    let server = limited_server(Options::default());
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let [mut stays, ends] = OpenStream::fill(&channel).await;
    let before = server.counts().calls();

    let limit = Duration::from_millis(10);
    let calls = (0..1_000).map(|_| call_with_timeout(&channel, limit));
    for result in join_all(calls).await {
        let error = result.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        let cause = "its limit of 2 streams is reached";
        assert!(error.message().contains(cause), "{error:?}");
    }
    drop(ends);
    // Once another call has got the stream, the server knows of all earlier requests.
    call(&channel).await.unwrap();
    stays.exchange().await;
    assert_eq!(server.counts().calls(), before + 1);
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
    drop(stays);
    wait_until("nothing is in flight", async || in_flight(&channel) == 0).await;
}

#[tokio::test]
async fn mass_cancellation_keeps_the_connection() {
    let server = limited_server(Options {
        delay: Duration::from_millis(50),
        ..Options::default()
    });
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut stays = OpenStream::open(&channel).await;
    let before = server.counts().calls();
    for _ in 0..5 {
        let calls = (0..1_000).map(|_| timeout(Duration::from_millis(10), call(&channel)));
        let results = join_all(calls).await;
        assert!(results.iter().all(Result::is_err));
    }
    stays.exchange().await;
    call(&channel).await.unwrap();
    let seen = server.counts().calls() - before;
    assert!(seen <= 50, "{seen} of 5,000 were sent");
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
}

#[tokio::test]
async fn full_endpoint_is_not_picked() {
    let (full, free) = (limited_server(Options::default()), EchoServer::start());
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let (sets, channel) = dynamic_channel([full.address()], |builder| builder.policy(policy));
        wait_until_ready(&channel, 1).await;
        let _open = OpenStream::fill(&channel).await;
        let waiting = spawn_ten_calls(&channel);
        sets.send([full.address(), free.address()].map(instance));
        // Both the waiting calls and new calls go to the free endpoint.
        for call in waiting {
            assert_eq!(call.await.unwrap().unwrap(), free.address());
        }
        for result in join_all((0..100).map(|_| call(&channel))).await {
            assert_eq!(result.unwrap(), free.address(), "{policy:?}");
        }
    }
}

#[tokio::test]
async fn full_only_endpoint_fails_calls_after_ready_timeout() {
    let server = limited_server(Options::default());
    let ready_timeout = Duration::from_millis(300);
    for wait_for_ready in [true, false] {
        let channel = static_channel([server.address()], |builder| {
            builder
                .ready_timeout(ready_timeout)
                .wait_for_ready(wait_for_ready)
        });
        wait_until_ready(&channel, 1).await;
        let mut open = OpenStream::fill(&channel).await;
        let begun = Instant::now();
        let error = timeout(PATIENCE, call(&channel)).await.unwrap();
        let error = error.unwrap_err();
        assert!(begun.elapsed() >= ready_timeout, "{:?}", begun.elapsed());
        assert_eq!(error.code(), Code::Unavailable);
        let expected = format!(
            "none of 1 instances under the fixed list has room for another call: {} (ready, its \
             limit of 2 streams is reached) (waited 300ms)",
            server.address()
        );
        assert_eq!(error.message(), expected);
        for stream in &mut open {
            stream.exchange().await;
        }
    }
}

#[tokio::test]
async fn ended_responses_free_their_streams() {
    let server = limited_server(Options::default());
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let mut held = Vec::new();
    // Long enough for a busy machine to open both streams before their deadline.
    let limit = Duration::from_secs(4);
    for _ in 0..LIMIT {
        let mut request = Request::new(stream::pending());
        request.set_timeout(limit);
        held.push(client.bidi(request).await.unwrap().into_inner());
    }
    for replies in &mut held {
        let error = replies.message().await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    }
    for _ in 0..LIMIT {
        // The server fails on the first message; the request stream never ends.
        let failing = EchoRequest {
            fail_with: Code::Aborted as u32,
            ..hello()
        };
        let requests = stream::iter([failing]).chain(stream::pending());
        let mut replies = client.bidi(requests).await.unwrap().into_inner();
        let error = replies.message().await.unwrap_err();
        assert_eq!(error.code(), Code::Aborted, "{error:?}");
        held.push(replies);
    }
    for _ in 0..LIMIT {
        let mut replies = OpenStream::open(&channel).await.replies;
        // The sender of the requests is dropped, so the server ends the replies.
        assert!(replies.message().await.unwrap().is_none());
        held.push(replies);
    }
    call(&channel).await.unwrap();
    wait_until("no call is active on the server", async || {
        server.counts().active() == 0
    })
    .await;
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
    drop(held);
}

#[tokio::test]
async fn calls_waiting_for_a_stream_survive_a_restart() {
    let server = limited_server(Options::default());
    let address = server.address().to_owned();
    let channel = static_channel([address.as_str()], |builder| {
        builder.ready_timeout(PATIENCE)
    });
    wait_until_ready(&channel, 1).await;
    let _open = OpenStream::fill(&channel).await;
    let waiting = spawn_ten_calls(&channel);
    // Polls each call once, so that all of them wait for a stream.
    tokio::task::yield_now().await;
    drop(server);
    wait_until("the connection is lost", async || {
        !is_ready(&channel, &address)
    })
    .await;
    let _server = EchoServer::start_at(&address);
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap(), address);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_waits_while_a_stream_is_free() {
    let servers = [
        limited_server(Options::default()),
        limited_server(Options::default()),
    ];
    let channel = static_channel(servers.iter().map(EchoServer::address), |builder| {
        builder.ready_timeout(10 * PATIENCE)
    });
    wait_until_ready(&channel, 2).await;
    let tasks = (0..64).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move {
            for round in 0..50 {
                // Some calls are dropped while they wait, or just when a stream becomes free.
                let limit = Duration::from_micros(fastrand::u64(..2_000));
                match round % 2 {
                    0 => drop(timeout(limit, call(&channel)).await),
                    _ => drop(call(&channel).await.unwrap()),
                }
            }
        })
    });
    for task in timeout(PATIENCE, join_all(tasks)).await.unwrap() {
        task.unwrap();
    }
    for server in &servers {
        assert_eq!(server.counts().accepted(), 1, "a connection was lost");
    }
    assert_eq!(in_flight(&channel), 0);
}
