//! More calls than a server allows streams.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::{Duration, Instant};

use futures::channel::mpsc;
use futures::future::join_all;
use futures::{StreamExt, stream};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::BalancePolicy;
use helloworld::echo::echo_client::EchoClient;
use helloworld::echo::{EchoReply, EchoRequest};
use support::PATIENCE;
use support::balanced::{
    call, call_within, changing, fixed, hello, in_flight, instance, is_ready, until_ready,
};
use support::echo::{EchoServer, Options};
use support::eventually;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::{Code, Request, Status, Streaming};

const LIMIT: u32 = 2;

/// Allows two streams on a connection.
fn few(options: Options) -> EchoServer {
    EchoServer::with(Options {
        max_concurrent_streams: Some(LIMIT),
        ..options
    })
}

/// A stream that stays open.
struct Talk {
    requests: mpsc::UnboundedSender<EchoRequest>,
    replies: Streaming<EchoReply>,
}

impl Talk {
    async fn begin(channel: &BalancedChannel) -> Self {
        let (requests, receiver) = mpsc::unbounded();
        let replies = EchoClient::new(channel.clone()).bidi(receiver).await;
        let replies = replies.unwrap().into_inner();
        let mut talk = Self { requests, replies };
        talk.say().await;
        talk
    }

    /// All that the server allows.
    async fn fill(channel: &BalancedChannel) -> [Self; LIMIT as usize] {
        [Self::begin(channel).await, Self::begin(channel).await]
    }

    async fn say(&mut self) {
        self.requests.unbounded_send(hello()).unwrap();
        let reply = timeout(PATIENCE, self.replies.message()).await.unwrap();
        reply.unwrap().unwrap();
    }
}

/// Each in a task of its own.
fn ten_calls(channel: &BalancedChannel) -> Vec<JoinHandle<Result<String, Status>>> {
    let calls = (0..10).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move { call(&channel).await })
    });
    calls.collect()
}

#[tokio::test]
async fn given_a_full_connection_when_1_000_calls_are_given_up_then_the_server_never_hears_of_them()
{
    let server = few(Options::default());
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    let [mut stays, ends] = Talk::fill(&channel).await;
    let before = server.counts().calls();

    let limit = Duration::from_millis(10);
    let calls = (0..1_000).map(|_| call_within(&channel, limit));
    for result in join_all(calls).await {
        let error = result.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        let said = "its limit of 2 streams is reached";
        assert!(error.message().contains(said), "{error:?}");
    }
    drop(ends);
    // The stream's end is known by the time that another call has its place.
    call(&channel).await.unwrap();
    stays.say().await;
    assert_eq!(server.counts().calls(), before + 1);
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
    drop(stays);
    eventually("nothing is in flight", async || in_flight(&channel) == 0).await;
}

#[tokio::test]
async fn given_one_free_stream_when_1_000_callers_give_up_at_once_then_the_connection_lives() {
    let server = few(Options {
        delay: Duration::from_millis(50),
        ..Options::default()
    });
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    let mut stays = Talk::begin(&channel).await;
    let before = server.counts().calls();
    for _ in 0..5 {
        let calls = (0..1_000).map(|_| timeout(Duration::from_millis(10), call(&channel)));
        let results = join_all(calls).await;
        assert!(results.iter().all(Result::is_err));
    }
    stays.say().await;
    call(&channel).await.unwrap();
    let seen = server.counts().calls() - before;
    assert!(seen <= 50, "{seen} of 5,000 were sent");
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
}

#[tokio::test]
async fn given_a_full_endpoint_and_another_when_called_then_all_calls_go_to_the_other() {
    let (full, free) = (few(Options::default()), EchoServer::start());
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let (sets, channel) = changing([full.address()], |builder| builder.policy(policy));
        until_ready(&channel, 1).await;
        let _open = Talk::fill(&channel).await;
        let waiting = ten_calls(&channel);
        sets.send([full.address(), free.address()].map(instance));
        // Those that wait already, and those to come.
        for call in waiting {
            assert_eq!(call.await.unwrap().unwrap(), free.address());
        }
        for result in join_all((0..100).map(|_| call(&channel))).await {
            assert_eq!(result.unwrap(), free.address(), "{policy:?}");
        }
    }
}

#[tokio::test]
async fn given_a_full_only_endpoint_when_a_call_has_no_deadline_then_it_fails_in_ready_timeout() {
    let server = few(Options::default());
    let ready_timeout = Duration::from_millis(300);
    for wait_for_ready in [true, false] {
        let channel = fixed([server.address()], |builder| {
            builder
                .ready_timeout(ready_timeout)
                .wait_for_ready(wait_for_ready)
        });
        until_ready(&channel, 1).await;
        let mut open = Talk::fill(&channel).await;
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
        for talk in &mut open {
            talk.say().await;
        }
    }
}

#[tokio::test]
async fn given_responses_that_have_ended_when_they_are_held_on_to_then_they_take_no_room() {
    let server = few(Options::default());
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let mut held = Vec::new();
    for _ in 0..LIMIT {
        let mut request = Request::new(stream::pending());
        request.set_timeout(Duration::from_millis(100));
        let mut replies = client.bidi(request).await.unwrap().into_inner();
        let error = replies.message().await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        held.push(replies);
    }
    for _ in 0..LIMIT {
        // Ends at the first that it is sent, and is sent no end.
        let fails = EchoRequest {
            fail_with: Code::Aborted as u32,
            ..hello()
        };
        let requests = stream::iter([fails]).chain(stream::pending());
        let mut replies = client.bidi(requests).await.unwrap().into_inner();
        let error = replies.message().await.unwrap_err();
        assert_eq!(error.code(), Code::Aborted, "{error:?}");
        held.push(replies);
    }
    for _ in 0..LIMIT {
        let mut broken = Talk::begin(&channel).await.replies;
        // Its requests end, and with them its replies.
        assert!(broken.message().await.unwrap().is_none());
        held.push(broken);
    }
    call(&channel).await.unwrap();
    eventually("the server has let go of them", async || {
        server.counts().active() == 0
    })
    .await;
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
    drop(held);
}

#[tokio::test]
async fn given_calls_that_wait_for_a_stream_when_the_server_restarts_then_they_succeed() {
    let server = few(Options::default());
    let address = server.address().to_owned();
    let channel = fixed([address.as_str()], |builder| {
        builder.ready_timeout(PATIENCE)
    });
    until_ready(&channel, 1).await;
    let _open = Talk::fill(&channel).await;
    let waiting = ten_calls(&channel);
    // All of them wait by then: each is polled once.
    tokio::task::yield_now().await;
    drop(server);
    eventually("it is lost", async || !is_ready(&channel, &address)).await;
    let _server = EchoServer::start_at(&address);
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap(), address);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_64_tasks_and_few_streams_when_called_then_none_waits_for_a_stream_that_is_free() {
    let servers = [few(Options::default()), few(Options::default())];
    let channel = fixed(servers.iter().map(EchoServer::address), |builder| {
        builder.ready_timeout(10 * PATIENCE)
    });
    until_ready(&channel, 2).await;
    let tasks = (0..64).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move {
            for round in 0..50 {
                // Some give up while they wait, or just when it is their turn.
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
