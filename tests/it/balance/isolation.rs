//! A call harms only itself: calls that servers refuse or break on, and responses that are odd.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream;
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::Code;

use crate::support::PATIENCE;
use crate::support::balanced::{Load, call, hello, in_flight, static_channel, wait_until_ready};
use crate::support::frames::{
    DATA, END_STREAM, FrameServer, HEADERS, NO_ERROR, PROTOCOL_ERROR, REFUSED_STREAM,
};
use crate::support::wait_until;

/// The payload of a call on which a server breaks.
const POISON: &[u8] = b"poison";

const GRPC_HEAD: [(&str, &[u8]); 2] = [(":status", b"200"), ("content-type", b"application/grpc")];

/// A server that refuses every stream after a time, and the number of streams.
async fn refusing(after: Duration) -> (FrameServer, Arc<AtomicUsize>) {
    let streams = Arc::<AtomicUsize>::default();
    let counter = Arc::clone(&streams);
    let server = FrameServer::start(move |mut connection| {
        let streams = Arc::clone(&counter);
        async move {
            connection.handshake(&[]).await?;
            loop {
                let stream = connection.next_request().await?;
                streams.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(after).await;
                connection.reset_stream(stream, REFUSED_STREAM).await?;
            }
        }
    })
    .await;
    (server, streams)
}

/// gRFC A6 allows one transparent retry; this channel makes five.
#[tokio::test]
async fn refused_stream_is_sent_again_five_times() {
    for count in [1, 3] {
        for retry in [None, Some(RetryPolicy::new(5))] {
            let servers: Vec<_> =
                futures::future::join_all((0..count).map(|_| refusing(Duration::ZERO))).await;
            let addresses = servers.iter().map(|(server, _)| server.address());
            let channel = static_channel(addresses, |channel| match &retry {
                Some(policy) => channel.retry(policy.clone()),
                None => channel,
            });
            wait_until_ready(&channel, count).await;
            let status = call(&channel).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            let streams = servers.iter().map(|(_, s)| s.load(Ordering::SeqCst));
            assert_eq!(streams.sum::<usize>(), 6, "{retry:?}");
        }
    }
}

#[tokio::test]
async fn time_at_refusing_servers_counts_for_ready_timeout() {
    let (server, streams) = refusing(Duration::from_millis(200)).await;
    let channel = static_channel([server.address()], |channel| {
        channel.ready_timeout(Duration::from_millis(300))
    });
    wait_until_ready(&channel, 1).await;
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    // The first attempt ends within `ready_timeout`, the second after it.
    assert_eq!(streams.load(Ordering::SeqCst), 2);
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
                    .send_go_away(frame.stream - 2, PROTOCOL_ERROR, "bad header")
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
        let others: Vec<_> = (0..OTHERS)
            .map(|_| {
                let channel = channel.clone();
                tokio::spawn(async move { call(&channel).await })
            })
            .collect();
        wait_until("the others are in flight", async || {
            in_flight(&channel) == OTHERS
        })
        .await;
        let poison = EchoRequest {
            payload: POISON.to_vec(),
            ..EchoRequest::default()
        };
        let mut client = EchoClient::new(channel.clone());
        let status = client.unary(poison.clone()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        let go_away = "GOAWAY PROTOCOL_ERROR: bad header";
        assert!(status.message().contains(go_away), "{status}");
        assert_eq!(broken.load(Ordering::SeqCst), 2, "{retry:?}");
        // The servers that are not broken have not responded to the others.
        while others.iter().any(|other| !other.is_finished()) {
            client.unary(poison.clone()).await.unwrap_err();
        }
        for other in others {
            other.await.unwrap().unwrap();
        }
    }
}

/// A server that responds at once, but breaks on a poison call after a time in which further calls
/// arrive. Counts the connections that it ends.
async fn slowly_breaking_server(broken: &Arc<AtomicUsize>) -> FrameServer {
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
                    .send_go_away(frame.stream - 2, PROTOCOL_ERROR, "bad header")
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
        futures::future::join_all((0..SERVERS).map(|_| slowly_breaking_server(&broken))).await;
    let channel = static_channel(servers.iter().map(FrameServer::address), |channel| {
        channel.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, SERVERS).await;
    let load = Load::start(&channel, 60);
    let mut client = EchoClient::new(channel.clone());
    for _ in 0..POISON_CALLS {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let poison = EchoRequest {
            payload: POISON.to_vec(),
            ..EchoRequest::default()
        };
        client.unary(poison).await.unwrap_err();
    }
    let report = load.finish().await;
    let failed = report.failures.len();
    let first = report.failures.first().map(|failure| &failure.status);
    assert_eq!(failed, 0, "of {} calls: {first:?}", report.calls());
    assert_eq!(broken.load(Ordering::SeqCst), 2 * POISON_CALLS);
}

/// A server that recycles its connections refuses the streams of all callers but one each time.
#[tokio::test]
async fn graceful_goaway_may_exclude_a_call_many_times() {
    const CALLERS: usize = 32;
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let stream = connection.next_request().await?;
        connection.respond_ok(stream).await?;
        connection.send_go_away(stream, NO_ERROR, "").await?;
        connection.close().await
    })
    .await;
    let channel = static_channel([server.address()], |channel| {
        channel.ready_timeout(PATIENCE)
    });
    wait_until_ready(&channel, 1).await;
    let calls = (0..CALLERS).map(|_| call(&channel));
    for result in futures::future::join_all(calls).await {
        result.unwrap();
    }
    assert!(server.accepted() >= CALLERS);
}

