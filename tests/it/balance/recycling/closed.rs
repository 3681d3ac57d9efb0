//! Connections that end without GOAWAY, after a response or while idle.

use std::io;
use std::time::Duration;

use goo_etcd::balance::EndpointState;
use tokio::time::timeout;

use super::channel;
use crate::support::balanced::{call, static_channel, status_of};
use crate::support::frames::FrameServer;
use crate::support::wait_until;

/// A proxy without GOAWAY. A call that was written before the end is read cannot be sent again,
/// so each call starts when the end was noticed.
#[tokio::test]
async fn after_each_response_it_is_replaced_at_once() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let stream = connection.next_request().await?;
        connection.respond_ok(stream).await?;
        connection.close().await
    })
    .await;
    let channel = channel([&server]);
    for calls in 1..=50 {
        call(&channel).await.unwrap();
        wait_until("the connection is replaced", async || {
            server.accepted() > calls
        })
        .await;
    }
    assert_eq!(server.accepted(), 51);
}

/// HAProxy with a short `timeout client`: connections end before anything is called.
#[tokio::test]
async fn while_idle_one_call_gets_a_connection_at_once() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let requests = async {
            loop {
                let stream = connection.next_request().await?;
                connection.respond_ok(stream).await?;
            }
        };
        let idle = Duration::from_millis(100);
        let served: Result<io::Result<()>, _> = timeout(idle, requests).await;
        served.unwrap_or(Ok(()))
    })
    .await;
    let channel = static_channel([server.address()], |channel| {
        channel.ready_timeout(Duration::from_secs(1))
    });
    // The next pause is about 2.6 s long.
    let is_paused = async || {
        let status = status_of(&channel, server.address());
        let state = status.map(|status| status.state);
        server.accepted() == 5 && state == Some(EndpointState::Backoff)
    };
    wait_until("the endpoint backs off", is_paused).await;
    call(&channel).await.unwrap();
    assert_eq!(server.accepted(), 6);
}

#[tokio::test]
async fn while_idle_a_call_that_does_not_wait_for_ready_is_served() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        if connection.index < 4 {
            return connection.close().await;
        }
        loop {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
        }
    })
    .await;
    let channel = static_channel([server.address()], |channel| channel.wait_for_ready(false));
    let is_paused = async || {
        let status = status_of(&channel, server.address());
        let state = status.map(|status| status.state);
        server.accepted() == 4 && state == Some(EndpointState::Backoff)
    };
    wait_until("the endpoint backs off", is_paused).await;
    call(&channel).await.unwrap();
}
