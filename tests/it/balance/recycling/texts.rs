//! The texts that tell callers of the GOAWAY that ended a connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tonic::Code;

use super::channel;
use crate::support::balanced::{call, status_of};
use crate::support::frames::{ENHANCE_YOUR_CALM, FrameServer, NO_ERROR};
use crate::support::wait_until;

/// nginx responds so to headers above its limit.
#[tokio::test]
async fn caller_is_told_the_goaway_of_a_refused_stream() {
    let requests = Arc::<AtomicUsize>::default();
    let count = Arc::clone(&requests);
    let server = FrameServer::start(move |mut connection| {
        let requests = Arc::clone(&count);
        async move {
            connection.handshake(&[]).await?;
            connection.next_request().await?;
            requests.fetch_add(1, Ordering::SeqCst);
            connection.send_go_away(0, ENHANCE_YOUR_CALM, "").await?;
            connection.close().await
        }
    })
    .await;
    let channel = channel([&server]);
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let text = "connection lost: GOAWAY ENHANCE_YOUR_CALM";
    assert!(status.message().contains(text), "{status:?}");
    // The call and one transparent retry.
    assert_eq!(requests.load(Ordering::SeqCst), 2);
    let error = || status_of(&channel, server.address())?.last_error;
    wait_until("the connection is lost", async || error().is_some()).await;
    assert!(error().unwrap().contains("GOAWAY ENHANCE_YOUR_CALM"));
}

#[tokio::test]
async fn caller_is_told_the_goaway_that_ended_its_stream() {
    let server = FrameServer::start(|mut connection| async move {
        if connection.index > 0 {
            // The error shows until the next connection is ready.
            return std::future::pending().await;
        }
        connection.handshake(&[]).await?;
        let stream = connection.next_request().await?;
        let internal_error = 2;
        connection
            .send_go_away(stream, internal_error, "out of memory")
            .await?;
        connection.close().await
    })
    .await;
    let channel = channel([&server]);
    let status = call(&channel).await.unwrap_err();
    let text = "connection lost: GOAWAY INTERNAL_ERROR: out of memory";
    assert!(status.message().contains(text), "{status:?}");
    let error = status_of(&channel, server.address()).unwrap().last_error;
    let error = error.expect("no connection is ready");
    assert!(
        error.contains("GOAWAY INTERNAL_ERROR: out of memory"),
        "{error}"
    );
}

#[tokio::test]
async fn caller_is_told_of_an_end_after_a_graceful_goaway() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let stream = connection.next_request().await?;
        connection.send_go_away(stream, NO_ERROR, "max_age").await?;
        connection.close().await
    })
    .await;
    let channel = channel([&server]);
    let status = call(&channel).await.unwrap_err();
    let text = "connection lost: closed by the peer after GOAWAY NO_ERROR: max_age";
    assert!(status.message().contains(text), "{status:?}");
}
