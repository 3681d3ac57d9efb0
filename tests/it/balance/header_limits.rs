//! Headers that are too large: of requests, which are not sent, and of responses.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use goo_etcd::balance::RetryPolicy;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::{Code, Request, Status};

use crate::support::PATIENCE;
use crate::support::balanced::{
    call, calls_in_flight, hello, in_flight, static_channel, wait_until_ready,
};
use crate::support::echo::EchoServer;
use crate::support::frames::{
    CONTINUATION, DATA, END_HEADERS, FrameConnection, FrameServer, GRPC_HEAD, HEADERS,
    MAX_HEADER_LIST_SIZE, SETTINGS, frame, header_frames,
};
use crate::support::wait_until;

const MIB: usize = 1024 * 1024;

/// How many other calls are in flight.
const OTHERS: usize = 60;

fn with_metadata(bytes: usize) -> Request<EchoRequest> {
    let mut request = Request::new(hello());
    let value = "x".repeat(bytes).parse().unwrap();
    request.metadata_mut().insert("x-large", value);
    request
}

fn assert_too_large(status: &Status, text: &str) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains(text), "{status}");
}

/// A default server of tonic ends the connection of such a request.
#[tokio::test]
async fn large_request_is_not_sent_and_fails_alone() {
    let servers = [(); 3].map(|()| EchoServer::start());
    let channel = static_channel(servers.iter().map(EchoServer::address), |channel| channel);
    wait_until_ready(&channel, 3).await;
    let others: Vec<_> = (0..OTHERS)
        .map(|_| {
            let mut client = EchoClient::new(channel.clone());
            let slow = EchoRequest {
                delay_ms: 300,
                ..hello()
            };
            tokio::spawn(async move { client.unary(slow).await })
        })
        .collect();
    wait_until("the others are in flight", async || {
        in_flight(&channel) == OTHERS
    })
    .await;
    let mut client = EchoClient::new(channel.clone());
    for size in [17_000, 70_000, 2_000_000] {
        let status = client.unary(with_metadata(size)).await.unwrap_err();
        assert_too_large(&status, "SETTINGS_MAX_HEADER_LIST_SIZE");
    }
    for other in others {
        other.await.unwrap().unwrap();
    }
    assert!(servers.iter().all(|server| server.counts().accepted() == 1));
    let calls: u64 = servers.iter().map(|server| server.counts().calls()).sum();
    assert_eq!(calls, OTHERS as u64);
}

/// Netty's servers accept 8 KiB by default.
#[tokio::test]
async fn request_keeps_the_latest_limit_of_its_server() {
    let server = FrameServer::start(|mut connection| async move {
        connection
            .handshake(&[(MAX_HEADER_LIST_SIZE, 8192)])
            .await?;
        let stream = connection.next_request().await?;
        // The new limit arrives before the response.
        let raised = [(MAX_HEADER_LIST_SIZE, 65_536)];
        connection.send_settings(&raised).await?;
        connection.respond_ok(stream).await?;
        loop {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
        }
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel);
    let mut client = EchoClient::new(channel);
    let status = client.unary(with_metadata(20_000)).await.unwrap_err();
    assert_too_large(&status, "8192 bytes");
    client.unary(with_metadata(7_000)).await.unwrap();
    client.unary(with_metadata(20_000)).await.unwrap();
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn own_limit_is_advertised() {
    for (set, expected) in [
        (None, 16_384),
        (Some(256), 256),
        (Some(5_000_000), 5_000_000),
    ] {
        let (sent, settings) = tokio::sync::oneshot::channel();
        let sent = Arc::new(std::sync::Mutex::new(Some(sent)));
        let server = FrameServer::start(move |mut connection| {
            let sent = Arc::clone(&sent);
            async move {
                connection.read_preface().await?;
                let first = connection.read_frame().await?;
                assert_eq!(first.kind, SETTINGS);
                if let Some(sent) = sent.lock().unwrap().take() {
                    sent.send(first.payload).ok();
                }
                std::future::pending().await
            }
        })
        .await;
        let _channel = static_channel([server.address()], |channel| match set {
            Some(size) => channel.http2_max_header_list_size(size),
            None => channel,
        });
        let payload = tokio::time::timeout(PATIENCE, settings).await.unwrap();
        let limits: Vec<u32> = payload
            .unwrap()
            .chunks_exact(6)
            .filter(|setting| setting[..2] == MAX_HEADER_LIST_SIZE.to_be_bytes())
            .map(|setting| u32::from_be_bytes(setting[2..].try_into().unwrap()))
            .collect();
        assert_eq!(limits, [expected]);
    }
}

#[tokio::test]
async fn smallest_limit_has_room_for_a_call() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |channel| {
        channel.http2_max_header_list_size(256)
    });
    assert_eq!(call(&channel).await.unwrap(), server.address());
    let source = goo_etcd::balance::Source::fixed([]);
    let refused = goo_etcd::BalancedChannel::builder(source)
        .http2_max_header_list_size(0)
        .build();
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("at least 256 bytes"), "{message}");
}

