//! Requests as callers really make them: empty streams, headers copied from HTTP/1, no time left.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::channel::mpsc;
use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use goo_etcd::balance::Source;
use goo_etcd::testing::{Etcd, EtcdBuilder};
use goo_etcd::{BalancedChannel, EndpointState, Instance};
use h2::server::SendResponse;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::{HeaderMap, Response, Uri};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::DuplexStream;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::{Code, Request};
use tower::Service;

use crate::support::balanced::{
    call, call_with_timeout, hello, static_channel, status_of, wait_until_ready,
};
use crate::support::echo::{EchoServer, EchoService};
use crate::support::io::{Access, FaultyTcp};
use crate::support::raw::{RawServer, respond_ok};
use crate::support::{find_etcd, wait_for, wait_until};

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
        let removed = [
            ("content-length", "45"),
            ("content-length", "0"),
            ("connection", "x-a, X-B,x-c ,te"),
            ("connection", "keep-alive"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("host", "gateway.example.com"),
            ("x-a", "1"),
            ("x-a", "2"),
            ("x-b", "3"),
            ("x-c", "4"),
        ];
        for (name, value) in [("te", "gzip"), ("x-kept", "2")].iter().chain(&removed) {
            request.metadata_mut().append(*name, value.parse().unwrap());
        }
        EchoClient::new(channel).unary(request).await.unwrap();
        let seen = seen.lock();
        for (name, _) in removed {
            assert!(!seen.contains_key(name), "{name}: {seen:?}");
        }
        assert_eq!(seen["x-kept"], "2");
        assert_eq!(seen.get_all("te").iter().collect::<Vec<_>>(), ["trailers"]);
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

    /// The latency of a server that has failed a call with INTERNAL.
    async fn latency_after_internal(server: &RawServer) -> Option<Duration> {
        let channel = static_channel([server.address()], |builder| builder);
        let status = call(&channel).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal, "{status}");
        status_of(&channel, server.address()).unwrap().latency
    }

    /// A server refuses a malformed request with RST_STREAM(PROTOCOL_ERROR).
    #[tokio::test]
    async fn malformed_request_is_no_sample_of_its_server() {
        let server = RawServer::start(async |_, mut respond: SendResponse<Bytes>| {
            respond.send_reset(h2::Reason::PROTOCOL_ERROR);
        })
        .await;
        assert_eq!(latency_after_internal(&server).await, None);

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
        let latency = latency_after_internal(&server).await;
        // A failure counts as one second.
        assert!(latency < Some(Duration::from_millis(900)), "{latency:?}");

        // A proxy that refuses a request with a page of HTTP.
        let server = RawServer::start(async |_, mut respond: SendResponse<Bytes>| {
            let bad_request = Response::builder().status(400).body(()).unwrap();
            respond.send_response(bad_request, true).unwrap();
        })
        .await;
        let latency = latency_after_internal(&server).await;
        assert!(latency < Some(Duration::from_millis(900)), "{latency:?}");
    }
}

mod panics {
    use super::*;

    /// Where a connector panics.
    #[derive(Clone, Copy, PartialEq)]
    enum At {
        Ready,
        Call,
        Future,
        Io(Access),
    }

    const EVERYWHERE: [At; 5] = [
        At::Ready,
        At::Call,
        At::Future,
        At::Io(Access::Read),
        At::Io(Access::Write),
    ];

    type Check = Box<dyn Fn(Access) -> std::io::Result<()> + Send>;

    /// A connector over TCP that panics in its first attempts.
    #[derive(Clone)]
    struct Panicking {
        at: At,
        attempts: Arc<AtomicUsize>,
        panics: usize,
    }

    impl Panicking {
        /// `panics` is how many attempts panic.
        fn new(at: At, panics: usize) -> Self {
            Self {
                at,
                attempts: Arc::default(),
                panics,
            }
        }
    }

    impl Service<Uri> for Panicking {
        type Response = TokioIo<FaultyTcp<Check>>;
        type Error = std::io::Error;
        type Future = BoxFuture<'static, std::io::Result<Self::Response>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            let attempt = self.attempts.fetch_add(1, Ordering::SeqCst);
            assert!(attempt >= self.panics || self.at != At::Ready, "no route");
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, uri: Uri) -> Self::Future {
            let panics = self.attempts.load(Ordering::SeqCst) <= self.panics;
            assert!(!panics || self.at != At::Call, "no route");
            let at = self.at;
            Box::pin(async move {
                tokio::task::yield_now().await;
                assert!(!panics || at != At::Future, "no route");
                let tcp = TcpStream::connect(uri.authority().unwrap().as_str()).await?;
                let check: Check = Box::new(move |access| {
                    assert!(!panics || at != At::Io(access), "no route");
                    Ok(())
                });
                Ok(TokioIo::new(FaultyTcp::new(tcp, check)))
            })
        }
    }

    #[tokio::test]
    async fn connector_that_panics_once_connects_next_time() {
        let server = EchoServer::start();
        for at in EVERYWHERE {
            let connector = Panicking::new(at, 1);
            let channel = static_channel([server.address()], |builder| {
                builder
                    .connector(connector.clone())
                    .max_connect_backoff(Duration::from_millis(50))
            });
            assert_eq!(call(&channel).await.unwrap(), server.address());
            assert_eq!(connector.attempts.load(Ordering::SeqCst), 2);
        }
    }

    #[tokio::test]
    async fn connector_that_always_panics_shows_its_text() {
        let server = EchoServer::start();
        for at in EVERYWHERE {
            let connector = Panicking::new(at, usize::MAX);
            let channel = static_channel([server.address()], |builder| {
                builder
                    .connector(connector.clone())
                    .max_connect_backoff(Duration::from_millis(50))
                    .ready_timeout(Duration::from_secs(3))
            });
            let status = call(&channel).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            assert!(status.message().contains("panicked: no route"), "{status}");
            wait_until("the state is true", async || {
                let status = status_of(&channel, server.address()).unwrap();
                let error = status.last_error.unwrap_or_default();
                status.state == EndpointState::Backoff && error.contains("panicked: no route")
            })
            .await;
            // A panic hook that prints a backtrace takes longer than the backoff.
            wait_until("it is tried again", async || {
                connector.attempts.load(Ordering::SeqCst) > 1
            })
            .await;
        }
    }

    #[tokio::test]
    async fn source_that_panics_leaves_its_last_set_in_use() {
        let server = EchoServer::start();
        let set = vec![Instance::new("echo", server.address())];
        let sets = stream::iter([set]).chain(stream::once(async { panic!("bad file") }));
        let channel = BalancedChannel::builder(Source::new("a file", sets))
            .build()
            .unwrap();
        wait_until("the panic is visible", async || {
            let status = status_of(&channel, server.address());
            let error = status.and_then(|status| status.last_error);
            error.is_some_and(|error| error.contains("the source panicked: bad file"))
        })
        .await;
        assert_eq!(call(&channel).await.unwrap(), server.address());
    }
}

