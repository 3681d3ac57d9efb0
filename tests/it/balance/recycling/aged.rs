//! Servers that end connections at a certain age or after an idle time, and h2's graceful shutdown.

use std::io;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{READY_TIMEOUT, assert_calls_succeed, channel, recycling_server};
use crate::support::balanced::{Load, call, static_channel, wait_until_ready};
use crate::support::echo::{EchoServer, Options};
use crate::support::frames::{FrameServer, NO_ERROR};
use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::raw::respond_ok;
use crate::support::wait_until;

/// Below 1 s, which is gRPC's first pause after a failed attempt.
const AGES: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_millis(700),
    Duration::from_millis(990),
];

/// Logged when a connection has ended that was no failure.
const REPLACED: &str = "connecting again at once";

/// Starts to record what the channel does when a connection has ended.
fn record_ends() -> Log {
    Log::start_for_process("goo_etcd::balance::pool=debug")
}

/// Each connection was replaced because it had ended, and none because a call waited. Without this
/// look at the log, attempts on demand would hide pauses.
fn assert_replaced_at_once(log: &Log, at_least: usize) {
    let replaced = log.count(REPLACED);
    let paused = log.count("backing off");
    assert!(
        replaced >= at_least && paused == 0,
        "{replaced} replaced, {paused} paused"
    );
}

/// Calls tonic servers with a maximum age until each has replaced its connections a few times.
async fn assert_aging_fails_no_call(ages: &[Duration], delay: Duration) {
    let log = record_ends();
    let servers: Vec<EchoServer> = ages
        .iter()
        .map(|age| {
            EchoServer::start_with(Options {
                max_connection_age: Some(*age),
                delay,
                ..Options::default()
            })
        })
        .collect();
    let channel = static_channel(servers.iter().map(EchoServer::address), |channel| {
        channel.ready_timeout(READY_TIMEOUT)
    });
    wait_until_ready(&channel, servers.len()).await;
    let load = Load::start(&channel, 16);
    for server in &servers {
        let accepted = || server.counts().accepted();
        wait_until("connections were replaced", async || accepted() >= 5).await;
    }
    load.finish().await.assert_no_failure();
    assert_replaced_at_once(&log, 4 * servers.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn young_connections_of_one_server_fail_no_call() {
    if !isolate("balance::recycling::aged::young_connections_of_one_server_fail_no_call").await {
        return;
    }
    assert_aging_fails_no_call(&AGES[..1], Duration::ZERO).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn young_connections_of_three_servers_fail_no_call() {
    if !isolate("balance::recycling::aged::young_connections_of_three_servers_fail_no_call").await {
        return;
    }
    assert_aging_fails_no_call(&AGES, Duration::ZERO).await;
}

/// Each connection has calls in flight when its age is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_flight_at_the_maximum_age_succeed() {
    if !isolate("balance::recycling::aged::calls_in_flight_at_the_maximum_age_succeed").await {
        return;
    }
    assert_aging_fails_no_call(&AGES[..1], Duration::from_millis(300)).await;
}

/// grpc-go's `MaxConnectionIdle` with calls that are farther apart.
#[tokio::test]
async fn sparse_calls_on_connections_that_end_idle_succeed() {
    if !isolate("balance::recycling::aged::sparse_calls_on_connections_that_end_idle_succeed").await
    {
        return;
    }
    let log = record_ends();
    const IDLE: Duration = Duration::from_millis(100);
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let mut last = 0;
        let requests = async {
            loop {
                let stream = timeout(IDLE, connection.next_request()).await;
                let Ok(stream) = stream else {
                    return io::Result::Ok(());
                };
                last = stream?;
                connection.respond_ok(last).await?;
            }
        };
        requests.await?;
        connection.send_go_away(last, NO_ERROR, "max_idle").await?;
        connection.close().await
    })
    .await;
    let channel = channel([&server]);
    for _ in 0..15 {
        call(&channel).await.unwrap();
        sleep(IDLE + IDLE / 2).await;
    }
    // On a busy machine connections may end before they are called.
    assert!(log.count(REPLACED) >= 10, "{}", log.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn goaway_after_1000_requests_fails_no_call() {
    if !isolate("balance::recycling::aged::goaway_after_1000_requests_fails_no_call").await {
        return;
    }
    let log = record_ends();
    let server = recycling_server(1_000).await;
    let channel = channel([&server]);
    assert_calls_succeed(&channel, 10_000).await;
    assert_replaced_at_once(&log, 9);
}

/// h2 drops streams that it has read and not handed out when it shuts down, and counts them among
/// those it processed. Such a call may have been seen, so it is not sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn graceful_shutdown_of_h2_fails_hardly_a_call() {
    if !isolate("balance::recycling::aged::graceful_shutdown_of_h2_fails_hardly_a_call").await {
        return;
    }
    let log = record_ends();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let _accepting = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(io).await else {
                    return;
                };
                let mut requests = 0;
                while let Some(Ok((_, respond))) = connection.accept().await {
                    respond_ok(respond);
                    requests += 1;
                    if requests == 100 {
                        connection.graceful_shutdown();
                    }
                }
            });
        }
    }));
    let channel = static_channel([&*address], |channel| channel.ready_timeout(READY_TIMEOUT));
    let load = Load::start(&channel, 64);
    load.wait_for_calls(10_000).await;
    let report = load.finish().await;
    let failed = report.failures.len() as u64;
    assert!(failed * 10_000 <= report.calls(), "{:?}", report.failures);
    // Up to 64 requests more are in flight when a connection ends.
    assert_replaced_at_once(&log, 50);
}
