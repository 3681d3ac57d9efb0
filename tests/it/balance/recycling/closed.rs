//! Connections that end without GOAWAY, after a response or while idle.

use std::future::{Future, ready};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use goo_etcd::BalancedChannel;
use goo_etcd::balance::EndpointState;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use crate::support::balanced::{call, call_with_timeout, static_channel, status_of};
use crate::support::frames::{FrameConnection, FrameServer};
use crate::support::wait_until;

/// Connects each time to another server, which `serve` runs. Counts the connections.
fn piped_channel<F>(
    accepted: &Arc<AtomicUsize>,
    serve: impl Fn(FrameConnection) -> F + Clone + Send + Sync + 'static,
) -> BalancedChannel
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let accepted = Arc::clone(accepted);
    let connector = tower::service_fn(move |_: Uri| {
        let (client, io) = tokio::io::duplex(64 << 10);
        let index = accepted.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(serve(FrameConnection::new(io, index)));
        ready(Ok::<_, io::Error>(TokioIo::new(client)))
    });
    static_channel(["pipe:1"], |builder| builder.connector(connector))
}

/// A proxy without GOAWAY. The end of each connection arrives 1 ms behind the response, and the next
/// call starts at once.
#[tokio::test(start_paused = true)]
async fn after_each_response_it_is_replaced_at_once() {
    const CALLS: usize = 300;
    let accepted = Arc::<AtomicUsize>::default();
    let channel = piped_channel(&accepted, async |mut connection: FrameConnection| {
        connection.handshake(&[]).await?;
        let stream = connection.next_request().await?;
        connection.respond_ok(stream).await?;
        sleep(Duration::from_millis(1)).await;
        connection.close().await
    });
    let started = Instant::now();
    for index in 0..CALLS {
        let called = call(&channel).await;
        assert!(called.is_ok(), "call {index}: {called:?}");
    }
    let took = started.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(accepted.load(Ordering::SeqCst), CALLS);
}

/// A single call waits to see whether the connection ends, and no other call does.
#[tokio::test(start_paused = true)]
async fn one_that_stays_open_delays_one_call() {
    let accepted = Arc::<AtomicUsize>::default();
    let channel = piped_channel(&accepted, async |mut connection: FrameConnection| {
        connection.handshake(&[]).await?;
        loop {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
        }
    });
    let mut delayed = Vec::new();
    for index in 0..100 {
        let started = Instant::now();
        call(&channel).await.unwrap();
        if !started.elapsed().is_zero() {
            delayed.push(index);
        }
    }
    assert_eq!(delayed, [1]);
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
}

/// Responds to requests until none comes for a time.
async fn serve_until_idle(mut connection: FrameConnection, idle: Duration) -> io::Result<()> {
    connection.handshake(&[]).await?;
    while let Ok(stream) = timeout(idle, connection.next_request()).await {
        connection.respond_ok(stream?).await?;
    }
    Ok(())
}

/// Waits until the pool has made this many connections and pauses before the next one.
async fn wait_until_paused(channel: &BalancedChannel, server: &FrameServer, accepted: usize) {
    let is_paused = async || {
        let status = status_of(channel, server.address());
        let state = status.map(|status| status.state);
        server.accepted() == accepted && state == Some(EndpointState::Backoff)
    };
    wait_until("the endpoint backs off", is_paused).await;
}

/// HAProxy with a short `timeout client`: connections end before anything is called.
#[tokio::test]
async fn while_idle_one_call_gets_a_connection_at_once() {
    let server =
        FrameServer::start(|connection| serve_until_idle(connection, Duration::from_millis(100)))
            .await;
    let channel = static_channel([server.address()], |channel| {
        channel.ready_timeout(Duration::from_secs(1))
    });
    // The next pause is about 2.6 s long.
    wait_until_paused(&channel, &server, 5).await;
    call(&channel).await.unwrap();
    assert_eq!(server.accepted(), 6);
}

/// The call before has left while the pool connected for it.
#[tokio::test]
async fn while_idle_a_call_after_a_cancelled_one_gets_a_connection() {
    let server = FrameServer::start(|connection| async move {
        if connection.index == 5 {
            sleep(Duration::from_millis(200)).await;
        }
        serve_until_idle(connection, Duration::from_millis(300)).await
    })
    .await;
    let channel = static_channel([server.address()], |channel| {
        channel.ready_timeout(Duration::from_secs(2))
    });
    wait_until_paused(&channel, &server, 5).await;
    let left = call_with_timeout(&channel, Duration::from_millis(50)).await;
    assert_eq!(left.unwrap_err().code(), Code::DeadlineExceeded);
    // The next pause is about 4.1 s long, and the attempt for another call comes after 1 s.
    wait_until_paused(&channel, &server, 6).await;
    call(&channel).await.unwrap();
    assert_eq!(server.accepted(), 7);
}

#[tokio::test]
async fn while_idle_a_call_that_does_not_wait_for_ready_is_served() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        if connection.index < 4 {
            return connection.close().await;
        }
        loop {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
        }
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel.wait_for_ready(false));
    wait_until_paused(&channel, &server, 4).await;
    call(&channel).await.unwrap();
}
