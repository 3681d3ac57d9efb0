//! Which calls are sent again, and cancelled calls.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::balanced::{
    call, dynamic_channel, hello, in_flight, instance, static_channel, wait_until_ready,
};
use crate::support::echo::EchoServer;
use crate::support::raw::RawServer;
use crate::support::{PATIENCE, wait_until};
use futures::{FutureExt, StreamExt, stream};
use goo_etcd::balance::{BalancePolicy, RetryPolicy};
use h2::Reason;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tonic::Code;

fn of_size(size: usize) -> EchoRequest {
    EchoRequest {
        payload: vec![0xa5; size],
        ..EchoRequest::default()
    }
}

/// A server that reads this many bytes of a request and then refuses the stream.
async fn refuse_after(bytes: usize) -> RawServer {
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
async fn refused_stream_is_resent_from_the_replay_buffer() {
    let refusing = refuse_after(60_000).await;
    let healthy = EchoServer::start();
    let channel = static_channel([refusing.address(), healthy.address()], |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, 2).await;
    let mut client = EchoClient::new(channel.clone());
    for _ in 0..4 {
        // The stream is refused after four messages, which fit into the replay buffer. The other
        // messages exceed it, but are sent only once.
        let requests = stream::iter(0..10).then(|index| async move {
            tokio::time::sleep(Duration::from_millis(if index == 4 { 100 } else { 1 })).await;
            of_size(if index < 4 { 15_300 } else { 100_000 })
        });
        let reply = client.client_stream(requests).await.unwrap().into_inner();
        assert_eq!(reply.server, healthy.address());
        assert_eq!(reply.index, 4 * 15_300 + 6 * 100_000);
    }
    assert_eq!(healthy.counts().calls(), 4);
    assert_eq!(in_flight(&channel), 0);
}

#[tokio::test]
async fn refused_stream_beyond_the_replay_buffer_fails() {
    let refusing = refuse_after(200_000).await;
    let healthy = EchoServer::start();
    let channel = static_channel([refusing.address(), healthy.address()], |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, 2).await;
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
                assert!(status.message().contains(refusing.address()), "{status:?}");
                refused += 1;
            }
        }
    }
    assert_eq!(refused, 2);
    assert_eq!(healthy.counts().calls(), 2, "a request was sent twice");
}

#[tokio::test]
async fn call_that_a_server_may_have_seen_is_not_resent() {
    let seen = Arc::<AtomicUsize>::default();
    let counter = Arc::clone(&seen);
    let fails = RawServer::start(move |_, mut respond| {
        counter.fetch_add(1, Ordering::SeqCst);
        async move { respond.send_reset(Reason::INTERNAL_ERROR) }
    })
    .await;
    let healthy = EchoServer::start();
    let channel = static_channel([fails.address(), healthy.address()], |builder| {
        builder.policy(BalancePolicy::RoundRobin)
    });
    wait_until_ready(&channel, 2).await;
    let mut failed = 0;
    for _ in 0..20 {
        if let Err(status) = call(&channel).await {
            assert_eq!(status.code(), Code::Internal);
            failed += 1;
        }
    }
    assert_eq!(seen.load(Ordering::SeqCst), failed);
    assert_eq!(healthy.counts().calls() as usize, 20 - failed);
    assert_eq!(failed, 10);
}

/// Polls a call up to `polls` times and then drops it.
async fn poll_and_drop<F: Future>(call: F, polls: usize) {
    let mut call = pin!(call);
    for _ in 0..polls {
        if futures::poll!(call.as_mut()).is_ready() {
            return;
        }
        tokio::task::yield_now().await;
    }
}

/// Makes a call of a random kind and drops it at a random point.
async fn call_and_cancel(mut client: EchoClient<goo_etcd::BalancedChannel>) {
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
            // The request stream never ends.
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
async fn cancelled_calls_leave_no_streams_tasks_or_permits() {
    const TASKS: usize = 40;
    const LIMIT: usize = 20;
    let servers = [EchoServer::start(), EchoServer::start()];
    let addresses = servers.each_ref().map(EchoServer::address);
    let (sets, channel) = dynamic_channel(addresses, |builder| {
        // Fewer permits than tasks, so that some calls are dropped while they wait for a permit.
        builder
            .concurrency_limit(LIMIT)
            .retry(RetryPolicy::new(3).backoff(Duration::from_micros(100), PATIENCE))
    });
    wait_until_ready(&channel, 2).await;
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
                call_and_cancel(client.clone()).await;
            }
        });
    }
    // From time to time the set is empty, so that some calls are dropped while they wait for an
    // endpoint.
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
    wait_until_ready(&channel, 2).await;

    wait_until("nothing is in flight", async || in_flight(&channel) == 0).await;
    for server in &servers {
        wait_until("no call is active on the server", async || {
            server.counts().active() == 0
        })
        .await;
        wait_until("one connection is left", async || {
            server.counts().connections() == 1
        })
        .await;
    }
    wait_until("no task is left", async || alive() <= before).await;
    // All permits are free again.
    let mut client = EchoClient::new(channel.clone());
    let mut open = Vec::new();
    for _ in 0..LIMIT {
        open.push(client.bidi(stream::pending()).await.unwrap());
    }
    assert_eq!(in_flight(&channel), LIMIT);
    drop(open);
    wait_until("nothing is in flight", async || in_flight(&channel) == 0).await;
}
