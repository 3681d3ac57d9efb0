//! Calls without an endpoint, and calls with a deadline: how long they take, and what they say.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::{Duration, Instant};

use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, RetryPolicy, Source};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use support::balanced::{
    Sets, call, call_within, changing, fixed, hello, in_flight, instance, is_ready, refusing,
    until_ready,
};
use support::echo::{EchoServer, Options};
use support::raw::{RawServer, answer};
use support::{PATIENCE, eventually};
use tonic::{Code, Request};

#[tokio::test]
async fn given_an_empty_set_when_a_call_has_300_ms_then_it_says_so_within_600_ms() {
    let (_sets, channel) = changing([], |builder| builder);
    let begun = Instant::now();
    let error = call_within(&channel, Duration::from_millis(300))
        .await
        .unwrap_err();
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(300), "{took:?}");
    assert!(took <= Duration::from_millis(600), "{took:?}");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    let said = "no instances under services/echo/";
    assert!(error.message().contains(said), "{error:?}");
}

#[tokio::test]
async fn given_no_set_yet_when_a_call_has_no_time_out_then_it_is_unavailable_in_ready_timeout() {
    let (_sets, source) = Sets::new();
    let channel = BalancedChannel::builder(source)
        .ready_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let begun = Instant::now();
    let error = call(&channel).await.unwrap_err();
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!(error.code(), Code::Unavailable);
    let said = "no instances under services/echo/ (waited 300ms)";
    assert_eq!(error.message(), said);
}

#[tokio::test]
async fn given_an_empty_set_when_both_times_are_over_then_it_is_the_deadline_that_was_exceeded() {
    let both = Duration::from_millis(100);
    let (_sets, channel) = changing([], |builder| builder.ready_timeout(both));
    for _ in 0..10 {
        let error = call_within(&channel, both).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    }
}

#[tokio::test]
async fn given_all_refuse_when_called_then_unavailable_in_ready_timeout_with_each_ones_error() {
    let addresses = [refusing(), refusing(), refusing()];
    let channel = fixed(addresses.iter().map(String::as_str), |builder| {
        builder.ready_timeout(Duration::from_secs(1))
    });
    let begun = Instant::now();
    let error = call(&channel).await.unwrap_err();
    let took = begun.elapsed();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(took >= Duration::from_secs(1), "{took:?}");
    assert!(took <= Duration::from_secs(2), "{took:?}");
    let message = error.message();
    assert!(message.contains("none of 3 instances under"), "{message}");
    for address in &addresses {
        assert!(message.contains(address), "{address} in {message}");
    }
    let refused = message.matches("Connection refused").count();
    assert_eq!(refused, 3, "{message}");
}

#[tokio::test]
async fn given_no_wait_for_ready_when_none_is_ready_then_a_call_fails_at_once() {
    let address = refusing();
    let (sets, channel) = changing([], |builder| {
        builder.wait_for_ready(false).ready_timeout(10 * PATIENCE)
    });
    let error = tokio::time::timeout(PATIENCE, call(&channel)).await;
    let error = error.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert_eq!(error.message(), "no instances under services/echo/");

    sets.send([instance(&address)]);
    eventually("the set is applied", async || {
        channel.endpoints().len() == 1
    })
    .await;
    let error = tokio::time::timeout(PATIENCE, call(&channel)).await;
    let error = error.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(&address), "{error:?}");
}

