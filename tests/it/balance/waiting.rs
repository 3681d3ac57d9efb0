//! Calls that wait for an endpoint, and deadlines: how long calls take, and their errors.

use std::time::{Duration, Instant};

use crate::support::balanced::{
    SetSender, call, call_with_timeout, dynamic_channel, hello, in_flight, instance, is_ready,
    static_channel, unused_address, wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::raw::{RawServer, respond_ok};
use crate::support::{PATIENCE, wait_until};
use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, RetryPolicy, Source};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::{Code, Request};

#[tokio::test]
async fn empty_set_fails_at_the_deadline() {
    let (_sets, channel) = dynamic_channel([], |builder| builder);
    let started = Instant::now();
    let error = call_with_timeout(&channel, Duration::from_millis(300))
        .await
        .unwrap_err();
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(300), "{took:?}");
    // Without the deadline the call would wait for `ready_timeout`, which is 5 s by default.
    assert!(took <= Duration::from_millis(3_500), "{took:?}");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    let cause = "no instances under services/echo/";
    assert!(error.message().contains(cause), "{error:?}");
}

#[tokio::test]
async fn missing_set_fails_after_ready_timeout() {
    let (_sets, source) = SetSender::new();
    let channel = BalancedChannel::builder(source)
        .ready_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let started = Instant::now();
    let error = call(&channel).await.unwrap_err();
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert_eq!(error.code(), Code::Unavailable);
    let cause = "no instances under services/echo/ (waited 300ms)";
    assert_eq!(error.message(), cause);
}

#[tokio::test]
async fn deadline_takes_precedence_over_ready_timeout() {
    let both = Duration::from_millis(100);
    let (_sets, channel) = dynamic_channel([], |builder| builder.ready_timeout(both));
    for _ in 0..10 {
        let error = call_with_timeout(&channel, both).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    }
}

#[tokio::test]
async fn unreachable_endpoints_are_named_with_their_errors() {
    let addresses = [unused_address(), unused_address(), unused_address()];
    let channel = static_channel(addresses.iter().map(String::as_str), |builder| {
        builder.ready_timeout(Duration::from_secs(1))
    });
    let started = Instant::now();
    let error = call(&channel).await.unwrap_err();
    let took = started.elapsed();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(took >= Duration::from_secs(1), "{took:?}");
    // The default of `ready_timeout` is 5 s.
    assert!(took <= Duration::from_secs(4), "{took:?}");
    let message = error.message();
    assert!(message.contains("none of 3 instances under"), "{message}");
    for address in &addresses {
        assert!(message.contains(address), "{address} in {message}");
    }
    let refused = message.matches("Connection refused").count();
    assert_eq!(refused, 3, "{message}");
}

#[tokio::test]
async fn without_wait_for_ready_calls_fail_at_once() {
    let address = unused_address();
    let (sets, channel) = dynamic_channel([], |builder| {
        builder.wait_for_ready(false).ready_timeout(10 * PATIENCE)
    });
    let error = tokio::time::timeout(PATIENCE, call(&channel)).await;
    let error = error.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(error.message(), "no instances under services/echo/");

    sets.send([instance(&address)]);
    wait_until("the set is applied", async || {
        channel.endpoints().len() == 1
    })
    .await;
    let error = tokio::time::timeout(PATIENCE, call(&channel)).await;
    let error = error.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(&address), "{error:?}");
}

#[tokio::test]
async fn error_lists_endpoints_that_take_no_calls() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| {
        builder.ready_timeout(Duration::from_millis(200))
    });
    sets.send([
        instance(server.address()).draining(true),
        instance("no address").id("broken"),
    ]);
    wait_until("the set is applied", async || {
        channel.endpoints().len() == 1
    })
    .await;
    let error = call(&channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let message = error.message();
    assert!(message.contains("none of 2 instances"), "{message}");
    let draining = format!("{} (draining)", server.address());
    assert!(message.contains(&draining), "{message}");
    let broken = "invalid address \"no address\"";
    assert!(message.contains(broken), "{message}");
    assert_eq!(server.counts().calls(), 0);
}

#[tokio::test]
async fn tls_instance_gets_no_calls_without_tls() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| {
        builder.ready_timeout(Duration::from_millis(200))
    });
    sets.send([instance(server.address()).tls(true)]);
    wait_until("the error names TLS", async || {
        let error = call(&channel).await.unwrap_err();
        error
            .message()
            .contains("speaks TLS and the channel does not")
    })
    .await;
    assert_eq!(server.counts().connections(), 0);
}

