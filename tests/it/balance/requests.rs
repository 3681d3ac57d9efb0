//! Requests as callers really make them: empty streams, headers copied from HTTP/1, no time left.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use goo_etcd::Instance;
use goo_etcd::balance::Source;
use goo_etcd::testing::{Etcd, EtcdBuilder};
use h2::server::SendResponse;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::{HeaderMap, Response};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use tonic::body::Body;
use tonic::{Code, Request};
use tower::Service;

use crate::support::balanced::{
    call, call_with_timeout, hello, static_channel, status_of, wait_until_ready,
};
use crate::support::echo::EchoServer;
use crate::support::raw::{RawServer, respond_ok};
use crate::support::{find_etcd, wait_for};

mod empty_request_stream {
    use super::*;

    /// A server that responds once the request's stream has ended, and notes the lengths of its
    /// DATA frames.
    async fn frame_counter() -> (RawServer, Arc<Mutex<Vec<usize>>>) {
        let lengths = Arc::<Mutex<Vec<usize>>>::default();
        let seen = Arc::clone(&lengths);
        let server = RawServer::start(move |request, respond| {
            let seen = Arc::clone(&seen);
            async move {
                let mut body = request.into_body();
                // A request that ends with its HEADERS has no DATA frame.
                while let Some(Ok(data)) = body.data().await {
                    seen.lock().push(data.len());
                }
                respond_ok(respond);
            }
        })
        .await;
        (server, lengths)
    }

    #[tokio::test]
    async fn ends_with_an_empty_data_frame() {
        let (server, lengths) = frame_counter().await;
        let channel = static_channel([server.address()], |builder| builder);
        let mut client = EchoClient::new(channel);
        let empty = || stream::empty::<EchoRequest>();
        wait_for("a client stream ends", client.client_stream(empty()))
            .await
            .unwrap();
        assert_eq!(std::mem::take(&mut *lengths.lock()), [0]);
        wait_for("a bidi stream ends", client.bidi(empty()))
            .await
            .unwrap();
        assert_eq!(std::mem::take(&mut *lengths.lock()), [0]);
        // A unary call needs no such frame.
        client.unary(hello()).await.unwrap();
        assert_eq!(lengths.lock().len(), 1);
    }

    /// The grpc-go in etcd 3.4 and 3.5 sees the end of a request only in a DATA frame, so that a
    /// stream which ended on HEADERS would hang.
    #[tokio::test]
    async fn ends_at_the_grpc_go_of_etcd() {
        let old = find_etcd("ETCD_3_4", "etcd-3.4");
        let old = old.map(|program| Etcd::builder().program(program));
        for builder in [Some(Etcd::builder()), old].into_iter().flatten() {
            keep_alive_without_a_request(builder).await;
        }
    }

    async fn keep_alive_without_a_request(builder: EtcdBuilder) {
        let etcd = builder.start().await.unwrap();
        let mut channel = static_channel([&*etcd.endpoint()], |builder| builder);
        let request = http::Request::post("/etcdserverpb.Lease/LeaseKeepAlive")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::empty());
        let call = async {
            let response = channel.call(request.unwrap()).await.unwrap();
            let in_head = response.headers().get("grpc-status").cloned();
            let body = response.into_body().collect().await.unwrap();
            in_head.or_else(|| body.trailers()?.get("grpc-status").cloned())
        };
        let status = wait_for("etcd ends the stream", call).await;
        assert_eq!(status.unwrap(), "0");
    }
}

mod headers_of_http1 {
    use super::*;

    /// grpc#29216: a gateway copies the headers of HTTP/1 requests into metadata.
    #[tokio::test]
    async fn content_length_and_hop_by_hop_headers_are_not_sent() {
        let seen = Arc::<Mutex<HeaderMap>>::default();
        let noted = Arc::clone(&seen);
        let server = RawServer::start(move |request, respond| {
            *noted.lock() = request.headers().clone();
            async move { respond_ok(respond) }
        })
        .await;
        let channel = static_channel([server.address()], |builder| builder);
        let mut request = Request::new(hello());
        for (name, value) in [
            ("content-length", "45"),
            ("connection", "x-hop, te"),
            ("x-hop", "1"),
            ("host", "gateway.example.com"),
            ("x-kept", "2"),
        ] {
            request.metadata_mut().insert(name, value.parse().unwrap());
        }
        EchoClient::new(channel).unary(request).await.unwrap();
        let seen = seen.lock();
        for name in ["content-length", "connection", "x-hop", "host"] {
            assert!(!seen.contains_key(name), "{name}: {seen:?}");
        }
        assert_eq!(seen["x-kept"], "2");
        assert_eq!(seen["te"], "trailers");
    }

