//! Servers that announce the end of a connection with GOAWAY.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use hyper_util::rt::TokioIo;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{
    ANY_STREAM, READY_TIMEOUT, assert_calls_succeed, channel, recycling_server, serve_up_to,
};
use crate::support::balanced::{Load, call, is_ready, static_channel, wait_until_ready};
use crate::support::frames::{
    ACK, DATA, FrameConnection, FrameServer, GOAWAY, HEADERS, INITIAL_WINDOW_SIZE, NO_ERROR, PING,
    WINDOW_UPDATE, frame, go_away_frame,
};
use crate::support::{wait_for, wait_until};

/// nginx `keepalive_requests`, AWS ALB, Envoy (grpc-java#8310, grpc-java#11728, grpc-go#2205).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_each_request_fails_no_call() {
    let server = recycling_server(1).await;
    let channel = channel([&server]);
    assert_calls_succeed(&channel, 300).await;
    assert!(server.accepted() >= 300, "{}", server.accepted());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_100_requests_fails_no_call() {
    let server = recycling_server(100).await;
    let channel = channel([&server]);
    assert_calls_succeed(&channel, 3_000).await;
    assert!(server.accepted() >= 30, "{}", server.accepted());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_endpoints_fails_no_call() {
    let (first, second) = (recycling_server(1).await, recycling_server(10).await);
    let channel = channel([&first, &second]);
    assert_calls_succeed(&channel, 1_000).await;
    assert!(first.accepted() >= 20, "{}", first.accepted());
    assert!(second.accepted() >= 20, "{}", second.accepted());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_connections_fails_no_call() {
    let server = recycling_server(10).await;
    let channel = static_channel([server.address()], |channel| {
        channel
            .connections_per_endpoint(2)
            .ready_timeout(READY_TIMEOUT)
    });
    assert_calls_succeed(&channel, 1_000).await;
    assert!(server.accepted() >= 100, "{}", server.accepted());
}

#[tokio::test]
async fn above_its_last_stream_the_call_goes_to_the_next_connection() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let stream = connection.next_request().await?;
        if connection.index < 5 {
            connection.send_go_away(0, NO_ERROR, "").await?;
            return connection.close().await;
        }
        connection.respond_ok(stream).await?;
        connection.next_request().await.map(drop)
    })
    .await;
    let channel = channel([&server]);
    call(&channel).await.unwrap();
    assert_eq!(server.accepted(), 6);
}

/// A maximum age that is shorter than the calls, with a grace period.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_each_response_fails_no_call() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let mut streams = vec![connection.next_request().await?];
        let mut announcement = go_away_frame(ANY_STREAM, NO_ERROR, "max_age");
        announcement.extend(frame(PING, 0, 0, &[7; 8]));
        connection.write_bytes(&announcement).await?;
        loop {
            let frame = connection.next().await?;
            if frame.is_end_stream() {
                streams.push(frame.stream);
            } else if frame.kind == PING && frame.flags & ACK != 0 {
                break;
            }
        }
        let last = streams.iter().copied().max().unwrap_or(0);
        connection.send_go_away(last, NO_ERROR, "max_age").await?;
        sleep(Duration::from_millis(100)).await;
        for stream in streams {
            connection.respond_ok(stream).await?;
        }
        serve_up_to(&mut connection, last).await
    })
    .await;
    let channel = channel([&server]);
    assert_calls_succeed(&channel, 300).await;
}

#[tokio::test]
async fn starts_the_replacement_while_old_streams_finish() {
    let replaced = Arc::new(Notify::new());
    let server = FrameServer::start({
        let replaced = Arc::clone(&replaced);
        move |mut connection| {
            let replaced = Arc::clone(&replaced);
            async move {
                connection.handshake(&[]).await?;
                if connection.index == 0 {
                    let stream = connection.next_request().await?;
                    connection.send_go_away(stream, NO_ERROR, "").await?;
                    replaced.notified().await;
                    connection.respond_ok(stream).await?;
                    return connection.close().await;
                }
                loop {
                    let stream = connection.next_request().await?;
                    connection.respond_ok(stream).await?;
                }
            }
        }
    })
    .await;
    let channel = channel([&server]);
    let old = tokio::spawn({
        let channel = channel.clone();
        async move { call(&channel).await }
    });
    wait_until("the replacement is ready", async || {
        server.accepted() == 2 && is_ready(&channel, server.address())
    })
    .await;
    call(&channel).await.unwrap();
    assert!(!old.is_finished());
    replaced.notify_one();
    old.await.unwrap().unwrap();
}

