//! Servers that greet a connection and end it, and the SETTINGS that make an endpoint ready.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tonic::Code;

use super::{ANY_STREAM, channel};
use crate::support::balanced::{call, is_ready, static_channel, wait_until_ready};
use crate::support::frames::{
    FrameConnection, FrameServer, INTERNAL_ERROR, NO_ERROR, settings_frame,
};
use crate::support::wait_until;

/// Calls a server that ends each connection, and checks that few connections were made.
async fn assert_no_tight_loop<F>(handle: fn(FrameConnection) -> F)
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let server = FrameServer::start(handle).await;
    let channel = static_channel([server.address()], |channel| {
        channel.ready_timeout(Duration::from_secs(2))
    });
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    // Three at once, one for the call, and those after pauses of 1 s and 1.6 s.
    let accepted = server.accepted();
    assert!((2..=7).contains(&accepted), "{accepted}");
}

#[tokio::test]
async fn settings_and_end_make_no_tight_loop() {
    assert_no_tight_loop(|mut connection| async move {
        connection.handshake(&[]).await?;
        connection.close().await
    })
    .await;
}

#[tokio::test]
async fn settings_and_goaway_make_no_tight_loop() {
    assert_no_tight_loop(|mut connection| async move {
        connection.handshake(&[]).await?;
        connection.send_go_away(0, NO_ERROR, "").await?;
        connection.close().await
    })
    .await;
}

#[tokio::test]
async fn settings_and_announced_goaway_make_no_tight_loop() {
    assert_no_tight_loop(|mut connection| async move {
        connection.handshake(&[]).await?;
        connection.send_go_away(ANY_STREAM, NO_ERROR, "").await?;
        connection.close().await
    })
    .await;
}

/// The server accepts a call each time and responds to none.
#[tokio::test]
async fn accepted_calls_without_a_response_make_no_tight_loop() {
    for code in [NO_ERROR, INTERNAL_ERROR] {
        let server = FrameServer::start(move |mut connection| async move {
            connection.handshake(&[]).await?;
            let stream = connection.next_request().await?;
            connection.send_go_away(stream, code, "").await?;
            connection.close().await
        })
        .await;
        let channel = static_channel([server.address()], |channel| {
            channel.ready_timeout(Duration::from_secs(1))
        });
        wait_until_ready(&channel, 1).await;
        let calling = async {
            loop {
                futures::future::join_all((0..4).map(|_| call(&channel))).await;
            }
        };
        let called: Result<(), _> = timeout(Duration::from_secs(2), calling).await;
        assert!(called.is_err());
        // Three or four at once, one on demand, and those after pauses of 1 s and 1.6 s.
        let accepted = server.accepted();
        assert!((3..=10).contains(&accepted), "{accepted}");
    }
}

/// Nobody opened the stream, so the headers are no response, and h2 ends the connection.
#[tokio::test]
async fn headers_without_a_request_make_no_tight_loop() {
    assert_no_tight_loop(|mut connection| async move {
        connection.handshake(&[]).await?;
        let head: [(&str, &[u8]); 1] = [(":status", b"200")];
        connection.send_headers(1, &head, false).await?;
        connection.close().await
    })
    .await;
}

#[tokio::test]
async fn end_without_settings_makes_no_tight_loop() {
    assert_no_tight_loop(|mut connection| async move {
        connection.read_preface().await?;
        connection.close().await
    })
    .await;
}

#[tokio::test]
async fn endpoint_is_ready_after_the_whole_settings_frame() {
    let go_on = Arc::new(Notify::new());
    let started = Arc::<AtomicBool>::default();
    let server = FrameServer::start({
        let (go_on, started) = (Arc::clone(&go_on), Arc::clone(&started));
        move |mut connection| {
            let (go_on, started) = (Arc::clone(&go_on), Arc::clone(&started));
            async move {
                connection.read_preface().await?;
                let settings = settings_frame(&[(3, 100)]);
                let (last, rest) = settings.split_last().unwrap();
                connection.write_bytes(rest).await?;
                started.store(true, Ordering::SeqCst);
                go_on.notified().await;
                connection.write_bytes(&[*last]).await?;
                loop {
                    connection.next().await?;
                }
            }
        }
    })
    .await;
    let channel = channel([&server]);
    wait_until("the frame has begun", async || {
        started.load(Ordering::SeqCst)
    })
    .await;
    sleep(Duration::from_millis(200)).await;
    assert!(!is_ready(&channel, server.address()));
    go_on.notify_one();
    wait_until_ready(&channel, 1).await;
}