/// Which part of a response is large.
#[derive(Debug, Clone, Copy)]
enum Part {
    Head,
    Trailers,
    TrailersOnly,
}

async fn respond_large(
    connection: &mut FrameConnection,
    stream: u32,
    part: Part,
    message: &[u8],
) -> io::Result<()> {
    // The status comes last, so that it is missing if the headers are not read to their end.
    let status: [(&str, &[u8]); 2] = [("grpc-message", message), ("grpc-status", b"9")];
    match part {
        Part::Head => {
            let head = [GRPC_HEAD, &[("x-large", message)]].concat();
            connection.send_headers(stream, &head, false).await?;
            connection.write_frame(DATA, 0, stream, &[0; 5]).await?;
            let end: [(&str, &[u8]); 1] = [("grpc-status", b"0")];
            connection.send_headers(stream, &end, true).await
        }
        Part::Trailers => {
            connection.send_headers(stream, GRPC_HEAD, false).await?;
            connection.send_headers(stream, &status, true).await
        }
        Part::TrailersOnly => {
            let head = [GRPC_HEAD, &status].concat();
            connection.send_headers(stream, &head, true).await
        }
    }
}

/// A server that leaves the first requests without a response, responds with large headers to the
/// next, and then to the others.
async fn large_after_others(part: Part, size: usize) -> FrameServer {
    FrameServer::start(move |mut connection| async move {
        connection.handshake(&[]).await?;
        let mut others = Vec::new();
        while others.len() < OTHERS {
            others.push(connection.next_request().await?);
        }
        let stream = connection.next_request().await?;
        respond_large(&mut connection, stream, part, &vec![b'x'; size]).await?;
        for stream in others {
            connection.respond_ok(stream).await?;
        }
        loop {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
        }
    })
    .await
}

/// grpc-rust#1834 and hyperium/h2#915 report connections that end because of such responses.
#[tokio::test]
async fn large_response_fails_alone() {
    for part in [Part::Head, Part::Trailers, Part::TrailersOnly] {
        for size in [16_400, 65_537, 300_000, MIB] {
            let server = large_after_others(part, size).await;
            let channel = static_channel([server.address()], |channel| {
                channel.retry(RetryPolicy::new(5))
            });
            wait_until_ready(&channel, 1).await;
            let others = calls_in_flight(&channel, OTHERS).await;
            let status = call(&channel).await.unwrap_err();
            assert_too_large(&status, "http2_max_header_list_size, 16384 bytes");
            for other in join_all(others).await {
                other.unwrap().unwrap();
            }
            call(&channel).await.unwrap();
            assert_eq!(server.accepted(), 1, "{part:?} {size}");
        }
    }
}

#[tokio::test]
async fn larger_own_limit_lets_large_headers_pass() {
    let server = large_after_others(Part::Head, 3 * MIB / 2).await;
    let channel = static_channel([server.address()], |channel| {
        channel.http2_max_header_list_size(2 * MIB as u32)
    });
    wait_until_ready(&channel, 1).await;
    let calls = (0..=OTHERS).map(|_| call(&channel));
    for result in join_all(calls).await {
        result.unwrap();
    }
    assert_eq!(server.accepted(), 1);
}

/// The status is missing, and not in trailers that are too large.
#[tokio::test]
async fn large_head_that_was_read_is_no_cause_of_a_later_error() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        loop {
            let stream = connection.next_request().await?;
            let large = vec![b'x'; 100_000];
            let head = [GRPC_HEAD, &[("x-large", &large[..])]].concat();
            connection.send_headers(stream, &head, false).await?;
            connection.write_frame(DATA, 0, stream, &[0; 5]).await?;
            let trailers: [(&str, &[u8]); 1] = [("x-more", b"1")];
            connection.send_headers(stream, &trailers, true).await?;
        }
    })
    .await;
    let channel = static_channel([server.address()], |channel| {
        channel.http2_max_header_list_size(200_000)
    });
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unknown, "{status}");
}

