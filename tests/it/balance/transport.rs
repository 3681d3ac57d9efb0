//! Connections: kinds of sockets, GOAWAY, changed addresses, backoff.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::balanced::{
    Load, call, dynamic_channel, hello, in_flight, instance, is_ready, static_channel, status_of,
    unused_address, wait_until_ready,
};
use crate::support::echo::{EchoServer, EchoService, Options};
use crate::support::io::{Access, FaultyTcp};
use crate::support::raw::RawServer;
use crate::support::wait_until;
use futures::channel::mpsc;
use futures::{StreamExt, stream};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{EndpointState, Source};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use tonic::transport::Server;

/// The error of the only endpoint, once an attempt to connect to it has failed.
async fn last_error(channel: &BalancedChannel) -> String {
    let error = || channel.endpoints().first()?.last_error.clone();
    wait_until("an attempt has failed", async || error().is_some()).await;
    error().unwrap()
}

#[tokio::test]
async fn unix_socket_is_called() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("echo.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let connections = stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(io, _)| io);
        Some((accepted, listener))
    });
    let server = Server::builder().add_service(EchoService::new("on a socket").service());
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
async fn custom_connector_gets_the_address() {
    let connected = Arc::<std::sync::Mutex<Vec<Uri>>>::default();
    let log = Arc::clone(&connected);
    let connector = tower::service_fn(move |uri: Uri| {
        log.lock().unwrap().push(uri.clone());
        async move {
            if uri.host() == Some("nowhere") {
                return Err(io::Error::other("there is no such peer"));
            }
            let (near, far) = tokio::io::duplex(1 << 16);
            let name = uri.to_string();
            let server = Server::builder().add_service(EchoService::new(name).service());
            let incoming = stream::iter([Ok::<_, io::Error>(far)]).chain(stream::pending());
            tokio::spawn(server.serve_with_incoming(incoming));
            Ok(TokioIo::new(near))
        }
    });
    let channel = static_channel(["memory:1"], |builder| builder.connector(connector.clone()));
    assert_eq!(call(&channel).await.unwrap(), "http://memory:1/");
    assert_eq!(connected.lock().unwrap().len(), 1);

    let channel = static_channel(["nowhere:2"], |builder| {
        builder
            .connector(connector)
            .ready_timeout(Duration::from_secs(2))
    });
    let error = call(&channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let message = error.message();
    assert!(message.contains("nowhere:2"), "{message}");
    assert!(message.contains("there is no such peer"), "{message}");
}

#[tokio::test]
async fn host_name_is_resolved() {
    let server = EchoServer::start();
    let (_, port) = server.address().split_once(':').unwrap();
    let channel = static_channel([format!("localhost:{port}").as_str()], |builder| builder);
    assert_eq!(call(&channel).await.unwrap(), server.address());
}

#[tokio::test]
async fn all_settings_work_together() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| {
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
            .timeout(crate::support::PATIENCE)
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

/// A server that returns the URI and the user agent of a request.
async fn start_mirror() -> RawServer {
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

/// The URI and the user agent that the mirror saw.
async fn call_mirror(channel: &BalancedChannel, own_agent: Option<&str>) -> (String, String) {
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
async fn server_sees_origin_and_user_agent() {
    let server = start_mirror().await;
    let address = server.address();
    let own = concat!("goo-etcd/", env!("CARGO_PKG_VERSION"));

    let plain = static_channel([address], |builder| builder);
    let uri = format!("http://{address}/echo.Echo/Unary");
    assert_eq!(
        call_mirror(&plain, None).await,
        (uri.clone(), own.to_owned())
    );
    let agent = format!("call/3 {own}");
    assert_eq!(call_mirror(&plain, Some("call/3")).await, (uri, agent));

    let named = static_channel([address], |builder| {
        builder
            .origin(Uri::from_static("https://echo.example:444"))
            .user_agent("mine/2")
    });
    let uri = "https://echo.example:444/echo.Echo/Unary".to_owned();
    let agent = format!("mine/2 {own}");
    assert_eq!(call_mirror(&named, None).await, (uri, agent));
}

#[tokio::test]
async fn connections_per_endpoint_are_kept_open() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| {
        builder.connections_per_endpoint(3)
    });
    let connections = || channel.endpoints()[0].connections;
    wait_until("there are three connections", async || {
        channel.endpoints().len() == 1 && connections() == 3
    })
    .await;
    assert_eq!(server.counts().connections(), 3);
    let load = Load::start(&channel, 8);
    load.wait_for_calls(200).await;
    assert_eq!(server.counts().accepted(), 3);
    load.finish().await.assert_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expiring_connections_fail_no_call() {
    let short_lived = || {
        EchoServer::start_with(Options {
            max_connection_age: Some(Duration::from_millis(1_200)),
            ..Options::default()
        })
    };
    let servers = [short_lived(), short_lived()];
    let channel = static_channel(servers.iter().map(EchoServer::address), |builder| {
        builder.connections_per_endpoint(2)
    });
    wait_until_ready(&channel, 2).await;
    let load = Load::start(&channel, 16);
    for server in &servers {
        let accepted = || server.counts().accepted();
        wait_until("connections were replaced", async || accepted() >= 6).await;
    }
    load.finish().await.assert_no_failure();
}

#[tokio::test]
async fn goaway_with_an_open_stream_opens_a_new_connection() {
    let age = Duration::from_millis(1_500);
    let server = EchoServer::start_with(Options {
        max_connection_age: Some(age),
        ..Options::default()
    });
    let channel = static_channel([server.address()], |builder| builder.wait_for_ready(false));
    wait_until_ready(&channel, 1).await;
    let (requests, receiver) = mpsc::unbounded();
    requests.unbounded_send(hello()).unwrap();
    let mut client = EchoClient::new(channel.clone());
    let mut replies = client.bidi(receiver).await.unwrap().into_inner();
    replies.message().await.unwrap().unwrap();

    wait_until("there is a second connection", async || {
        server.counts().accepted() >= 2 && is_ready(&channel, server.address())
    })
    .await;
    assert!(
        server.counts().connections() >= 2,
        "the connection of the stream was closed"
    );
    // The call uses the new connection; the stream stays on the old one.
    call(&channel).await.unwrap();
    requests.unbounded_send(hello()).unwrap();
    replies.message().await.unwrap().unwrap();
    requests.close_channel();
    assert_eq!(replies.message().await.unwrap(), None);
    wait_until("the first connection is closed", async || {
        server.counts().connections() == 1
    })
    .await;
}

#[tokio::test]
async fn goaway_removes_the_endpoint_from_the_picker() {
    let mut server = EchoServer::start();
    let address = server.address().to_owned();
    let channel = static_channel([address.as_str()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let _open = client.bidi(stream::pending()).await.unwrap();
    server.begin_shutdown();
    wait_until("the endpoint is not ready", async || {
        !is_ready(&channel, &address)
    })
    .await;
    let status = status_of(&channel, &address).unwrap();
    assert_eq!(status.connections, 0);
    assert_eq!(status.in_flight, 1);
    assert!(!server.has_ended());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn moved_instance_is_connected_before_the_switch() {
    let servers: [EchoServer; 4] = std::array::from_fn(|_| EchoServer::start());
    let at = |which: usize| instance(servers[which].address()).id("the one");
    // Calls do not wait, so that a moment without an endpoint would fail a call.
    let (sets, channel) = dynamic_channel([], |builder| builder.wait_for_ready(false));
    sets.send([at(0)]);
    wait_until_ready(&channel, 1).await;
    let load = Load::start(&channel, 16);
    for (which, server) in servers.iter().enumerate() {
        sets.send([at(which)]);
        load.wait_until_called(server.address()).await;
    }
    wait_until("the other connections are closed", async || {
        let open = |server: &EchoServer| server.counts().connections();
        servers[..3].iter().map(open).sum::<usize>() == 0
    })
    .await;
    assert_eq!(channel.endpoints().len(), 1);
    load.finish().await.assert_no_failure();
}

#[tokio::test]
async fn old_address_serves_while_the_new_one_is_silent() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = (silent.local_addr().unwrap().to_string(), silent);
    let server = EchoServer::start();
    let other = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| {
        builder
            .wait_for_ready(false)
            .connect_timeout(crate::support::PATIENCE)
    });
    sets.send([instance(server.address()).id("the one")]);
    wait_until_ready(&channel, 1).await;
    sets.send([instance(&silent.0).id("the one")]);
    wait_until("the new address is being connected", async || {
        status_of(&channel, &silent.0).is_some_and(|e| e.state == EndpointState::Connecting)
    })
    .await;
    for _ in 0..50 {
        assert_eq!(call(&channel).await.unwrap(), server.address());
    }
    // The instance moves again, and the silent address is forgotten.
    sets.send([instance(other.address()).id("the one")]);
    wait_until("the third address is called", async || {
        call(&channel).await.unwrap() == other.address()
    })
    .await;
    assert_eq!(channel.endpoints().len(), 1);
}

#[tokio::test]
async fn old_address_is_dropped_if_the_new_one_is_unreachable() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| {
        builder
            .connect_timeout(Duration::from_millis(300))
            .ready_timeout(Duration::from_millis(300))
    });
    sets.send([instance(server.address()).id("the one")]);
    wait_until_ready(&channel, 1).await;
    let dead = unused_address();
    sets.send([instance(&dead).id("the one")]);
    wait_until("the old connection is closed", async || {
        server.counts().connections() == 0
    })
    .await;
    let error = call(&channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(&dead), "{error:?}");
}

#[tokio::test]
async fn endpoints_shows_every_state() {
    let server = EchoServer::start();
    let draining = EchoServer::start();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_at = silent.local_addr().unwrap().to_string();
    let dead = unused_address();
    let source = Source::fixed([
        instance(server.address()).weight(7),
        instance(draining.address()).draining(true),
        instance(&silent_at),
        instance(&dead),
    ]);
    let channel = BalancedChannel::builder(source)
        .connect_timeout(crate::support::PATIENCE)
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
        wait_until(&what, async || state(address) == Some(expected)).await;
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
    wait_until("nothing is in flight", async || in_flight(&channel) == 0).await;
    let shown = format!("{channel:?}");
    assert!(shown.contains(server.address()), "{shown}");
}

#[tokio::test]
async fn connect_backoff_follows_grpc() {
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
    let started = Instant::now();
    let channel = static_channel([address.as_str()], |builder| builder);
    // The backoff is 1, 1.6 and 2.56 s, with a jitter of 20 %.
    wait_until("a fourth attempt", async || seen() >= 4).await;
    assert!(started.elapsed() >= Duration::from_secs(4));
    let error = last_error(&channel).await;
    assert!(
        error.contains("did not answer as an HTTP/2 server"),
        "{error}"
    );
    drop(channel);

    let before = seen();
    let _channel = static_channel([address.as_str()], |builder| {
        builder.max_connect_backoff(Duration::from_millis(50))
    });
    wait_until("ten attempts", async || seen() >= before + 10).await;
}

#[tokio::test]
async fn responses_are_read_after_a_write_error() {
    let server = EchoServer::start();
    let address = server.address().to_owned();
    let broken = Arc::<AtomicBool>::default();
    let breaks = Arc::clone(&broken);
    let connector = tower::service_fn(move |_: Uri| {
        let broken = Arc::clone(&breaks);
        let address = address.clone();
        async move {
            let tcp = tokio::net::TcpStream::connect(address).await?;
            // Writes fail as after the peer has closed its end.
            let check = move |access| match access {
                Access::Write if broken.load(Ordering::SeqCst) => {
                    Err(io::ErrorKind::BrokenPipe.into())
                }
                _ => Ok(()),
            };
            Ok::<_, io::Error>(TokioIo::new(FaultyTcp::new(tcp, check)))
        }
    });
    let channel = static_channel(["breaks:1"], |builder| builder.connector(connector));
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone());
    let response = tokio::spawn({
        let mut client = client.clone();
        async move {
            let slow = EchoRequest {
                delay_ms: 300,
                ..hello()
            };
            client.unary(slow).await
        }
    });
    wait_until("the call is active on the server", async || {
        server.counts().active() == 1
    })
    .await;
    broken.store(true, Ordering::SeqCst);
    // The channel notices the failure by this call, which a server may have seen.
    let error = client.unary(hello()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("breaks:1"), "{error:?}");
    response.await.unwrap().unwrap();
}