mod request_stream {
    use super::*;

    #[tokio::test]
    async fn that_panics_fails_its_call_only() {
        let server = EchoServer::start();
        let channel = static_channel([server.address()], |builder| builder);
        wait_until_ready(&channel, 1).await;
        let (go, panic) = futures::channel::oneshot::channel::<()>();
        let requests = stream::iter([EchoRequest::default()]).chain(stream::once(async {
            panic.await.ok();
            panic!("bad file")
        }));
        let mut client = EchoClient::new(channel.clone());
        let call = tokio::spawn(async move { client.client_stream(requests).await });
        wait_until("the call is at the server", async || {
            server.counts().active() == 1
        })
        .await;
        go.send(()).unwrap();
        let status = wait_for("the call ends", call).await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Internal, "{status}");
        assert!(status.message().contains("panicked: bad file"), "{status}");
        // No failure of the server.
        let latency = status_of(&channel, server.address()).unwrap().latency;
        assert_eq!(latency, None);
        assert_eq!(super::call(&channel).await.unwrap(), server.address());
        assert_eq!(server.counts().accepted(), 1);
    }
}

mod many_failing_endpoints {
    use super::*;

    /// 3,000 endpoints fail at once, again and again, until their channel is dropped.
    async fn attempts_end_with_the_channel() {
        let attempts = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&attempts);
        let refuse = tower::service_fn(move |_: Uri| {
            counter.fetch_add(1, Ordering::SeqCst);
            let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            std::future::ready(Err::<TokioIo<TcpStream>, _>(refused))
        });
        let addresses: Vec<_> = (1..=3_000).map(|port| format!("10.0.0.1:{port}")).collect();
        let channel = static_channel(addresses.iter().map(String::as_str), |builder| {
            builder
                .connector(refuse)
                .max_connect_backoff(Duration::from_millis(1))
        });
        let begun = || attempts.load(Ordering::SeqCst);
        wait_until("each has failed twice", async || begun() > 6_000).await;
        let at_drop = begun();
        drop(channel);
        wait_until("no attempt is made for half a second", async || {
            let before = begun();
            tokio::time::sleep(Duration::from_millis(500)).await;
            begun() == before
        })
        .await;
        // An attempt of each endpoint may be on its way. A pool that cannot be dropped makes up to a
        // million more.
        let late = begun() - at_drop;
        assert!(late < 30_000, "{late}");
    }

    #[tokio::test]
    async fn end_with_their_channel_on_one_thread() {
        attempts_end_with_the_channel().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn end_with_their_channel_on_two_threads() {
        attempts_end_with_the_channel().await;
    }
}

mod paused_time {
    use super::*;

    /// The channel's page recommends this for tests in paused time.
    #[tokio::test(start_paused = true)]
    async fn works_with_a_connector_in_memory() {
        let (to_server, connections) = mpsc::unbounded::<std::io::Result<DuplexStream>>();
        let server = tonic::transport::Server::builder()
            .add_service(EchoService::new("in memory").service())
            .serve_with_incoming(connections);
        let _server = AbortOnDropHandle::new(tokio::spawn(server));
        let connector = tower::service_fn(move |_: Uri| {
            let (client, server) = tokio::io::duplex(64 * 1024);
            let connected = to_server.unbounded_send(Ok(server));
            std::future::ready(connected.map(|()| TokioIo::new(client)))
        });
        let channel = static_channel(["in-memory:1"], |builder| builder.connector(connector));
        let started = Instant::now();
        let mut request = Request::new(hello());
        request.get_mut().delay_ms = 3_600_000;
        EchoClient::new(channel.clone())
            .unary(request)
            .await
            .unwrap();
        let waited = started.elapsed();
        assert!(waited >= Duration::from_secs(3_600), "{waited:?}");
        // The connection has been idle for an hour.
        tokio::time::sleep(Duration::from_secs(3_600)).await;
        assert_eq!(call(&channel).await.unwrap(), "in memory");
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
        // A nanosecond has passed when the call looks for an endpoint.
        for value in ["0n", "0u", "0m", "0S", "0M", "0H", "00000000S", "1n"] {
            for _ in 0..20 {
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
        let channel = BalancedChannel::builder(source)
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
