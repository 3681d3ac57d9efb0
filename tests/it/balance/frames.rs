//! Servers of hand-written frames: what a channel makes of their GOAWAY.

use crate::support::balanced::{call, static_channel, status_of};
use crate::support::frames::{ENHANCE_YOUR_CALM, FrameServer};
use crate::support::wait_until;

#[tokio::test]
async fn complete_response_is_received() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        loop {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
        }
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel);
    for _ in 0..3 {
        assert_eq!(call(&channel).await.unwrap(), "");
    }
    assert_eq!(server.accepted(), 1);
}

#[tokio::test]
async fn goaway_is_named_in_last_error() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        // The client has no stream yet, and acknowledges the settings.
        connection.next().await?;
        connection
            .send_go_away(0, ENHANCE_YOUR_CALM, "too_many_pings")
            .await?;
        connection.close().await
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel);
    let error = || status_of(&channel, server.address())?.last_error;
    wait_until("the connection is lost", async || error().is_some()).await;
    let expected = "GOAWAY ENHANCE_YOUR_CALM: too_many_pings";
    assert!(error().unwrap().contains(expected), "{:?}", error());
}