#[tokio::test]
async fn waiting_calls_use_a_new_endpoint() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| builder.ready_timeout(PATIENCE));
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let channel = channel.clone();
            tokio::spawn(async move { call(&channel).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(waiting.iter().all(|call| !call.is_finished()));
    sets.send([instance(server.address())]);
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap(), server.address());
    }
}

/// The timeout of a call that only its deadline ends.
const LIMIT: Duration = Duration::from_secs(1);

/// Asserts that a call ended at its deadline. Without the deadline each of these calls takes a
/// minute or longer.
fn assert_on_time(started: Instant) {
    let took = started.elapsed();
    assert!(took >= LIMIT.mul_f64(0.99), "{took:?}");
    assert!(took <= LIMIT + Duration::from_secs(15), "{took:?}");
}

#[tokio::test]
async fn slow_server_is_deadline_exceeded() {
    let server = EchoServer::start();
    let set_by_channel = static_channel([server.address()], |builder| builder.timeout(LIMIT));
    let set_by_call = static_channel([server.address()], |builder| builder);
    let shorter_by_call = static_channel([server.address()], |builder| builder.timeout(60 * LIMIT));
    for (channel, own) in [
        (set_by_channel, None),
        (set_by_call, Some(LIMIT)),
        (shorter_by_call, Some(LIMIT)),
    ] {
        wait_until_ready(&channel, 1).await;
        let mut request = Request::new(EchoRequest {
            delay_ms: 60_000,
            ..hello()
        });
        if let Some(own) = own {
            request.set_timeout(own);
        }
        let started = Instant::now();
        let call = EchoClient::new(channel.clone()).unary(request).await;
        let error = call.unwrap_err();
        assert_on_time(started);
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        assert_eq!(in_flight(&channel), 0);
    }
}

#[tokio::test]
async fn server_reset_at_the_deadline_is_deadline_exceeded() {
    // The server behaves as if its clock were 2 ms ahead.
    let server = RawServer::start(|request, mut respond| async move {
        let limit = request.headers()["grpc-timeout"].to_str().unwrap();
        let limit = Duration::from_nanos(limit.trim_end_matches('n').parse().unwrap());
        let over = tokio::time::Instant::now() + limit - Duration::from_millis(2);
        if request.headers().contains_key("x-head") {
            let head = http::Response::builder().header("content-type", "application/grpc");
            let head = head.body(()).unwrap();
            let mut body = respond.send_response(head, false).unwrap();
            tokio::time::sleep_until(over).await;
            body.send_reset(h2::Reason::CANCEL);
        } else {
            tokio::time::sleep_until(over).await;
            respond.send_reset(h2::Reason::CANCEL);
        }
    })
    .await;
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel);
    for with_head in [false, true] {
        // Repeated, because it is random which side notices the deadline first.
        for _ in 0..30 {
            let mut request = Request::new(hello());
            request.set_timeout(Duration::from_millis(50));
            if with_head {
                request
                    .metadata_mut()
                    .insert("x-head", "yes".parse().unwrap());
            }
            let error = client.unary(request).await.unwrap_err();
            assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        }
    }
}

