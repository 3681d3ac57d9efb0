//! What is sent again and what is not, and what is left of calls that were given up.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use h2::Reason;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use support::balanced::{call, changing, fixed, hello, in_flight, instance, until_ready};
use support::echo::EchoServer;
use support::raw::RawServer;
use support::{PATIENCE, eventually};
use tonic::Code;

fn of_size(size: usize) -> EchoRequest {
    EchoRequest {
        payload: vec![0xa5; size],
        ..EchoRequest::default()
    }
}

/// Reads so much of a request, and refuses it.
async fn refuses_after(bytes: usize) -> RawServer {
    RawServer::start(move |request, mut respond| async move {
        let mut body = request.into_body();
        let mut read = 0;
        while read < bytes {
            let Some(Ok(data)) = body.data().await else {
                return;
            };
            read += data.len();
            body.flow_control().release_capacity(data.len()).ok();
        }
        respond.send_reset(Reason::REFUSED_STREAM);
    })
    .await
}

#[tokio::test]
async fn given_a_refused_stream_when_64_kib_of_it_were_sent_then_another_gets_all_of_it() {
    let refuses = refuses_after(60_000).await;
    let answers = EchoServer::start();
    let channel = fixed([refuses.address(), answers.address()], |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    until_ready(&channel, 2).await;
    let mut client = EchoClient::new(channel.clone());
    for _ in 0..4 {
        // What follows after the refusal is not kept, and is sent once.
        let requests = stream::iter(0..10).then(|index| async move {
            tokio::time::sleep(Duration::from_millis(if index == 4 { 100 } else { 1 })).await;
            of_size(if index < 4 { 15_300 } else { 100_000 })
        });
        let reply = client.client_stream(requests).await.unwrap().into_inner();
        assert_eq!(reply.server, answers.address());
        assert_eq!(reply.index, 4 * 15_300 + 6 * 100_000);
    }
    assert_eq!(answers.counts().calls(), 4);
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn given_a_refused_stream_when_more_of_it_was_sent_than_is_kept_then_the_call_fails() {
    let refuses = refuses_after(200_000).await;
    let answers = EchoServer::start();
    let channel = fixed([refuses.address(), answers.address()], |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    until_ready(&channel, 2).await;
    let mut client = EchoClient::new(channel.clone());
    let mut refused = 0;
    for _ in 0..4 {
        let requests = stream::iter(0..30).then(|_| async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            of_size(10_000)
        });
        match client.client_stream(requests).await {
            Ok(reply) => assert_eq!(reply.into_inner().index, 300_000),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                assert!(status.message().contains(refuses.address()), "{status:?}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 2);
    assert_eq!(answers.counts().calls(), 2, "nothing was sent twice");
}

#[tokio::test]
async fn given_a_server_that_has_seen_a_call_when_it_fails_then_no_other_sees_it() {
    let seen = Arc::<AtomicUsize>::default();
    let counter = Arc::clone(&seen);
    let fails = RawServer::start(move |_, mut respond| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { respond.send_reset(Reason::INTERNAL_ERROR) }
    })
    .await;
    let answers = EchoServer::start();
    let channel = fixed([fails.address(), answers.address()], |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    until_ready(&channel, 2).await;
    let mut failed = 0;
    for _ in 0..20 {
        if let Err(status) = call(&channel).await {
            assert_eq!(status.code(), Code::Internal);
            failed += 1;
        }
    }
    assert_eq!(seen.load(Ordering::SeqCst), failed);
    assert_eq!(answers.counts().calls() as usize, 20 - failed);
    assert_eq!(failed, 10);
}

/// Polls a call so many times and then gives it up; it may end before.
async fn poll_and_drop<F: Future>(call: F, polls: usize) {
    let mut call = pin!(call);
    for _ in 0..polls {
        if futures::poll!(call.as_mut()).is_ready() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// A call of any kind, given up at any point.
async fn call_and_give_up(mut client: EchoClient<goo_etcd::BalancedChannel>) {
    let mut request = hello();
    request.delay_ms = fastrand::u32(..2);
    request.count = 3;
    if fastrand::u8(..4) == 0 {
        request.payload = vec![1; 100_000];
    }
    let kind = fastrand::u8(..5);
    let call = async move {
        match kind {
            0 => {
                client.unary(request).await.ok();
            }
            1 => {
                if let Ok(replies) = client.server_stream(request).await {
                    replies.into_inner().count().await;
                }
            }
            2 => {
                let requests = stream::iter(vec![request; 3]);
                client.client_stream(requests).await.ok();
            }
            // One that is never finished by itself.
            3 => {
                let requests = stream::iter([request]).chain(stream::pending());
                client.client_stream(requests).await.ok();
            }
            _ => {
                let requests = stream::iter(vec![request; 3]).then(|request| async {
                    tokio::task::yield_now().await;
                    request
                });
                if let Ok(replies) = client.bidi(requests).await {
                    replies.into_inner().count().await;
                }
            }
        }
    };
    if fastrand::bool() {
        poll_and_drop(call, fastrand::usize(..30)).await;
    } else {
        let limit = Duration::from_micros(fastrand::u64(..8_000));
        tokio::time::timeout(limit, call).await.ok();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_10_000_calls_given_up_at_any_point_then_nothing_is_left_of_them() {
    const TASKS: usize = 40;
    const LIMIT: usize = 20;
    let servers = [EchoServer::start(), EchoServer::start()];
    let addresses = servers.each_ref().map(EchoServer::address);
    let (sets, channel) = changing(addresses, |builder| {
        // Fewer turns than tasks: some are given up while they wait for theirs.
        builder
            .concurrency_limit(LIMIT)
            .retry(RetryPolicy::new(3).backoff(Duration::from_micros(100), PATIENCE))
    });
    until_ready(&channel, 2).await;
    let alive = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let before = alive();

    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let client = EchoClient::new(channel.clone());
        tasks.spawn(async move {
            for _ in 0..10_000 / TASKS {
                call_and_give_up(client.clone()).await;
            }
        });
    }
    // Now and then there is nobody to call, so that waiting for an endpoint is given up, too.
    let mut changes = 0;
    while !tasks.is_empty() {
        let set = match changes % 4 {
            0 => vec![],
            1 => vec![addresses[0]],
            2 => vec![addresses[1]],
            _ => addresses.to_vec(),
        };
        sets.send(set.into_iter().map(instance));
        changes += 1;
        let pause = Duration::from_millis(if changes % 4 == 1 { 5 } else { 50 });
        tokio::time::sleep(pause).await;
        while let Some(ended) = tasks.join_next().now_or_never().flatten() {
            ended.unwrap();
        }
    }
    sets.send(addresses.map(instance));
    until_ready(&channel, 2).await;

    eventually("nothing is in flight", async || in_flight(&channel) == 0).await;
    for server in &servers {
        eventually("no server is still at it", async || {
            server.counts().active() == 0
        })
        .await;
        eventually("one connection is left", async || {
            server.counts().connections() == 1
        })
        .await;
    }
    eventually("no task is left", async || alive() <= before).await;
    // Every turn was given back.
    let mut client = EchoClient::new(channel.clone());
    let mut open = Vec::new();
    for _ in 0..LIMIT {
        open.push(client.bidi(stream::pending()).await.unwrap());
    }
    assert_eq!(in_flight(&channel), LIMIT);
    drop(open);
    eventually("nothing is in flight", async || in_flight(&channel) == 0).await;
}
