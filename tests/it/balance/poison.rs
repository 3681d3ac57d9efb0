//! Poison calls: a server ends the connection with an error because of one call.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, stream};
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::Code;

use crate::support::balanced::{Load, call, calls_in_flight, static_channel, wait_until_ready};
use crate::support::frames::{DATA, FrameServer, PROTOCOL_ERROR};

/// The payload of a call on which a server breaks.
const POISON: &[u8] = b"poison";

fn poison() -> EchoRequest {
    EchoRequest {
        payload: POISON.to_vec(),
        ..EchoRequest::default()
    }
}

/// The stream before.
fn previous(stream: u32) -> u32 {
    stream.saturating_sub(2)
}

/// A server that breaks on a poison call: it ends the connection with an error, before the call's
/// stream, and responds to all other calls then. Counts the connections that it ends.
async fn breaking_server(broken: &Arc<AtomicUsize>) -> FrameServer {
    let broken = Arc::clone(broken);
    FrameServer::start(move |mut connection| {
        let broken = Arc::clone(&broken);
        async move {
            connection.handshake(&[]).await?;
            let mut others = Vec::new();
            loop {
                let frame = connection.next().await?;
                if frame.kind != DATA || frame.payload.is_empty() {
                    continue;
                }
                if !frame.payload.windows(POISON.len()).any(|w| w == POISON) {
                    others.push(frame.stream);
                    continue;
                }
                broken.fetch_add(1, Ordering::SeqCst);
                connection
                    .send_go_away(frame.stream.saturating_sub(2), PROTOCOL_ERROR, "bad header")
                    .await?;
                for stream in others {
                    connection.respond_ok(stream).await?;
                }
                return connection.close().await;
            }
        }
    })
    .await
}