#[tokio::test]
async fn server_gets_the_remaining_timeout() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| builder);
    let limit = PATIENCE;
    let waiting = tokio::spawn({
        let mut client = EchoClient::new(channel.clone());
        async move {
            let mut request = Request::new(hello());
            request.set_timeout(limit);
            let mut call = std::pin::pin!(client.unary(request));
            assert!(futures::poll!(call.as_mut()).is_pending());
            // The deadline is set by the first poll.
            let started = Instant::now();
            (started, call.await)
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let server_found = Instant::now();
    sets.send([instance(server.address())]);
    let (started, reply) = waiting.await.unwrap();
    let reply = reply.unwrap();
    let timeout = reply.metadata().get("seen-grpc-timeout").unwrap();
    let timeout = timeout.to_str().unwrap();
    let (amount, unit) = timeout.split_at(timeout.len() - 1);
    assert_eq!(unit, "u", "{timeout}");
    let timeout = Duration::from_micros(amount.parse().unwrap());
    // The request cannot be sent before the channel has a server.
    assert!(timeout <= limit - (server_found - started), "{timeout:?}");
    assert!(timeout > Duration::ZERO);
}

#[tokio::test]
async fn deadline_covers_wait_and_stream() {
    let server = EchoServer::start();
    let (sets, channel) = dynamic_channel([], |builder| builder);
    // The call waits for most of its time. A deadline that began with the stream would end it after
    // 7 s.
    let limit = Duration::from_secs(4);
    let started = Instant::now();
    let waiting = tokio::spawn({
        let mut client = EchoClient::new(channel.clone());
        async move {
            let mut request = Request::new(EchoRequest {
                count: 1_000_000,
                delay_ms: 50,
                ..hello()
            });
            request.set_timeout(limit);
            let mut stream = client.server_stream(request).await.unwrap().into_inner();
            let mut replies = 0;
            loop {
                match stream.message().await {
                    Ok(Some(_)) => replies += 1,
                    Ok(None) => panic!("the stream ended"),
                    Err(error) => return (error, replies),
                }
            }
        }
    });
    tokio::time::sleep(limit * 3 / 4).await;
    sets.send([instance(server.address())]);
    let ended = tokio::time::timeout(PATIENCE, waiting).await;
    let (error, replies) = ended.unwrap().unwrap();
    let took = started.elapsed();
    assert!(took >= limit.mul_f64(0.99), "{took:?}");
    assert!(took < limit * 7 / 4, "{took:?}");
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert!(replies > 0);
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn deadline_ends_a_stream_with_buffered_messages() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut request = Request::new(EchoRequest {
        count: u32::MAX,
        payload: vec![7; 100],
        ..EchoRequest::default()
    });
    request.set_timeout(LIMIT);
    let started = Instant::now();
    let mut client = EchoClient::new(channel.clone());
    let mut stream = client.server_stream(request).await.unwrap().into_inner();
    let error = loop {
        match stream.message().await {
            // Slower than the server, so that a reply is always buffered.
            Ok(Some(_)) => tokio::time::sleep(Duration::from_millis(2)).await,
            Ok(None) => panic!("the stream ended"),
            Err(error) => break error,
        }
        assert!(started.elapsed() < PATIENCE, "the deadline is ignored");
    };
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
}

#[tokio::test]
async fn deadline_ends_a_stalled_request_stream() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut request = Request::new(futures::stream::pending());
    request.set_timeout(LIMIT);
    let started = Instant::now();
    let call = EchoClient::new(channel.clone())
        .client_stream(request)
        .await;
    let error = call.unwrap_err();
    assert_on_time(started);
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn late_refusal_moves_to_another_endpoint() {
    let ready_timeout = Duration::from_millis(300);
    let refusing = RawServer::start(move |_, mut respond| async move {
        tokio::time::sleep(3 * ready_timeout).await;
        respond.send_reset(h2::Reason::REFUSED_STREAM);
    })
    .await;
    let healthy = EchoServer::start();
    let channel = static_channel([refusing.address(), healthy.address()], |builder| {
        builder
            .ready_timeout(ready_timeout)
            .policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, 2).await;
    for _ in 0..4 {
        assert_eq!(call(&channel).await.unwrap(), healthy.address());
    }
}

#[tokio::test]
async fn two_late_refusals_move_to_a_third_endpoint() {
    // Both refusals together take less than the default `ready_timeout`, which their time counts
    // against.
    let start_refusing = || {
        RawServer::start(|_, mut respond| async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            respond.send_reset(h2::Reason::REFUSED_STREAM);
        })
    };
    let refusing = [start_refusing().await, start_refusing().await];
    let healthy = EchoServer::start();
    let addresses = [
        refusing[0].address(),
        refusing[1].address(),
        healthy.address(),
    ];
    let channel = static_channel(addresses, |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, 3).await;
    // Round robin starts each call at another server.
    for _ in 0..3 {
        assert_eq!(call(&channel).await.unwrap(), healthy.address());
    }
}

#[tokio::test]
async fn constant_refusal_fails_after_ready_timeout() {
    let received = std::sync::Arc::<std::sync::atomic::AtomicUsize>::default();
    let counter = std::sync::Arc::clone(&received);
    let refusing = RawServer::start(move |_, mut respond| {
        counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        async move { respond.send_reset(h2::Reason::REFUSED_STREAM) }
    })
    .await;
    let channel = static_channel([refusing.address()], |builder| {
        builder.ready_timeout(Duration::from_millis(500))
    });
    wait_until_ready(&channel, 1).await;
    let error = tokio::time::timeout(PATIENCE, call(&channel)).await;
    let error = error.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(refusing.address()), "{error:?}");
    assert!(error.message().contains("refused"), "{error:?}");
    // The channel tries again, but not in a tight loop.
    let received = received.load(std::sync::atomic::Ordering::SeqCst);
    assert!((2..=100).contains(&received), "{received}");
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn retry_waits_for_the_restart_of_the_only_server() {
    let server = EchoServer::start_with(Options {
        delay: PATIENCE,
        ..Options::default()
    });
    let address = server.address().to_owned();
    let ready_timeout = Duration::from_secs(5);
    let channel = static_channel([address.as_str()], |builder| {
        builder
            .ready_timeout(ready_timeout)
            .retry(RetryPolicy::new(2))
    });
    wait_until_ready(&channel, 1).await;
    let calling = tokio::spawn({
        let channel = channel.clone();
        async move { call(&channel).await }
    });
    // The server fails later than `ready_timeout` after the start of the call.
    tokio::time::sleep(ready_timeout + Duration::from_millis(100)).await;
    drop(server);
    wait_until("the connection is lost", async || {
        !is_ready(&channel, &address)
    })
    .await;
    let _server = EchoServer::start_at(&address);
    assert_eq!(calling.await.unwrap().unwrap(), address);
}

#[tokio::test]
async fn retry_policy_resends_only_chosen_statuses() {
    let failing = RawServer::start(|_, mut respond| async move {
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "14")
            .header("grpc-message", "overloaded")
            .body(())
            .unwrap();
        respond.send_response(head, true).ok();
    })
    .await;
    let healthy = RawServer::start(|_, respond| async { respond_ok(respond) }).await;
    let addresses = [failing.address(), healthy.address()];
    let with = |policy: Option<RetryPolicy>| {
        static_channel(addresses, |builder| {
            let builder = builder.policy(BalancePolicy::RoundRobin);
            match policy {
                Some(policy) => builder.retry(policy),
                None => builder,
            }
        })
    };
    let retried = with(Some(RetryPolicy::new(2)));
    wait_until_ready(&retried, 2).await;
    for _ in 0..10 {
        call(&retried).await.unwrap();
    }
    let not_chosen = with(Some(RetryPolicy::new(2).on([Code::Aborted])));
    for channel in [with(None), not_chosen] {
        wait_until_ready(&channel, 2).await;
        let mut failed = 0;
        for _ in 0..10 {
            if let Err(error) = call(&channel).await {
                assert_eq!(error.message(), "overloaded");
                failed += 1;
            }
        }
        assert_eq!(failed, 5);
    }
}

#[tokio::test]
async fn concurrency_limit_makes_calls_wait() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| {
        builder
            .concurrency_limit(2)
            .ready_timeout(Duration::from_millis(300))
    });
    wait_until_ready(&channel, 1).await;
    let endless = EchoRequest {
        count: u32::MAX,
        delay_ms: 10,
        ..hello()
    };
    let mut client = EchoClient::new(channel.clone());
    // A stream counts until its end.
    let first = client.server_stream(endless.clone()).await.unwrap();
    let _second = client.server_stream(endless).await.unwrap();
    let error = call(&channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("concurrency limit"), "{error:?}");
    assert_eq!(server.counts().calls(), 2);

    drop(first);
    for _ in 0..10 {
        call(&channel).await.unwrap();
    }
}