    #[tokio::test]
    async fn real_server_accepts_and_is_not_blamed() {
        let server = EchoServer::start();
        let channel = static_channel([server.address()], |builder| builder);
        wait_until_ready(&channel, 1).await;
        let mut request = Request::new(hello());
        let length = "45".parse().unwrap();
        request.metadata_mut().insert("content-length", length);
        let mut client = EchoClient::new(channel.clone());
        client.unary(request).await.unwrap();
        let status = status_of(&channel, server.address()).unwrap();
        assert!(
            status.latency < Some(Duration::from_millis(500)),
            "{status:?}"
        );
    }

    /// A server refuses a malformed request with RST_STREAM(PROTOCOL_ERROR).
    #[tokio::test]
    async fn malformed_request_is_no_sample_of_its_server() {
        let server = RawServer::start(async |_, mut respond: SendResponse<Bytes>| {
            respond.send_reset(h2::Reason::PROTOCOL_ERROR);
        })
        .await;
        let channel = static_channel([server.address()], |builder| builder);
        let status = call(&channel).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal, "{status}");
        let latency = status_of(&channel, server.address()).unwrap().latency;
        assert_eq!(latency, None);

        // The same after the response has begun.
        let server = RawServer::start(async |_, mut respond: SendResponse<Bytes>| {
            let head = Response::builder().header("content-type", "application/grpc");
            let mut body = respond
                .send_response(head.body(()).unwrap(), false)
                .unwrap();
            body.send_data(Bytes::from_static(&[0; 5]), false).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            body.send_reset(h2::Reason::PROTOCOL_ERROR);
        })
        .await;
        let channel = static_channel([server.address()], |builder| builder);
        let status = call(&channel).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal, "{status}");
        let latency = status_of(&channel, server.address()).unwrap().latency;
        // A failure counts as one second.
        assert!(latency < Some(Duration::from_millis(900)), "{latency:?}");
    }
}

mod no_time_left {
    use super::*;

    /// A server that counts the calls that reach it.
    async fn counter() -> (RawServer, Arc<AtomicUsize>) {
        let received = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&received);
        let server = RawServer::start(move |_, respond| {
            counter.fetch_add(1, Ordering::SeqCst);
            async move { respond_ok(respond) }
        })
        .await;
        (server, received)
    }

    #[tokio::test]
    async fn zero_timeout_sends_nothing() {
        let (server, received) = counter().await;
        let channel = static_channel([server.address()], |builder| builder);
        wait_until_ready(&channel, 1).await;
        for value in ["0n", "0S", "0H"] {
            for _ in 0..50 {
                let mut request = Request::new(hello());
                let timeout = value.parse().unwrap();
                request.metadata_mut().insert("grpc-timeout", timeout);
                let mut client = EchoClient::new(channel.clone());
                let status = client.unary(request).await.unwrap_err();
                assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
            }
        }
        let status = call_with_timeout(&channel, Duration::ZERO)
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        assert!(status.message().contains("no time was left"), "{status}");
        assert_eq!(received.load(Ordering::SeqCst), 0);
        // The calls that were not sent hold no stream.
        call(&channel).await.unwrap();
        assert_eq!(received.load(Ordering::SeqCst), 1);
        assert_eq!(status_of(&channel, server.address()).unwrap().in_flight, 0);
    }

    #[tokio::test]
    async fn zero_timeout_of_the_channel_sends_nothing() {
        let (server, received) = counter().await;
        let source = Source::fixed([Instance::new("echo", server.address())]);
        let channel = goo_etcd::BalancedChannel::builder(source)
            .timeout(Duration::ZERO)
            .build()
            .unwrap();
        wait_until_ready(&channel, 1).await;
        for _ in 0..50 {
            let status = call(&channel).await.unwrap_err();
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        }
        assert_eq!(received.load(Ordering::SeqCst), 0);
    }
}
