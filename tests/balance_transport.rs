//! How endpoints are connected: sockets of all kinds, GOAWAY, addresses that change.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::channel::mpsc;
use futures::{StreamExt, stream};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{EndpointState, Source};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Uri;
use hyper_util::rt::TokioIo;
use support::balanced::{
    Load, call, changing, fixed, hello, in_flight, instance, is_ready, refusing, status_of,
    until_ready,
};
use support::echo::{EchoServer, Echoing, Options};
use support::eventually;
use support::raw::RawServer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use tonic::transport::Server;

/// What is known of the only endpoint, once an attempt to connect to it has failed.
async fn last_error(channel: &BalancedChannel) -> String {
    let error = || channel.endpoints().first()?.last_error.clone();
    eventually("an attempt has failed", async || error().is_some()).await;
    error().unwrap()
}

#[tokio::test]
async fn given_a_unix_socket_when_its_path_is_the_address_then_it_is_called() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let connections = stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(io, _)| io);
        Some((accepted, listener))
    });
    let server = Server::builder().add_service(Echoing::new("on a socket").service());
    let serving = tokio::spawn(server.serve_with_incoming(connections));
    let _serving = AbortOnDropHandle::new(serving);

    let address = format!("unix:{}", path.display());
    let channel = BalancedChannel::from_endpoints([address.clone()]).unwrap();
    assert_eq!(call(&channel).await.unwrap(), "on a socket");
    assert_eq!(channel.endpoints()[0].address, address);

    let missing = format!("unix:{}/missing", folder.path().display());
    let channel = BalancedChannel::from_endpoints([missing]).unwrap();
    let error = last_error(&channel).await;
    assert!(error.contains("No such file"), "{error}");
}

#[tokio::test]
async fn given_a_connector_in_memory_when_called_then_it_is_given_the_address() {
    let asked = Arc::<std::sync::Mutex<Vec<Uri>>>::default();
    let log = Arc::clone(&asked);
    let connector = tower::service_fn(move |uri: Uri| {
        log.lock().unwrap().push(uri.clone());
        async move {
            if uri.host() == Some("nowhere") {
                return Err(io::Error::other("there is no such peer"));
            }
            let (near, far) = tokio::io::duplex(1 << 16);
            let name = uri.to_string();
            let server = Server::builder().add_service(Echoing::new(name).service());
            let incoming = stream::iter([Ok::<_, io::Error>(far)]).chain(stream::pending());
            tokio::spawn(server.serve_with_incoming(incoming));
            Ok(TokioIo::new(near))
        }
    });
    let channel = fixed(["memory:1"], |builder| builder.connector(connector.clone()));
    assert_eq!(call(&channel).await.unwrap(), "http://memory:1/");
    assert_eq!(asked.lock().unwrap().len(), 1);

    let channel = fixed(["nowhere:2"], |builder| {
        builder
            .connector(connector)
            .ready_timeout(Duration::from_millis(200))
    });
    let error = call(&channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let message = error.message();
    assert!(message.contains("nowhere:2"), "{message}");
    assert!(message.contains("there is no such peer"), "{message}");
}

#[tokio::test]
async fn given_a_host_name_when_it_is_the_address_then_it_is_resolved() {
    let server = EchoServer::start();
    let (_, port) = server.address().split_once(':').unwrap();
    let channel = fixed([format!("localhost:{port}").as_str()], |builder| builder);
    assert_eq!(call(&channel).await.unwrap(), server.address());
}

#[tokio::test]
async fn given_every_setting_when_called_then_it_works() {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| {
        builder
            .tcp_nodelay(false)
            .tcp_keepalive(Some(Duration::from_secs(60)))
            .http2_keep_alive_interval(Some(Duration::from_millis(50)))
            .keep_alive_timeout(Duration::from_secs(20))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(70_000)
            .initial_connection_window_size(100_000)
            .http2_max_header_list_size(1 << 15)
            .http2_max_frame_size(1 << 15)
            .concurrency_limit(10)
            .timeout(support::PATIENCE)
    });
    let mut client = EchoClient::new(channel);
    for _ in 0..20 {
        let large = EchoRequest {
            payload: vec![1; 1 << 20],
            ..EchoRequest::default()
        };
        let reply = client.unary(large).await.unwrap().into_inner();
        assert_eq!(reply.payload.len(), 1 << 20);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(server.counts().accepted(), 1);
}

/// Answers with the URI and the user agent that it was asked with.
async fn mirror() -> RawServer {
    RawServer::start(|request, mut respond| async move {
        let agent = request.headers().get("user-agent").unwrap().clone();
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "5")
            .header("x-agent", agent)
            .header("x-uri", request.uri().to_string());
        respond.send_response(head.body(()).unwrap(), true).ok();
    })
    .await
}