/// grpc-java's Netty server ends the whole connection when DATA of a stream arrives that its
/// second GOAWAY excludes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stream_is_opened_after_the_response_to_its_ping() {
    let late = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&late);
    let server =
        FrameServer::start(move |connection| drain_with_ping(connection, Arc::clone(&count))).await;
    let channel = channel([&server]);
    let load = Load::start(&channel, 64);
    load.wait_for_calls(5_000).await;
    load.finish().await.assert_no_failure();
    assert!(server.accepted() >= 50, "{}", server.accepted());
    assert_eq!(late.load(Ordering::SeqCst), 0);
}

/// Serves 50 requests, then sends GOAWAY and PING, and counts the streams that are opened after
/// the response to the PING.
async fn drain_with_ping(
    mut connection: FrameConnection,
    late: Arc<AtomicUsize>,
) -> io::Result<()> {
    connection.handshake(&[]).await?;
    for _ in 0..50 {
        let stream = connection.next_request().await?;
        connection.respond_ok(stream).await?;
    }
    let mut announcement = go_away_frame(ANY_STREAM, NO_ERROR, "max_age");
    announcement.extend(frame(PING, 0, 0, &[7; 8]));
    connection.write_bytes(&announcement).await?;
    let (mut last, mut answered) = (0, false);
    loop {
        let frame = connection.next().await?;
        match frame.kind {
            PING if frame.flags & ACK != 0 => {
                answered = true;
                connection.send_go_away(ANY_STREAM, NO_ERROR, "").await?;
            }
            HEADERS => {
                last = last.max(frame.stream);
                late.fetch_add(usize::from(answered), Ordering::SeqCst);
            }
            GOAWAY => return Ok(()),
            _ => {}
        }
        if frame.is_end_stream() {
            connection.respond_ok(frame.stream).await?;
        }
    }
}

/// As above while a large request fills the connection: the requests that wait behind it are
/// written first as well. Over a pipe in paused time, so that the order does not depend on how busy
/// the machine is.
#[tokio::test(start_paused = true)]
async fn ping_is_answered_after_requests_that_wait_for_room() {
    let order = Arc::<Mutex<String>>::default();
    let (seen, accepted) = (Arc::clone(&order), Arc::<AtomicUsize>::default());
    let connector = tower::service_fn(move |_: http::Uri| {
        let (client, io) = tokio::io::duplex(64 * 1024);
        let connection = FrameConnection::new(io, accepted.fetch_add(1, Ordering::SeqCst));
        tokio::spawn(drain_while_full(connection, Arc::clone(&seen)));
        async { Ok::<_, io::Error>(TokioIo::new(client)) }
    });
    let channel = static_channel(["pipe:1"], |channel| channel.connector(connector));
    wait_until_ready(&channel, 1).await;
    let mut calls = JoinSet::new();
    let mut client = EchoClient::new(channel.clone()).max_encoding_message_size(usize::MAX);
    let large = EchoRequest {
        payload: vec![7; 1 << 20],
        ..EchoRequest::default()
    };
    calls.spawn(async move { client.unary(large).await.map(|_| ()) });
    sleep(Duration::from_millis(100)).await;
    for _ in 0..10 {
        let channel = channel.clone();
        calls.spawn(async move { call(&channel).await.map(|_| ()) });
    }
    while let Some(ended) = wait_for("the calls end", calls.join_next()).await {
        ended.unwrap().unwrap();
    }
    let order = order.lock().unwrap().clone();
    assert_eq!(order, "hhhhhhhhhhp");
}

/// Reads nothing for a while after the first DATA, then sends GOAWAY and PING, and records the
/// order of the requests and the response to the PING.
async fn drain_while_full(
    mut connection: FrameConnection,
    order: Arc<Mutex<String>>,
) -> io::Result<()> {
    const WINDOW: u32 = 64 << 20;
    connection
        .handshake(&[(INITIAL_WINDOW_SIZE, WINDOW)])
        .await?;
    let window = frame(WINDOW_UPDATE, 0, 0, &WINDOW.to_be_bytes());
    connection.write_bytes(&window).await?;
    if connection.index > 0 {
        return serve_up_to(&mut connection, u32::MAX).await;
    }
    while connection.next().await?.kind != DATA {}
    sleep(Duration::from_millis(300)).await;
    let mut announcement = go_away_frame(ANY_STREAM, NO_ERROR, "max_age");
    announcement.extend(frame(PING, 0, 0, &[7; 8]));
    connection.write_bytes(&announcement).await?;
    sleep(Duration::from_millis(100)).await;
    loop {
        let frame = connection.read_frame().await?;
        match frame.kind {
            HEADERS => order.lock().unwrap().push('h'),
            PING if frame.flags & ACK != 0 => order.lock().unwrap().push('p'),
            _ => {}
        }
        if frame.is_end_stream() {
            connection.respond_ok(frame.stream).await?;
        }
    }
}
