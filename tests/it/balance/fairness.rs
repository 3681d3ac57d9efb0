//! More calls than servers allow streams: calls are served in the order in which they came.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::balanced::{
    call, call_with_timeout, dynamic_channel, hello, in_flight, instance, static_channel,
    unused_address, wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::frames::{ACK, FrameConnection, FrameServer, MAX_CONCURRENT_STREAMS, SETTINGS};
use crate::support::{PATIENCE, wait_until};
use futures::future::join_all;
use futures::{StreamExt, poll, stream};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, EndpointState};
use helloworld::echo::echo_client::EchoClient;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::{Code, Status};

const WORK: Duration = Duration::from_millis(5);

/// A server that allows `limit` streams per connection and works for [`WORK`] on each call.
fn server(limit: u32) -> EchoServer {
    EchoServer::start_with(Options {
        max_concurrent_streams: Some(limit),
        delay: WORK,
        ..Options::default()
    })
}

/// The calls of one task in a closed loop.
#[derive(Debug, Default)]
struct TaskReport {
    calls: u64,
    /// The most calls of all tasks that ended during one call. A measure of waiting that does not
    /// depend on the machine's speed.
    longest_wait: u64,
    failures: Vec<Status>,
}

/// Runs tasks that make one call after another, until they have made `rounds` calls each on
/// average.
async fn closed_loop(channel: &BalancedChannel, tasks: u64, rounds: u64) -> Vec<TaskReport> {
    let made = Arc::<AtomicU64>::default();
    let mut running = JoinSet::new();
    for _ in 0..tasks {
        let (channel, made) = (channel.clone(), Arc::clone(&made));
        running.spawn(async move {
            let mut report = TaskReport::default();
            while made.load(Ordering::SeqCst) < tasks * rounds {
                let before = made.load(Ordering::SeqCst);
                let result = call(&channel).await;
                let waited = made.fetch_add(1, Ordering::SeqCst) - before;
                report.longest_wait = report.longest_wait.max(waited);
                match result {
                    Ok(_) => report.calls += 1,
                    Err(status) => report.failures.push(status),
                }
            }
            report
        });
    }
    timeout(PATIENCE, running.join_all()).await.unwrap()
}

/// Every task makes at least half of its fair share of the calls, and waits at most three times as
/// long as in a fair queue, in which each other task makes one call meanwhile.
async fn assert_fair(channel: &BalancedChannel, tasks: u64) {
    const ROUNDS: u64 = 12;
    for report in closed_loop(channel, tasks, ROUNDS).await {
        assert!(report.failures.is_empty(), "{report:?}");
        assert!(report.calls >= ROUNDS / 2, "{report:?}");
        assert!(report.longest_wait <= 3 * tasks, "{tasks}: {report:?}");
    }
}

#[tokio::test]
async fn tasks_get_equal_shares_of_one_limit() {
    for (limit, tasks) in [(10, 100), (1, 8), (1, 32), (2, 64), (4, 64)] {
        let server = server(limit);
        let channel = static_channel([server.address()], |builder| builder);
        wait_until_ready(&channel, 1).await;
        assert_fair(&channel, tasks).await;
    }
}

