//! Unusual settings, requests and peers that a channel must survive.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::balanced::{
    call, call_with_timeout, dynamic_channel, hello, instance, static_channel, status_of,
    wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::raw::RawServer;
use crate::support::{PATIENCE, wait_until};
use futures::{StreamExt, stream};
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Response;
use tonic::{Code, Request};

#[tokio::test]
async fn metadata_forbidden_in_http2_breaks_no_call() {
    let (a, b) = (EchoServer::start(), EchoServer::start());
    let channel = static_channel([a.address(), b.address()], |builder| builder);
    wait_until_ready(&channel, 2).await;
    for name in [
        "connection",
        "keep-alive",
        "proxy-connection",
        "transfer-encoding",
        "upgrade",
    ] {
        let mut request = Request::new(hello());
        request
            .metadata_mut()
            .insert(name, "keep-alive".parse().unwrap());
        EchoClient::new(channel.clone())
            .unary(request)
            .await
            .unwrap();
        // The channel does not remove `te`, because HTTP/2 allows it with the value `trailers`.
        let mut request = Request::new(hello());
        request.metadata_mut().insert("te", "gzip".parse().unwrap());
        let _ = EchoClient::new(channel.clone()).unary(request).await;
        for _ in 0..4 {
            call(&channel).await.unwrap();
        }
    }
    assert_eq!(a.counts().accepted() + b.counts().accepted(), 2);
}

#[tokio::test]
async fn longest_durations_do_not_panic() {
    let server = EchoServer::start();
    let long = Duration::MAX;
    let channel = static_channel([server.address()], |builder| {
        builder
            .timeout(long)
            .ready_timeout(long)
            .connect_timeout(long)
            .max_connect_backoff(long)
            .http2_keep_alive_interval(Some(long))
            .keep_alive_timeout(long)
            .retry(RetryPolicy::new(2).backoff(long, long))
    });
    assert_eq!(call(&channel).await.unwrap(), server.address());
    let mut request = Request::new(hello());
    request
        .metadata_mut()
        .insert("grpc-timeout", "99999999H".parse().unwrap());
    EchoClient::new(channel).unary(request).await.unwrap();
}

#[tokio::test]
async fn keep_alive_may_be_off_but_not_zero() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| {
        builder.http2_keep_alive_interval(None)
    });
    assert_eq!(call(&channel).await.unwrap(), server.address());
    let (_, source) = crate::support::balanced::SetSender::new();
    let result = goo_etcd::BalancedChannel::builder(source)
        .http2_keep_alive_interval(Some(Duration::ZERO))
        .build();
    let message = result.unwrap_err().to_string();
    assert!(
        message.contains("invalid http2_keep_alive_interval \"0 s\""),
        "{message}"
    );
}

#[tokio::test]
async fn new_id_at_the_same_address_reuses_the_connection() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| builder.wait_for_ready(false));
    let named = |id: u32| instance(server.address()).id(id.to_string());
    sets.send([named(0)]);
    wait_until_ready(&channel, 1).await;
    for id in 1..=20 {
        sets.send([named(id)]);
        for _ in 0..10 {
            call(&channel).await.unwrap();
        }
    }
    assert_eq!(server.counts().accepted(), 1);
}

#[tokio::test]
async fn draining_applies_while_a_replacement_connects() {
    let (server, other) = (EchoServer::start(), EchoServer::start());
    // The listener accepts connections and sends nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent
        .local_addr()
        .map(|a| (silent, a.to_string()))
        .unwrap();
    let (sets, channel) = dynamic_channel([], |builder| builder.policy(BalancePolicy::RoundRobin));
    let one = |address: &str| instance(address).id("one");
    let two = || instance(other.address()).id("two");
    sets.send([one(server.address()), two()]);
    wait_until_ready(&channel, 2).await;
    sets.send([one(&silent.1), two()]);
    wait_until("the new address is tried", async || {
        status_of(&channel, &silent.1).is_some()
    })
    .await;
    assert!(status_of(&channel, server.address()).is_some());
    sets.send([one(&silent.1).draining(true), two()]);
    wait_until("the old address drains", async || {
        status_of(&channel, server.address()).is_some_and(|status| status.weight == 0)
    })
    .await;
    for _ in 0..20 {
        assert_eq!(call(&channel).await.unwrap(), other.address());
    }
}

#[tokio::test]
async fn failed_stream_does_not_count_its_length_as_latency() {
    let mut server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| builder);
    let (hold, held) = futures::channel::oneshot::channel::<()>();
    let requests = stream::iter([EchoRequest::default()]).chain(stream::once(async {
        held.await.ok();
        EchoRequest::default()
    }));
    let reply = EchoClient::new(channel.clone()).bidi(requests).await;
    let mut replies = reply.unwrap().into_inner();
    replies.next().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Dropping the server closes the connection.
    server.begin_shutdown();
    drop(server);
    drop(hold);
    let ended = tokio::time::timeout(PATIENCE, async { while replies.next().await.is_some() {} });
    ended.await.unwrap();
    let status = channel.endpoints().pop().unwrap();
    assert!(
        status
            .latency
            .is_none_or(|latency| latency <= Duration::from_secs(2)),
        "{status:?}"
    );
}

/// Servers in other languages end an empty stream with OK in its response headers.
#[tokio::test]
async fn trailers_only_ok_stream_is_no_failure() {
    let server = RawServer::start(async |_, mut respond: h2::server::SendResponse<_>| {
        let head = Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "0");
        respond.send_response(head.body(()).unwrap(), true).ok();
    })
    .await;
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let started = Instant::now();
    let replies = EchoClient::new(channel.clone())
        .server_stream(hello())
        .await;
    assert!(replies.unwrap().into_inner().next().await.is_none());
    // A failure would count as one second, which the call does not take.
    let latency = status_of(&channel, server.address()).unwrap().latency;
    assert!(latency <= Some(started.elapsed()), "{latency:?}");
}

#[tokio::test]
async fn server_that_never_responds_is_avoided() {
    let received = Arc::<AtomicUsize>::default();
    let counter = Arc::clone(&received);
    let hangs = RawServer::start(move |_, respond| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move {
            std::future::pending::<()>().await;
            drop(respond);
        }
    })
    .await;
    let healthy = [EchoServer::start(), EchoServer::start()];
    let addresses = [hangs.address(), healthy[0].address(), healthy[1].address()];
    let channel = static_channel(addresses, |builder| builder);
    wait_until_ready(&channel, 3).await;
    for _ in 0..60 {
        if let Err(status) = call_with_timeout(&channel, Duration::from_millis(500)).await {
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        }
    }
    // The server would receive a third of the calls if timeouts had no effect on picking.
    let received = received.load(Ordering::SeqCst);
    assert!(received <= 10, "{received} of 60");
}

/// tonic's server ends a call at its deadline with CANCELLED, at the same moment as the client.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_side_cancel_at_the_deadline_is_deadline_exceeded() {
    let server = EchoServer::start_with(Options {
        delay: Duration::from_secs(60),
        ..Options::default()
    });
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    for _ in 0..50 {
        let together = (0..8).map(|_| call_with_timeout(&channel, Duration::from_millis(20)));
        for result in futures::future::join_all(together).await {
            let status = result.unwrap_err();
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        }
    }
}