#[tokio::test]
async fn given_only_instances_that_take_no_calls_when_called_then_the_error_says_what_they_are() {
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| {
        builder.ready_timeout(Duration::from_millis(200))
    });
    sets.send([
        instance(server.address()).draining(true),
        instance("no address").id("broken"),
    ]);
    eventually("the set is applied", async || {
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
async fn given_an_instance_that_speaks_tls_when_the_channel_does_not_then_it_is_never_called() {
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| {
        builder.ready_timeout(Duration::from_millis(200))
    });
    sets.send([instance(server.address()).tls(true)]);
    eventually("the error says so", async || {
        let error = call(&channel).await.unwrap_err();
        error
            .message()
            .contains("speaks TLS and the channel does not")
    })
    .await;
    assert_eq!(server.counts().connections(), 0);
}

#[tokio::test]
async fn given_a_call_that_waits_when_an_endpoint_comes_then_it_is_called() {
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| builder.ready_timeout(PATIENCE));
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

/// For a call whose deadline must end it, on whatever machine.
const LIMIT: Duration = Duration::from_secs(1);

/// Asserts that a call took its time and not much more.
fn assert_on_time(begun: Instant) {
    let took = begun.elapsed();
    assert!(took >= LIMIT.mul_f64(0.99), "{took:?}");
    assert!(took <= LIMIT + Duration::from_secs(1), "{took:?}");
}

#[tokio::test]
async fn given_a_slow_server_when_the_time_is_over_then_deadline_exceeded() {
    let server = EchoServer::start();
    let set_by_channel = fixed([server.address()], |builder| builder.timeout(LIMIT));
    let set_by_call = fixed([server.address()], |builder| builder);
    let shorter_by_call = fixed([server.address()], |builder| builder.timeout(60 * LIMIT));
    for (channel, own) in [
        (set_by_channel, None),
        (set_by_call, Some(LIMIT)),
        (shorter_by_call, Some(LIMIT)),
    ] {
        until_ready(&channel, 1).await;
        let mut request = Request::new(EchoRequest {
            delay_ms: 60_000,
            ..hello()
        });
        if let Some(own) = own {
            request.set_timeout(own);
        }
        let begun = Instant::now();
        let call = EchoClient::new(channel.clone()).unary(request).await;
        let error = call.unwrap_err();
        assert_on_time(begun);
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
        assert_eq!(in_flight(&channel), 0);
    }
}

#[tokio::test]
async fn given_a_server_that_resets_a_stream_whose_time_is_over_when_called_then_deadline_exceeded()
{
    // As one does whose clock is ahead by a little.
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
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel);
    for with_head in [false, true] {
        // Again and again: which of the two notices first is chance.
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
async fn given_a_call_that_waited_when_it_is_sent_then_the_server_is_told_what_is_left() {
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| builder);
    let limit = PATIENCE;
    let waiting = tokio::spawn({
        let mut client = EchoClient::new(channel.clone());
        async move {
            let mut request = Request::new(hello());
            request.set_timeout(limit);
            let mut call = std::pin::pin!(client.unary(request));
            assert!(futures::poll!(call.as_mut()).is_pending());
            // Its time runs by now.
            let begun = Instant::now();
            (begun, call.await)
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let found = Instant::now();
    sets.send([instance(server.address())]);
    let (begun, reply) = waiting.await.unwrap();
    let reply = reply.unwrap();
    let told = reply.metadata().get("seen-grpc-timeout").unwrap();
    let told = told.to_str().unwrap();
    let (amount, unit) = told.split_at(told.len() - 1);
    assert_eq!(unit, "u", "{told}");
    let told = Duration::from_micros(amount.parse().unwrap());
    // Nothing could be sent before there was a server.
    assert!(told <= limit - (found - begun), "{told:?}");
    assert!(told > Duration::ZERO);
}

#[tokio::test]
async fn given_a_deadline_when_the_wait_and_the_stream_take_longer_together_then_it_ends_both() {
    let server = EchoServer::start();
    let (sets, channel) = changing([], |builder| builder);
    let begun = Instant::now();
    let waiting = tokio::spawn({
        let mut client = EchoClient::new(channel.clone());
        async move {
            let mut request = Request::new(EchoRequest {
                count: 1_000_000,
                delay_ms: 50,
                ..hello()
            });
            request.set_timeout(LIMIT);
            let mut stream = client.server_stream(request).await.unwrap().into_inner();
            let mut answers = 0;
            loop {
                match stream.message().await {
                    Ok(Some(_)) => answers += 1,
                    Ok(None) => panic!("it cannot have ended"),
                    Err(error) => return (error, answers),
                }
            }
        }
    });
    tokio::time::sleep(LIMIT / 2).await;
    sets.send([instance(server.address())]);
    let ended = tokio::time::timeout(PATIENCE, waiting).await;
    let (error, answers) = ended.unwrap().unwrap();
    assert_on_time(begun);
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert!(answers > 0);
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn given_a_stream_that_always_has_more_when_the_time_is_over_then_it_ends() {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    let mut request = Request::new(EchoRequest {
        count: u32::MAX,
        payload: vec![7; 100],
        ..EchoRequest::default()
    });
    request.set_timeout(LIMIT);
    let begun = Instant::now();
    let mut client = EchoClient::new(channel.clone());
    let mut stream = client.server_stream(request).await.unwrap().into_inner();
    let error = loop {
        match stream.message().await {
            // Slower than the server, so that there is always an answer at hand.
            Ok(Some(_)) => tokio::time::sleep(Duration::from_millis(2)).await,
            Ok(None) => panic!("it cannot have ended"),
            Err(error) => break error,
        }
        assert!(begun.elapsed() < PATIENCE, "the deadline is ignored");
    };
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
}

#[tokio::test]
async fn given_a_request_stream_that_stalls_when_the_time_is_over_then_deadline_exceeded() {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| builder);
    until_ready(&channel, 1).await;
    let mut request = Request::new(futures::stream::pending());
    request.set_timeout(LIMIT);
    let begun = Instant::now();
    let call = EchoClient::new(channel.clone())
        .client_stream(request)
        .await;
    let error = call.unwrap_err();
    assert_on_time(begun);
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn given_a_server_that_refuses_a_stream_late_when_another_is_ready_then_it_is_called() {
    let ready_timeout = Duration::from_millis(300);
    let refuses = RawServer::start(move |_, mut respond| async move {
        tokio::time::sleep(3 * ready_timeout).await;
        respond.send_reset(h2::Reason::REFUSED_STREAM);
    })
    .await;
    let answers = EchoServer::start();
    let channel = fixed([refuses.address(), answers.address()], |builder| {
        builder
            .ready_timeout(ready_timeout)
            .policy(BalancePolicy::RoundRobin)
    });
    until_ready(&channel, 2).await;
    for _ in 0..4 {
        assert_eq!(call(&channel).await.unwrap(), answers.address());
    }
}

#[tokio::test]
async fn given_two_servers_that_refuse_a_stream_late_when_a_third_is_ready_then_it_is_called() {
    let ready_timeout = Duration::from_millis(300);
    let refuses = || {
        RawServer::start(move |_, mut respond| async move {
            tokio::time::sleep(3 * ready_timeout).await;
            respond.send_reset(h2::Reason::REFUSED_STREAM);
        })
    };
    let refuse = [refuses().await, refuses().await];
    let answers = EchoServer::start();
    let addresses = [refuse[0].address(), refuse[1].address(), answers.address()];
    let channel = fixed(addresses, |builder| {
        builder
            .ready_timeout(ready_timeout)
            .policy(BalancePolicy::RoundRobin)
    });
    until_ready(&channel, 3).await;
    // One begins with each.
    for _ in 0..3 {
        assert_eq!(call(&channel).await.unwrap(), answers.address());
    }
}

#[tokio::test]
async fn given_servers_that_refuse_every_stream_when_called_then_it_fails_in_ready_timeout() {
    let asked = std::sync::Arc::<std::sync::atomic::AtomicUsize>::default();
    let counter = std::sync::Arc::clone(&asked);
    let refuses = RawServer::start(move |_, mut respond| {
        counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        async move { respond.send_reset(h2::Reason::REFUSED_STREAM) }
    })
    .await;
    let channel = fixed([refuses.address()], |builder| {
        builder.ready_timeout(Duration::from_millis(500))
    });
    until_ready(&channel, 1).await;
    let error = tokio::time::timeout(PATIENCE, call(&channel)).await;
    let error = error.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains(refuses.address()), "{error:?}");
    assert!(error.message().contains("refused"), "{error:?}");
    // Not in a tight loop.
    let asked = asked.load(std::sync::atomic::Ordering::SeqCst);
    assert!((2..=100).contains(&asked), "{asked}");
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn given_a_policy_when_the_only_server_fails_after_long_and_restarts_then_the_retry_waits() {
    let server = EchoServer::with(Options {
        delay: PATIENCE,
        ..Options::default()
    });
    let address = server.address().to_owned();
    let ready_timeout = Duration::from_secs(5);
    let channel = fixed([address.as_str()], |builder| {
        builder
            .ready_timeout(ready_timeout)
            .retry(RetryPolicy::new(2))
    });
    until_ready(&channel, 1).await;
    let calling = tokio::spawn({
        let channel = channel.clone();
        async move { call(&channel).await }
    });
    // Longer than a call waits for an endpoint.
    tokio::time::sleep(ready_timeout + Duration::from_millis(100)).await;
    drop(server);
    eventually("it is lost", async || !is_ready(&channel, &address)).await;
    let _server = EchoServer::start_at(&address);
    assert_eq!(calling.await.unwrap().unwrap(), address);
}

#[tokio::test]
async fn given_a_retry_policy_when_the_status_is_chosen_then_the_call_goes_to_another() {
    let fails = RawServer::start(|_, mut respond| async move {
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "14")
            .header("grpc-message", "overloaded")
            .body(())
            .unwrap();
        respond.send_response(head, true).ok();
    })
    .await;
    let answers = RawServer::start(|_, respond| async { answer(respond) }).await;
    let addresses = [fails.address(), answers.address()];
    let with = |policy: Option<RetryPolicy>| {
        fixed(addresses, |builder| {
            let builder = builder.policy(BalancePolicy::RoundRobin);
            match policy {
                Some(policy) => builder.retry(policy),
                None => builder,
            }
        })
    };
    let retried = with(Some(RetryPolicy::new(2)));
    until_ready(&retried, 2).await;
    for _ in 0..10 {
        call(&retried).await.unwrap();
    }
    let not_chosen = with(Some(RetryPolicy::new(2).on([Code::Aborted])));
    for channel in [with(None), not_chosen] {
        until_ready(&channel, 2).await;
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
async fn given_a_concurrency_limit_when_it_is_reached_then_calls_wait_for_their_turn() {
    let server = EchoServer::start();
    let channel = fixed([server.address()], |builder| {
        builder
            .concurrency_limit(2)
            .ready_timeout(Duration::from_millis(300))
    });
    until_ready(&channel, 1).await;
    let endless = EchoRequest {
        count: u32::MAX,
        delay_ms: 10,
        ..hello()
    };
    let mut client = EchoClient::new(channel.clone());
    // Streams count until they end, not until they begin.
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
async fn given_what_cannot_be_a_channel_when_it_is_built_then_the_error_says_why() {
    let build = |change: fn(
        goo_etcd::balance::BalancedChannelBuilder,
    ) -> goo_etcd::balance::BalancedChannelBuilder| {
        let source = Source::fixed([instance("127.0.0.1:1")]);
        change(BalancedChannel::builder(source)).build()
    };
    for (result, said) in [
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
        assert!(error.contains(said), "{said} in {error}");
    }
}