async fn mirrored(channel: &BalancedChannel, own_agent: Option<&str>) -> (String, String) {
    let mut request = tonic::Request::new(hello());
    if let Some(agent) = own_agent {
        let metadata = request.metadata_mut();
        metadata.insert("user-agent", agent.parse().unwrap());
    }
    let status = EchoClient::new(channel.clone()).unary(request).await;
    let status = status.unwrap_err();
    let text = |key| status.metadata().get(key).unwrap().to_str().unwrap();
    (text("x-uri").to_owned(), text("x-agent").to_owned())
}

#[tokio::test]
async fn given_an_origin_and_a_user_agent_when_called_then_the_server_sees_them() {
    let server = mirror().await;
    let address = server.address();
    let own = concat!("goo-etcd/", env!("CARGO_PKG_VERSION"));

    let plain = fixed([address], |builder| builder);
    let uri = format!("http://{address}/echo.Echo/Unary");
    assert_eq!(mirrored(&plain, None).await, (uri.clone(), own.to_owned()));
    let agent = format!("call/3 {own}");
    assert_eq!(mirrored(&plain, Some("call/3")).await, (uri, agent));

    let named = fixed([address], |builder| {
        builder
            .origin(Uri::from_static("https://echo.example:444"))
            .user_agent("mine/2")
    });
    let uri = "https://echo.example:444/echo.Echo/Unary".to_owned();
    let agent = format!("mine/2 {own}");
    assert_eq!(mirrored(&named, None).await, (uri, agent));
}