#[tokio::test]
async fn poison_call_fails_alone_and_breaks_two_connections() {
    const SERVERS: usize = 4;
    const OTHERS: usize = 60;
    for retry in [None, Some(RetryPolicy::new(5))] {
        let broken = Arc::<AtomicUsize>::default();
        let servers =
            futures::future::join_all((0..SERVERS).map(|_| breaking_server(&broken))).await;
        let channel = static_channel(servers.iter().map(FrameServer::address), |channel| {
            let channel = channel.policy(BalancePolicy::RoundRobin);
            match &retry {
                Some(policy) => channel.retry(policy.clone()),
                None => channel,
            }
        });
        wait_until_ready(&channel, SERVERS).await;
        let others = calls_in_flight(&channel, OTHERS).await;
        let mut client = EchoClient::new(channel.clone());
        let status = client.unary(poison()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        let go_away = "GOAWAY PROTOCOL_ERROR: bad header";
        assert!(status.message().contains(go_away), "{status}");
        assert_eq!(broken.load(Ordering::SeqCst), 2, "{retry:?}");
        // The servers that are not broken have not responded to the others.
        while others.iter().any(|other| !other.is_finished()) {
            client.unary(poison()).await.unwrap_err();
        }
        for other in others {
            other.await.unwrap().unwrap();
        }
    }
}

/// A server that responds at once, but breaks on a poison call after a time in which further calls
/// arrive. `last_stream` gives the last stream of the GOAWAY from that call's. Counts the
/// connections that the server ends.
async fn slowly_breaking_server(
    broken: &Arc<AtomicUsize>,
    last_stream: fn(u32) -> u32,
) -> FrameServer {
    let broken = Arc::clone(broken);
    FrameServer::start(move |mut connection| {
        let broken = Arc::clone(&broken);
        async move {
            connection.handshake(&[]).await?;
            loop {
                let frame = connection.next().await?;
                if frame.kind != DATA || frame.payload.is_empty() {
                    continue;
                }
                if !frame.payload.windows(POISON.len()).any(|w| w == POISON) {
                    connection.respond_ok(frame.stream).await?;
                    continue;
                }
                broken.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
                connection
                    .send_go_away(last_stream(frame.stream), PROTOCOL_ERROR, "bad header")
                    .await?;
                return connection.close().await;
            }
        }
    })
    .await
}

/// The poison call's retry and the calls behind it may go to the same server.
#[tokio::test]
async fn calls_behind_poison_calls_succeed() {
    const SERVERS: usize = 3;
    const POISON_CALLS: usize = 10;
    let broken = Arc::<AtomicUsize>::default();
    let servers =
        futures::future::join_all((0..SERVERS).map(|_| slowly_breaking_server(&broken, previous)))
            .await;
    let channel = static_channel(servers.iter().map(FrameServer::address), |channel| {
        channel.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, SERVERS).await;
    let load = Load::start(&channel, 60);
    let mut client = EchoClient::new(channel.clone());
    for _ in 0..POISON_CALLS {
        tokio::time::sleep(Duration::from_millis(200)).await;
        client.unary(poison()).await.unwrap_err();
    }
    let report = load.finish().await;
    let failed = report.failures.len();
    let first = report.failures.first().map(|failure| &failure.status);
    assert_eq!(failed, 0, "of {} calls: {first:?}", report.calls());
    assert_eq!(broken.load(Ordering::SeqCst), 2 * POISON_CALLS);
}

/// h2 writes the HEADERS of a call that is cancelled before, and then its reset. No stream's id is
/// missing, so the poison call is the first that the GOAWAY excludes.
#[tokio::test]
async fn poison_call_after_cancelled_calls_is_sent_twice() {
    let broken = Arc::<AtomicUsize>::default();
    let server = slowly_breaking_server(&broken, previous).await;
    let channel = static_channel([server.address()], |channel| channel);
    wait_until_ready(&channel, 1).await;
    for _ in 0..10 {
        // Polled once, so that the stream is open for h2, and not for the server.
        assert!(call(&channel).now_or_never().is_none());
        let mut client = EchoClient::new(channel.clone());
        let endless = stream::pending::<EchoRequest>();
        assert!(client.client_stream(endless).now_or_never().is_none());
    }
    let status = EchoClient::new(channel).unary(poison()).await.unwrap_err();
    assert!(status.message().contains("PROTOCOL_ERROR"), "{status}");
    assert_eq!(broken.load(Ordering::SeqCst), 2);
}

/// The first excluded call need not be the reason: servers in Go, for example, exclude the calls that
/// arrive after the one that breaks the connection.
#[tokio::test]
async fn calls_that_an_error_excludes_are_sent_again() {
    const CALLS: usize = 10;
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let mut streams = Vec::new();
        for _ in 0..CALLS {
            streams.push(connection.next_request().await?);
        }
        if connection.index == 0 {
            connection.send_go_away(0, PROTOCOL_ERROR, "").await?;
        } else {
            for stream in streams {
                connection.respond_ok(stream).await?;
            }
        }
        connection.close().await
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel);
    futures::future::try_join_all((0..CALLS).map(|_| call(&channel)))
        .await
        .unwrap();
    assert_eq!(server.accepted(), 2);
}

/// A server need not know which call breaks the connection, and may name an earlier stream, or none.
#[tokio::test]
async fn poison_call_breaks_two_connections_whatever_the_last_stream() {
    let last_streams: [fn(u32) -> u32; 3] = [previous, |stream| stream - 6, |_| 0];
    for last_stream in last_streams {
        let broken = [(); 3].map(|()| Arc::<AtomicUsize>::default());
        let servers = futures::future::join_all(
            broken
                .iter()
                .map(|broken| slowly_breaking_server(broken, last_stream)),
        );
        let servers = servers.await;
        let channel = static_channel(servers.iter().map(FrameServer::address), |channel| {
            channel.policy(BalancePolicy::RoundRobin)
        });
        wait_until_ready(&channel, 3).await;
        for _ in 0..30 {
            call(&channel).await.unwrap();
        }
        EchoClient::new(channel).unary(poison()).await.unwrap_err();
        let mut broken = broken.map(|broken| broken.load(Ordering::SeqCst));
        broken.sort_unstable();
        assert_eq!(broken, [0, 1, 1]);
    }
}