/// What a server of hand-written frames responds with.
#[derive(Debug, Clone, Copy)]
enum Odd {
    Informational,
    EarlyResponse,
    NoTrailers,
    TrailersWithoutStatus,
    StatusIsNoNumber,
    UnknownStatus,
    StatusTwice,
    InformationalEnd,
    ForbiddenHeader,
}

async fn odd_server(odd: Odd) -> FrameServer {
    FrameServer::start(move |mut connection| async move {
        connection.handshake(&[]).await?;
        loop {
            let frame = connection.next().await?;
            if frame.kind != HEADERS {
                continue;
            }
            let stream = frame.stream;
            let trailers: &[(&str, &[u8])] = match odd {
                Odd::Informational => {
                    for status in ["100", "103"] {
                        let head = [(":status", status.as_bytes()), ("link", b"</a>")];
                        connection.send_headers(stream, &head, false).await?;
                    }
                    &[("grpc-status", b"0"), ("x-more", b"1")]
                }
                Odd::EarlyResponse => &[("grpc-status", b"0")],
                Odd::NoTrailers => &[],
                Odd::TrailersWithoutStatus => &[("x-more", b"1")],
                Odd::StatusIsNoNumber => &[("grpc-status", b"ok")],
                Odd::UnknownStatus => &[("grpc-status", b"99")],
                Odd::StatusTwice => &[("grpc-status", b"5"), ("grpc-status", b"0")],
                Odd::InformationalEnd => {
                    connection
                        .send_headers(stream, &[(":status", b"103")], true)
                        .await?;
                    continue;
                }
                Odd::ForbiddenHeader => {
                    let head = [&GRPC_HEAD[..], &[("connection", b"close")]].concat();
                    connection.send_headers(stream, &head, true).await?;
                    continue;
                }
            };
            connection.send_headers(stream, &GRPC_HEAD, false).await?;
            let is_end = if trailers.is_empty() { END_STREAM } else { 0 };
            connection
                .write_frame(DATA, is_end, stream, &[0; 5])
                .await?;
            if !trailers.is_empty() {
                connection.send_headers(stream, trailers, true).await?;
            }
            if matches!(odd, Odd::EarlyResponse) {
                // The server does not read the rest of the request (RFC 9113, section 8.1).
                connection.reset_stream(stream, NO_ERROR).await?;
            }
        }
    })
    .await
}

#[tokio::test]
async fn odd_response_has_its_code_and_keeps_the_connection() {
    for (odd, code) in [
        (Odd::Informational, Code::Ok),
        (Odd::EarlyResponse, Code::Ok),
        (Odd::NoTrailers, Code::Unknown),
        (Odd::TrailersWithoutStatus, Code::Unknown),
        (Odd::StatusIsNoNumber, Code::Unknown),
        (Odd::UnknownStatus, Code::Unknown),
        (Odd::StatusTwice, Code::NotFound),
        // RFC 9113 calls these malformed (sections 8.1 and 8.2.2).
        (Odd::InformationalEnd, Code::Internal),
        (Odd::ForbiddenHeader, Code::Internal),
    ] {
        let server = odd_server(odd).await;
        let channel = static_channel([server.address()], |channel| channel);
        let mut client = EchoClient::new(channel.clone());
        for _ in 0..3 {
            let unary = client.unary(hello()).await.map(drop);
            assert_eq!(code_of(unary), code, "{odd:?}");
            let endless = stream::pending::<EchoRequest>();
            let streamed = client.client_stream(endless).await.map(drop);
            assert_eq!(code_of(streamed), code, "{odd:?}");
        }
        assert_eq!(server.accepted(), 1, "{odd:?}");
    }
}

fn code_of(result: Result<(), tonic::Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}