#[tokio::test]
async fn given_three_connections_per_endpoint_when_called_then_there_are_three_and_stay() {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| {
        builder.connections_per_endpoint(3)
    });
    let connections = || channel.endpoints()[0].connections;
    eventually("three connections", async || {
        channel.endpoints().len() == 1 && connections() == 3
    })
    .await;
    assert_eq!(server.counts().connections(), 3);
    let load = Load::start(&channel, 8);
    load.goes_on_for(200).await;
    assert_eq!(server.counts().accepted(), 3);
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_connections_of_a_limited_age_when_under_load_with_streams_then_nothing_fails() {
    let short_lived = || {
        EchoServer::with(Options {
            max_connection_age: Some(Duration::from_millis(1_200)),
            ..Options::default()
        })
    };
    let servers = [short_lived(), short_lived()];
    let channel = fixed(servers.iter().map(EchoServer::address), |builder| {
        builder.connections_per_endpoint(2)
    });
    until_ready(&channel, 2).await;
    let load = Load::start(&channel, 16);
    for server in &servers {
        let accepted = || server.counts().accepted();
        eventually("connections were replaced", async || accepted() >= 6).await;
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test]
async fn given_goaway_with_an_open_stream_and_no_calls_then_a_new_connection_takes_over() {
    let age = Duration::from_millis(1_500);
    let server = EchoServer::with(Options {
        max_connection_age: Some(age),
        ..Options::default()
    });
    let channel = fixed([server.address()], |builder| builder.wait_for_ready(false));
    until_ready(&channel, 1).await;
    let (requests, receiver) = mpsc::unbounded();
    requests.unbounded_send(hello()).unwrap();
    let mut client = EchoClient::new(channel.clone());
    let mut replies = client.bidi(receiver).await.unwrap().into_inner();
    replies.message().await.unwrap().unwrap();

    eventually("there is a second connection", async || {
        server.counts().accepted() >= 2 && is_ready(&channel, server.address())
    })
    .await;
    assert!(server.counts().connections() >= 2, "the first one is held");
    // Not on the connection that is going away.
    call(&channel).await.unwrap();
    requests.unbounded_send(hello()).unwrap();
    replies.message().await.unwrap().unwrap();
    requests.close_channel();
    assert_eq!(replies.message().await.unwrap(), None);
    eventually("the first one is closed", async || {
        server.counts().connections() == 1
    })
    .await;
}

#[tokio::test]
async fn given_goaway_on_an_idle_channel_then_the_endpoint_leaves_the_picker_by_itself() {
    let mut server = EchoServer::start();
    let address = server.address().to_owned();
    let channel = fixed([address.as_str()], |builder| builder);
    until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let _open = client.bidi(stream::pending()).await.unwrap();
    server.begin_shutdown();
    eventually("it is not ready", async || !is_ready(&channel, &address)).await;
    let status = status_of(&channel, &address).unwrap();
    assert_eq!(status.connections, 0);
    assert_eq!(status.in_flight, 1);
    assert!(!server.has_ended());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_load_when_an_instance_moves_then_the_new_address_is_connected_before_it_counts() {
    let servers: [EchoServer; 4] = std::array::from_fn(|_| EchoServer::start());
    let at = |which: usize| instance(servers[which].address()).id("the one");
    // Nothing waits: a moment without an endpoint would be an error.
    let (sets, channel) = changing([], |builder| builder.wait_for_ready(false));
    sets.send([at(0)]);
    until_ready(&channel, 1).await;
    let load = Load::start(&channel, 16);
    for (which, server) in servers.iter().enumerate() {
        sets.send([at(which)]);
        load.reaches(server.address()).await;
    }
    eventually("the others are let go", async || {
        let open = |server: &EchoServer| server.counts().connections();
        servers[..3].iter().map(open).sum::<usize>() == 0
    })
    .await;
    assert_eq!(channel.endpoints().len(), 1);
    load.finish().await.assert_no_failure();
}

#[tokio::test]
async fn given_an_instance_that_moves_to_where_nobody_answers_then_the_old_one_serves_meanwhile() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = (silent.local_addr().unwrap().to_string(), silent);
    let server = EchoServer::start();
    let other = EchoServer::start();
    let (sets, channel) = changing([], |builder| {
        builder
            .wait_for_ready(false)
            .connect_timeout(support::PATIENCE)
    });
    sets.send([instance(server.address()).id("the one")]);
    until_ready(&channel, 1).await;
    sets.send([instance(&silent.0).id("the one")]);
    eventually("the new one is being connected", async || {
        status_of(&channel, &silent.0).is_some_and(|e| e.state == EndpointState::Connecting)
    })
    .await;
    for _ in 0..50 {
        assert_eq!(call(&channel).await.unwrap(), server.address());
    }
    // It moves on, and where nobody answered is forgotten.
    sets.send([instance(other.address()).id("the one")]);
    eventually("it is there", async || {
        call(&channel).await.unwrap() == other.address()
    })
    .await;
    assert_eq!(channel.endpoints().len(), 1);
}

#[tokio::test]
async fn given_an_instance_that_moved_when_the_new_one_cannot_be_reached_then_the_old_one_is_left()
{
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| {
        builder
            .connect_timeout(Duration::from_millis(300))
            .ready_timeout(Duration::from_millis(300))
    });
    sets.send([instance(server.address()).id("the one")]);
    until_ready(&channel, 1).await;
    let dead = refusing();
    sets.send([instance(&dead).id("the one")]);
    eventually("the old one is let go", async || {
        server.counts().connections() == 0
    })
    .await;
    let error = call(&channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(&dead), "{error:?}");
}