#[tokio::test]
async fn invalid_settings_are_named() {
    let build = |change: fn(
        goo_etcd::balance::BalancedChannelBuilder,
    ) -> goo_etcd::balance::BalancedChannelBuilder| {
        let source = Source::fixed([instance("127.0.0.1:1")]);
        change(BalancedChannel::builder(source)).build()
    };
    for (result, field) in [
        (
            build(|b| b.connections_per_endpoint(usize::MAX)),
            "connections_per_endpoint",
        ),
        (
            build(|b| b.connections_per_endpoint(0)),
            "connections_per_endpoint",
        ),
        (build(|b| b.concurrency_limit(0)), "concurrency_limit"),
        (
            build(|b| b.connect_timeout(Duration::ZERO)),
            "connect_timeout",
        ),
        (
            build(|b| b.max_connect_backoff(Duration::ZERO)),
            "max_connect_backoff",
        ),
        (
            build(|b| b.keep_alive_timeout(Duration::ZERO)),
            "keep_alive_timeout",
        ),
        (build(|b| b.user_agent("line\nbreak")), "user_agent"),
        (build(|b| b.origin("/path".parse().unwrap())), "origin"),
        (build(|b| b.origin("ftp://host".parse().unwrap())), "origin"),
        (BalancedChannel::from_endpoints(["nonsense"]), "nonsense"),
    ] {
        let error = result.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(field), "{field} in {error}");
    }
}
