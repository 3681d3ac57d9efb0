//! Responses that are no gRPC, and statuses that cannot be decoded.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use h2::server::SendResponse;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Response;
use tonic::{Code, Status};

use crate::support::PATIENCE;
use crate::support::balanced::{call, hello, static_channel, status_of, wait_until_ready};
use crate::support::echo::EchoServer;
use crate::support::frames::{DATA, FrameServer, GRPC_HEAD, HEADERS, RST_STREAM};
use crate::support::raw::RawServer;

/// Headers of a response.
type Headers = &'static [(&'static str, &'static [u8])];

/// A server that responds to every request with this page, whose body never ends.
async fn endless_page(http: &'static str, content_type: Option<&'static str>) -> FrameServer {
    FrameServer::start(move |mut connection| async move {
        connection.handshake(&[]).await?;
        loop {
            let frame = connection.next().await?;
            if frame.kind == HEADERS {
                let mut head: Vec<(&str, &[u8])> = vec![(":status", http.as_bytes())];
                head.extend(content_type.map(|value| ("content-type", value.as_bytes())));
                let stream = frame.stream;
                connection.send_headers(stream, &head, false).await?;
                connection
                    .write_frame(DATA, 0, stream, b"<html>Bad gateway")
                    .await?;
            }
        }
    })
    .await
}