#[tokio::test]
async fn tasks_get_equal_shares_of_two_limits() {
    for policy in [
        BalancePolicy::PeakEwma,
        BalancePolicy::LeastRequest,
        BalancePolicy::RoundRobin,
    ] {
        let servers = [server(1), server(4)];
        let (sets, channel) = dynamic_channel([], |builder| builder.policy(policy));
        sets.send([
            instance(servers[0].address()).weight(10),
            instance(servers[1].address()).id("other").weight(90),
        ]);
        wait_until_ready(&channel, 2).await;
        assert_fair(&channel, 48).await;
        let used = servers.iter().all(|server| server.counts().calls() > 0);
        assert!(used, "{policy:?} leaves a server without calls");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_get_equal_shares_of_two_connections() {
    let server = server(2);
    let channel = static_channel([server.address()], |builder| {
        builder.connections_per_endpoint(2)
    });
    wait_until("both connections are open", async || {
        let endpoints = channel.endpoints();
        endpoints.first().is_some_and(|e| e.connections == 2)
    })
    .await;
    assert_fair(&channel, 48).await;
}

#[tokio::test]
async fn tasks_get_equal_shares_of_a_concurrency_limit() {
    let server = server(100);
    let channel = static_channel([server.address()], |builder| builder.concurrency_limit(2));
    wait_until_ready(&channel, 1).await;
    assert_fair(&channel, 32).await;
}

#[tokio::test]
async fn call_that_is_not_polled_holds_up_no_other() {
    let server = server(2);
    let channel = static_channel([server.address()], |builder| {
        builder.ready_timeout(10 * PATIENCE)
    });
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let mut open = Vec::new();
    for _ in 0..2 {
        let replies = client.bidi(stream::iter([hello()]).chain(stream::pending()));
        open.push(replies.await.unwrap());
    }
    let mut unpolled = Box::pin(call(&channel));
    assert!(poll!(&mut unpolled).is_pending());
    drop(open);
    for _ in 0..10 {
        timeout(PATIENCE, call(&channel)).await.unwrap().unwrap();
    }
    timeout(PATIENCE, unpolled).await.unwrap().unwrap();
}

/// A stream that a call was given is of no use once its endpoint has left the set.
#[tokio::test]
async fn call_that_is_not_polled_goes_to_no_removed_endpoint() {
    let (removed, added) = (server(1), EchoServer::start());
    let (sets, channel) = dynamic_channel([removed.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let open = client.bidi(stream::iter([hello()]).chain(stream::pending()));
    let open = open.await.unwrap();
    let mut unpolled = Box::pin(call(&channel));
    assert!(poll!(&mut unpolled).is_pending());
    drop(open);
    wait_until("the stream is given away", async || {
        in_flight(&channel) == 1
    })
    .await;
    sets.send([instance(added.address())]);
    let moved = || {
        let endpoints = channel.endpoints();
        let [endpoint] = &endpoints[..] else {
            return false;
        };
        endpoint.address == added.address() && endpoint.state == EndpointState::Ready
    };
    wait_until("the set has changed", async || moved()).await;
    assert_eq!(unpolled.await.unwrap(), added.address());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_leave_the_queue_lose_no_stream() {
    const LIMIT: u32 = 3;
    let server = server(LIMIT);
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let tasks = (0..64).map(|_| {
        let channel = channel.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                let limit = Duration::from_millis(fastrand::u64(1..40));
                if fastrand::bool() {
                    drop(timeout(limit, call(&channel)).await);
                } else if let Err(status) = call_with_timeout(&channel, limit).await {
                    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
                }
            }
        })
    });
    for task in timeout(PATIENCE, join_all(tasks)).await.unwrap() {
        task.unwrap();
    }
    assert_eq!(in_flight(&channel), 0);
    // Afterwards as many calls run at once as the server allows.
    wait_until("no call is active", async || server.counts().active() == 0).await;
    let mut client = EchoClient::new(channel.clone());
    let mut open = Vec::new();
    for _ in 0..LIMIT {
        let replies = client.bidi(stream::pending());
        open.push(timeout(PATIENCE, replies).await.unwrap().unwrap());
    }
    let beyond = call_with_timeout(&channel, Duration::from_millis(200)).await;
    assert_eq!(beyond.unwrap_err().code(), Code::DeadlineExceeded);
    assert_eq!(server.counts().active(), LIMIT as usize);
    assert_eq!(server.counts().accepted(), 1, "the connection was lost");
}

/// Serves calls under limits that change. Always waits until as many streams are open as the
/// limit allows, and answers the oldest.
async fn serve_with_changing_limits(mut connection: FrameConnection) -> io::Result<()> {
    connection
        .handshake(&[(MAX_CONCURRENT_STREAMS, 16)])
        .await?;
    let mut open = VecDeque::new();
    let mut largest = 16;
    for limit in [16, 1, 0, 16, 2] {
        connection
            .send_settings(&[(MAX_CONCURRENT_STREAMS, limit)])
            .await?;
        loop {
            let frame = connection.next().await?;
            if frame.is_end_stream() {
                open.push_back(frame.stream);
                assert!(open.len() <= largest, "{} streams are open", open.len());
            } else if frame.kind == SETTINGS && frame.flags & ACK != 0 {
                break;
            }
        }
        largest = limit as usize;
        if limit == 0 {
            while let Some(stream) = open.pop_front() {
                connection.respond_ok(stream).await?;
            }
            let silence = timeout(Duration::from_millis(300), connection.next()).await;
            assert!(silence.is_err(), "{silence:?}");
            continue;
        }
        for _ in 0..200 {
            while open.len() < largest {
                open.push_back(connection.next_request().await?);
            }
            connection.respond_ok(open.pop_front().unwrap()).await?;
        }
    }
    loop {
        let stream = match open.pop_front() {
            Some(stream) => stream,
            None => connection.next_request().await?,
        };
        connection.respond_ok(stream).await?;
    }
}

#[tokio::test]
async fn limit_may_change_under_load() {
    let server = FrameServer::start(serve_with_changing_limits).await;
    let channel = static_channel([server.address()], |builder| {
        builder.ready_timeout(PATIENCE)
    });
    wait_until_ready(&channel, 1).await;
    for report in closed_loop(&channel, 64, 20).await {
        assert!(report.failures.is_empty(), "{report:?}");
        assert!(report.calls >= 10, "{report:?}");
    }
    assert_eq!(server.accepted(), 1, "the connection was lost");
}

#[tokio::test]
async fn thousands_of_calls_get_the_first_endpoint() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| builder.ready_timeout(PATIENCE));
    let mut calls = JoinSet::new();
    for _ in 0..3_000 {
        let channel = channel.clone();
        calls.spawn(async move { call(&channel).await });
    }
    // Polls each call once, so that all of them wait.
    tokio::task::yield_now().await;
    sets.send([instance(server.address())]);
    for result in timeout(PATIENCE, calls.join_all()).await.unwrap() {
        result.unwrap();
    }
    assert_eq!(server.counts().calls(), 3_000);
}

#[tokio::test]
async fn first_call_of_a_new_channel_waits_for_the_first_attempt() {
    let server = EchoServer::start();
    for _ in 0..20 {
        let channel = static_channel([server.address()], |builder| builder.wait_for_ready(false));
        call(&channel).await.unwrap();
    }
    let address = unused_address();
    let channel = static_channel([address.as_str()], |builder| {
        builder.wait_for_ready(false).ready_timeout(10 * PATIENCE)
    });
    let calls = join_all((0..20).map(|_| call(&channel)));
    for result in timeout(PATIENCE, calls).await.unwrap() {
        let status = result.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        let message = status.message();
        assert!(message.contains("Connection refused"), "{message}");
        assert!(!message.contains("waited"), "{message}");
    }
}
