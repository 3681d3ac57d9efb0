//! What a user or a peer may do that a channel must survive.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::Duration;

use futures::{StreamExt, stream};
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Response;
use support::balanced::{
    call, call_within, changing, fixed, hello, instance, status_of, until_ready,
};
use support::echo::{EchoServer, Options};
use support::raw::RawServer;
use support::{PATIENCE, eventually};
use tonic::{Code, Request};

#[tokio::test]
async fn given_metadata_that_http_2_does_not_allow_when_called_then_that_and_every_other_call_succeeds()
 {
    let (a, b) = (EchoServer::start(), EchoServer::start());
    let channel = fixed([a.address(), b.address()], |builder| builder);
    until_ready(&channel, 2).await;
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
        // One that cannot be left out: HTTP/2 allows it with one value only.
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
async fn given_the_longest_of_all_durations_when_called_then_nothing_panics() {
    let server = EchoServer::start();
    let long = Duration::MAX;
    let channel = fixed([server.address()], |builder| {
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
async fn given_no_keep_alive_or_one_of_no_interval_when_built_then_the_one_works_and_the_other_does_not()
 {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| {
        builder.http2_keep_alive_interval(None)
    });
    assert_eq!(call(&channel).await.unwrap(), server.address());
    let (_, source) = support::balanced::Sets::new();
    let refused = goo_etcd::BalancedChannel::builder(source)
        .http2_keep_alive_interval(Some(Duration::ZERO))
        .build();
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("invalid http2_keep_alive_interval \"0 s\""),
        "{message}"
    );
}

#[tokio::test]
async fn given_an_instance_that_comes_back_under_another_id_when_called_then_its_connection_is_the_same()
 {
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| builder.wait_for_ready(false));
    let named = |id: u32| instance(server.address()).id(id.to_string());
    sets.send([named(0)]);
    until_ready(&channel, 1).await;
    for id in 1..=20 {
        sets.send([named(id)]);
        for _ in 0..10 {
            call(&channel).await.unwrap();
        }
    }
    assert_eq!(server.counts().accepted(), 1);
}

#[tokio::test]
async fn given_an_address_that_changes_to_one_that_is_not_there_yet_when_it_drains_then_at_once() {
    let (server, other) = (EchoServer::start(), EchoServer::start());
    // Accepts, and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent
        .local_addr()
        .map(|a| (silent, a.to_string()))
        .unwrap();
    let (sets, channel) = changing([], |builder| builder.policy(BalancePolicy::RoundRobin));
    let one = |address: &str| instance(address).id("one");
    let two = || instance(other.address()).id("two");
    sets.send([one(server.address()), two()]);
    until_ready(&channel, 2).await;
    sets.send([one(&silent.1), two()]);
    eventually("the new address is tried", async || {
        status_of(&channel, &silent.1).is_some()
    })
    .await;
    assert!(status_of(&channel, server.address()).is_some());
    sets.send([one(&silent.1).draining(true), two()]);
    eventually("it drains under its old address", async || {
        status_of(&channel, server.address()).is_some_and(|status| status.weight == 0)
    })
    .await;
    for _ in 0..20 {
        assert_eq!(call(&channel).await.unwrap(), other.address());
    }
}

#[tokio::test]
async fn given_a_peer_that_answers_as_a_web_server_when_called_then_it_is_a_failure_and_looks_like_one()
 {
    let web = RawServer::start(async |_, mut respond: h2::server::SendResponse<_>| {
        let unavailable = Response::builder().status(503).body(()).unwrap();
        respond.send_response(unavailable, true).unwrap();
    })
    .await;
    let server = EchoServer::start();
    let channel = fixed([web.address(), server.address()], |builder| {
        builder
            .policy(BalancePolicy::RoundRobin)
            .retry(RetryPolicy::new(2))
    });
    until_ready(&channel, 2).await;
    for _ in 0..20 {
        assert_eq!(call(&channel).await.unwrap(), server.address());
    }
    let latency = status_of(&channel, web.address()).unwrap().latency;
    assert!(latency > Some(Duration::from_millis(500)), "{latency:?}");

    let alone = fixed([web.address()], |builder| builder);
    let error = call(&alone).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
}

#[tokio::test]
async fn given_a_long_stream_when_it_fails_then_its_length_is_not_taken_for_a_latency() {
    let mut server = EchoServer::start();
    let channel = fixed([server.address()], |builder| builder);
    let (hold, held) = futures::channel::oneshot::channel::<()>();
    let requests = stream::iter([EchoRequest::default()]).chain(stream::once(async {
        held.await.ok();
        EchoRequest::default()
    }));
    let reply = EchoClient::new(channel.clone()).bidi(requests).await;
    let mut replies = reply.unwrap().into_inner();
    replies.next().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Its runtime goes, and with it the connection.
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

/// As servers in other languages answer a stream that ends well and has nothing in it.
#[tokio::test]
async fn given_a_stream_that_ends_well_in_its_head_when_read_then_it_is_no_failure() {
    let server = RawServer::start(async |_, mut respond: h2::server::SendResponse<_>| {
        let head = Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "0");
        respond.send_response(head.body(()).unwrap(), true).ok();
    })
    .await;
    let channel = fixed([server.address()], |builder| builder);
    let replies = EchoClient::new(channel.clone())
        .server_stream(hello())
        .await;
    assert!(replies.unwrap().into_inner().next().await.is_none());
    let latency = status_of(&channel, server.address()).unwrap().latency;
    assert!(latency < Some(Duration::from_millis(800)), "{latency:?}");
}

#[tokio::test]
async fn given_one_of_three_that_takes_calls_and_never_answers_when_they_time_out_then_it_is_left_alone()
 {
    let hangs = RawServer::start(async |_, respond: h2::server::SendResponse<_>| {
        std::future::pending::<()>().await;
        drop(respond);
    })
    .await;
    let healthy = [EchoServer::start(), EchoServer::start()];
    let addresses = [hangs.address(), healthy[0].address(), healthy[1].address()];
    let channel = fixed(addresses, |builder| builder);
    until_ready(&channel, 3).await;
    let mut late = 0;
    for _ in 0..60 {
        if let Err(status) = call_within(&channel, Duration::from_millis(200)).await {
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
            late += 1;
        }
    }
    // A third of them, if time-outs cost it nothing.
    assert!(late <= 10, "{late} of 60");
}

/// tonic's own server ends a call that is late with CANCELLED, at the same moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_a_server_that_notices_first_that_the_time_is_over_then_it_is_a_deadline_all_the_same()
 {
    let server = EchoServer::with(Options {
        delay: Duration::from_secs(60),
        ..Options::default()
    });
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    for _ in 0..50 {
        let together = (0..8).map(|_| call_within(&channel, Duration::from_millis(20)));
        for result in futures::future::join_all(together).await {
            let status = result.unwrap_err();
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
        }
    }
}