/// Makes a unary call, a server stream, a client stream and a bidi stream. Returns how each ended.
async fn call_in_all_ways(channel: &BalancedChannel) -> [Result<(), Status>; 4] {
    let mut client = EchoClient::new(channel.clone());
    let requests = || stream::iter(vec![EchoRequest::default(); 3]);
    let streamed = client.server_stream(hello()).await;
    let streamed = match streamed {
        Ok(response) => response.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    let bidi = match client.bidi(requests()).await {
        Ok(response) => response.into_inner().message().await.map(drop),
        Err(status) => Err(status),
    };
    [
        client.unary(hello()).await.map(drop),
        streamed,
        client.client_stream(requests()).await.map(drop),
        bidi,
    ]
}

/// Proxies respond like this while their servers restart. A plain tonic channel reports INTERNAL,
/// "invalid compression flag: 60".
#[tokio::test]
async fn page_without_end_has_the_code_for_its_http_status() {
    for (http, code) in [
        ("400", Code::Internal),
        ("401", Code::Unauthenticated),
        ("403", Code::PermissionDenied),
        ("404", Code::Unimplemented),
        ("429", Code::Unavailable),
        ("500", Code::Unknown),
        ("502", Code::Unavailable),
        ("503", Code::Unavailable),
        ("504", Code::Unavailable),
        ("200", Code::Unknown),
    ] {
        let server = endless_page(http, Some("text/html")).await;
        let channel = static_channel([server.address()], |channel| channel);
        let results = tokio::time::timeout(PATIENCE, call_in_all_ways(&channel)).await;
        for result in results.expect("the body is not read to its end") {
            let status = result.unwrap_err();
            assert_eq!(status.code(), code, "{status}");
            let message = status.message();
            assert!(message.contains(&format!("HTTP {http}")), "{message}");
            assert!(message.contains("text/html"), "{message}");
        }
        assert_eq!(server.accepted(), 1, "a page ends no connection");
    }
}

#[tokio::test]
async fn response_without_content_type_is_no_grpc() {
    let server = endless_page("200", None).await;
    let channel = static_channel([server.address()], |channel| channel);
    for result in call_in_all_ways(&channel).await {
        let status = result.unwrap_err();
        assert_eq!(status.code(), Code::Unknown, "{status}");
        let message = status.message();
        assert!(message.contains("no content-type"), "{message}");
    }
}

#[tokio::test]
async fn stream_of_a_page_is_reset() {
    let (reset, mut resets) = tokio::sync::mpsc::unbounded_channel();
    let server = FrameServer::start(move |mut connection| {
        let reset = reset.clone();
        async move {
            connection.handshake(&[]).await?;
            loop {
                let frame = connection.next().await?;
                if frame.kind == HEADERS {
                    let head: Headers = &[(":status", b"502"), ("content-type", b"text/html")];
                    connection.send_headers(frame.stream, head, false).await?;
                }
                if frame.kind == RST_STREAM {
                    reset.send(frame.stream).ok();
                }
            }
        }
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel);
    call(&channel).await.unwrap_err();
    let stream = tokio::time::timeout(PATIENCE, resets.recv()).await;
    assert_eq!(stream.expect("the stream is reset"), Some(1));
}

/// Asserts that calls which fail at one server are retried at a healthy one, and count against the
/// first.
async fn assert_retried(failing: &str) {
    let server = EchoServer::start();
    let channel = static_channel([failing, server.address()], |channel| {
        channel
            .policy(BalancePolicy::RoundRobin)
            .retry(RetryPolicy::new(2))
    });
    wait_until_ready(&channel, 2).await;
    for _ in 0..20 {
        assert_eq!(call(&channel).await.unwrap(), server.address());
    }
    let latency = status_of(&channel, failing).unwrap().latency;
    assert!(latency > Some(Duration::from_millis(500)), "{latency:?}");
}

/// A page of a proxy is retried like the status that it stands for.
#[tokio::test]
async fn page_is_retried_on_another_endpoint() {
    let proxy = endless_page("503", Some("text/html")).await;
    assert_retried(proxy.address()).await;
}

#[tokio::test]
async fn http_error_without_a_body_is_retried() {
    let proxy = RawServer::start(async |_, mut respond: SendResponse<Bytes>| {
        let unavailable = Response::builder().status(503).body(()).unwrap();
        respond.send_response(unavailable, true).unwrap();
    })
    .await;
    assert_retried(proxy.address()).await;

    let alone = static_channel([proxy.address()], |channel| channel);
    let status = call(&alone).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

/// A server that ends every response with these headers, in the head or in trailers.
async fn ending_with(end: Headers, in_head: bool) -> FrameServer {
    FrameServer::start(move |mut connection| async move {
        connection.handshake(&[]).await?;
        loop {
            let stream = connection.next_request().await?;
            if in_head {
                let head = [GRPC_HEAD, end].concat();
                connection.send_headers(stream, &head, true).await?;
            } else {
                connection.send_headers(stream, GRPC_HEAD, false).await?;
                connection.send_headers(stream, end, true).await?;
            }
        }
    })
    .await
}

/// tonic's own parser panics on these details (`Status::from_header_map`).
#[tokio::test]
async fn details_that_are_not_base64_are_left_out() {
    for in_head in [true, false] {
        for details in [b"%%%".as_slice(), b"AAAA,BBBB", b"A", b"caf\xe9"] {
            let end: Headers = Box::leak(Box::new([
                ("grpc-status", b"9".as_slice()),
                ("grpc-message", b"not now"),
                ("grpc-status-details-bin", details),
            ]));
            let server = ending_with(end, in_head).await;
            let channel = static_channel([server.address()], |channel| channel);
            for result in call_in_all_ways(&channel).await {
                let status = result.unwrap_err();
                assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
                assert_eq!(status.message(), "not now");
                assert!(status.details().is_empty());
            }
        }
    }
}

#[tokio::test]
async fn message_that_is_not_utf8_keeps_the_code() {
    for in_head in [true, false] {
        for (message, decoded) in [
            (b"caf\xe9".as_slice(), "caf\u{fffd}"),
            (b"caf%e9 %41", "caf\u{fffd} A"),
            (b"caf%C3%A9", "caf\u{e9}"),
        ] {
            let end: Headers = Box::leak(Box::new([
                ("grpc-status", b"5".as_slice()),
                ("grpc-message", message),
            ]));
            let server = ending_with(end, in_head).await;
            let channel = static_channel([server.address()], |channel| channel);
            for result in call_in_all_ways(&channel).await {
                let status = result.unwrap_err();
                assert_eq!(status.code(), Code::NotFound, "{status}");
                assert_eq!(status.message(), decoded);
            }
        }
    }
}

#[tokio::test]
async fn message_that_is_not_utf8_does_not_prevent_a_retry() {
    let end: Headers = &[("grpc-status", b"14"), ("grpc-message", b"caf\xe9")];
    let failing = ending_with(end, true).await;
    assert_retried(failing.address()).await;
}