#[tokio::test]
async fn given_endpoints_in_every_state_when_asked_then_the_channel_tells_all_of_them() {
    let server = EchoServer::start();
    let draining = EchoServer::start();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_at = silent.local_addr().unwrap().to_string();
    let dead = refusing();
    let source = Source::fixed([
        instance(server.address()).weight(7),
        instance(draining.address()).draining(true),
        instance(&silent_at),
        instance(&dead),
    ]);
    let channel = BalancedChannel::builder(source)
        .connect_timeout(support::PATIENCE)
        .build()
        .unwrap();
    let state = |address: &str| status_of(&channel, address).map(|status| status.state);
    for (address, expected) in [
        (server.address(), EndpointState::Ready),
        (draining.address(), EndpointState::Draining),
        (silent_at.as_str(), EndpointState::Connecting),
        (dead.as_str(), EndpointState::Backoff),
    ] {
        let what = format!("{address} is {expected}");
        eventually(&what, async || state(address) == Some(expected)).await;
    }
    assert_eq!(channel.endpoints().len(), 4);
    let refused = status_of(&channel, &dead).unwrap();
    let error = refused.last_error.unwrap();
    assert!(error.contains("cannot connect"), "{error}");
    assert!(error.contains("Connection refused"), "{error}");
    assert_eq!((refused.connections, refused.in_flight), (0, 0));
    assert_eq!(refused.latency, None);

    let ready = || status_of(&channel, server.address()).unwrap();
    assert_eq!((ready().connections, ready().weight), (1, 7));
    assert_eq!((ready().latency, ready().last_error), (None, None));
    call(&channel).await.unwrap();
    assert!(ready().latency.is_some());
    let mut client = EchoClient::new(channel.clone());
    let open = client.bidi(stream::pending()).await.unwrap();
    assert_eq!(ready().in_flight, 1);
    drop(open);
    eventually("nothing is in flight", async || in_flight(&channel) == 0).await;
    let shown = format!("{channel:?}");
    assert!(shown.contains(server.address()), "{shown}");
}

#[tokio::test]
async fn given_a_peer_that_hangs_up_when_it_is_tried_again_then_as_seldom_as_grpc_wants() {
    let attempts = Arc::<AtomicUsize>::default();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let counter = Arc::clone(&attempts);
    let _accepting = AbortOnDropHandle::new(tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            counter.fetch_add(1, Ordering::SeqCst);
        }
    }));
    let seen = || attempts.load(Ordering::SeqCst);
    let begun = Instant::now();
    let channel = fixed([address.as_str()], |builder| builder);
    // After waits of 1, 1.6 and 2.56 s, each a fifth less at the least.
    eventually("a fourth attempt", async || seen() >= 4).await;
    assert!(begun.elapsed() >= Duration::from_secs(4));
    let error = last_error(&channel).await;
    assert!(
        error.contains("did not answer as an HTTP/2 server"),
        "{error}"
    );
    drop(channel);

    let before = seen();
    let _channel = fixed([address.as_str()], |builder| {
        builder.max_connect_backoff(Duration::from_millis(50))
    });
    eventually("ten attempts", async || seen() >= before + 10).await;
}

/// A connection whose writes can be made to fail, as they do when the peer has closed its end.
struct Breakable {
    io: tokio::net::TcpStream,
    broken: Arc<AtomicBool>,
}

impl AsyncRead for Breakable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Breakable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.broken.load(Ordering::SeqCst) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn given_a_connection_that_cannot_be_written_to_then_the_answers_that_come_are_still_read() {
    let server = EchoServer::start();
    let address = server.address().to_owned();
    let broken = Arc::<AtomicBool>::default();
    let breaks = Arc::clone(&broken);
    let connector = tower::service_fn(move |_: Uri| {
        let broken = Arc::clone(&breaks);
        let address = address.clone();
        async move {
            let io = tokio::net::TcpStream::connect(address).await?;
            Ok::<_, io::Error>(TokioIo::new(Breakable { io, broken }))
        }
    });
    let channel = fixed(["breaks:1"], |builder| builder.connector(connector));
    until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let answer = tokio::spawn({
        let mut client = client.clone();
        async move {
            let slow = EchoRequest {
                delay_ms: 300,
                ..hello()
            };
            client.unary(slow).await
        }
    });
    eventually("the server is at it", async || {
        server.counts().active() == 1
    })
    .await;
    broken.store(true, Ordering::SeqCst);
    // It notices by this one, which a server may have seen for all it knows.
    let error = client.unary(hello()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("breaks:1"), "{error:?}");
    answer.await.unwrap().unwrap();
}