/// HEADERS and CONTINUATION frames of 1 KiB each.
fn in_small_frames(stream: u32, headers: &[(&str, &[u8])]) -> Vec<u8> {
    let whole = header_frames(stream, headers, true);
    let mut block = Vec::new();
    let mut rest = &whole[..];
    while let [a, b, c, ..] = rest {
        let end = 9 + u32::from_be_bytes([0, *a, *b, *c]) as usize;
        block.extend(&rest[9..end]);
        rest = &rest[end..];
    }
    let mut bytes = Vec::new();
    let pieces = block.chunks(1024);
    let last = pieces.len() - 1;
    for (index, piece) in pieces.enumerate() {
        let kind = if index == 0 { HEADERS } else { CONTINUATION };
        let end_stream = u8::from(index == 0);
        let end_headers = if index == last { END_HEADERS } else { 0 };
        bytes.extend(frame(kind, end_stream | end_headers, stream, piece));
    }
    bytes
}

/// A HEADERS frame of a few KiB that stands for 8 MiB of headers: an entry of the dynamic table,
/// repeated with one byte each (RFC 7541, sections 6.1 and 6.2.1).
fn repeated_header(stream: u32) -> Vec<u8> {
    const VALUE: usize = 4000;
    // Indexed `:status: 200`, then a literal that the table gets, with a length of two bytes.
    let mut block = vec![0x88, 0x40, 1, b'x', 0x7f, 0xa1, 0x1e];
    block.extend([b'v'; VALUE]);
    // The first entry of the dynamic table.
    block.extend([0xbe; 8 * MIB / VALUE]);
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// A head in more CONTINUATION frames than h2 takes, one byte each.
fn scattered_header(stream: u32) -> Vec<u8> {
    let mut bytes = frame(HEADERS, 0, stream, &[0x88]);
    let indexed = 0x88;
    for _ in 0..200 {
        bytes.extend(frame(CONTINUATION, 0, stream, &[indexed]));
    }
    bytes
}

/// Headers that h2 cannot read may be few bytes, so they must not pass for harmless because the
/// connection carried large ones before.
#[tokio::test]
async fn small_unreadable_headers_are_not_asked_for_twice() {
    let all = (1..=16).map(Code::from).collect::<Vec<_>>();
    for unreadable in [repeated_header, scattered_header] {
        let calls = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&calls);
        let server = FrameServer::start(move |mut connection| {
            let calls = Arc::clone(&counter);
            async move {
                connection.handshake(&[]).await?;
                let stream = connection.next_request().await?;
                let large = vec![b'x'; 100_000];
                respond_large(&mut connection, stream, Part::Head, &large).await?;
                loop {
                    let stream = connection.next_request().await?;
                    calls.fetch_add(1, Ordering::SeqCst);
                    connection.write_bytes(&unreadable(stream)).await?;
                }
            }
        })
        .await;
        let channel = static_channel([server.address()], |channel| {
            channel
                .http2_max_header_list_size(200_000)
                .retry(RetryPolicy::new(5).on(all.clone()))
        });
        call(&channel).await.unwrap();
        let result = call(&channel).await;
        assert_eq!(calls.load(Ordering::SeqCst), 1, "{result:?}");
        // The next connection would respond to the call.
        result.unwrap_err();
    }
}

/// Above 1 MiB the connection may end. The call must not end another one.
#[tokio::test]
async fn call_with_unreadable_headers_is_not_sent_again() {
    let all = (1..=16).map(Code::from).collect::<Vec<_>>();
    for part in [Some(Part::Head), Some(Part::Trailers), None] {
        for size in [2 * MIB, 6 * MIB] {
            let calls = Arc::<AtomicUsize>::default();
            let mut servers = Vec::new();
            for _ in 0..3 {
                let counter = Arc::clone(&calls);
                let server = FrameServer::start(move |mut connection| {
                    let calls = Arc::clone(&counter);
                    async move {
                        connection.handshake(&[]).await?;
                        loop {
                            let stream = connection.next_request().await?;
                            calls.fetch_add(1, Ordering::SeqCst);
                            let large = vec![b'x'; size];
                            match part {
                                Some(part) => {
                                    respond_large(&mut connection, stream, part, &large).await?;
                                }
                                None => {
                                    let head = [GRPC_HEAD, &[("x-large", &large)]].concat();
                                    let frames = in_small_frames(stream, &head);
                                    connection.write_bytes(&frames).await?;
                                }
                            }
                        }
                    }
                });
                servers.push(server.await);
            }
            let channel = static_channel(servers.iter().map(FrameServer::address), |channel| {
                channel.retry(RetryPolicy::new(5).on(all.clone()))
            });
            wait_until_ready(&channel, 3).await;
            let status = call(&channel).await.unwrap_err();
            assert_too_large(&status, "http2_max_header_list_size");
            assert_eq!(calls.load(Ordering::SeqCst), 1, "{part:?} {size}");
        }
    }
}
