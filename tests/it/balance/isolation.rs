//! A call harms only itself: calls that servers refuse, and responses that are odd.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream;
use goo_etcd::balance::RetryPolicy;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::Code;

use crate::support::PATIENCE;
use crate::support::balanced::{call, hello, static_channel, wait_until_ready};
use crate::support::frames::{
    DATA, END_STREAM, FrameServer, GRPC_HEAD, HEADERS, NO_ERROR, REFUSED_STREAM,
};

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

/// A response of a server of hand-written frames.
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
                    let head = [GRPC_HEAD, &[("connection", b"close")]].concat();
                    connection.send_headers(stream, &head, true).await?;
                    continue;
                }
            };
            connection.send_headers(stream, GRPC_HEAD, false).await?;
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
