//! How an application waits for endpoints, and follows their states.

use futures::{FutureExt, StreamExt};
use goo_etcd::balance::EndpointState;

use crate::support::balanced::{
    call, dynamic_channel, instance, static_channel, status_of, unused_address,
};
use crate::support::echo::EchoServer;
use crate::support::{wait_for, wait_until};

mod wait {
    use super::*;

    #[tokio::test]
    async fn resolves_once_enough_endpoints_are_connected() {
        let (a, b) = (EchoServer::start(), EchoServer::start());
        let (sets, channel) = dynamic_channel([a.address()], |builder| builder);
        wait_for("one endpoint is ready", channel.ready(1)).await;
        let mut two = Box::pin(channel.ready(2));
        assert!(two.as_mut().now_or_never().is_none());

        sets.send([a.address(), b.address()].map(instance));

        wait_for("two endpoints are ready", two).await;
        for server in [&a, &b] {
            let status = status_of(&channel, server.address()).unwrap();
            assert_eq!(status.state, EndpointState::Ready);
        }
    }

    #[tokio::test]
    async fn zero_endpoints_are_always_ready() {
        let channel = static_channel([], |builder| builder);
        wait_for("none is asked for", channel.ready(0)).await;
    }

    #[tokio::test]
    async fn unreachable_and_draining_endpoints_do_not_count() {
        let (server, draining) = (EchoServer::start(), EchoServer::start());
        let unreachable = unused_address();
        let (sets, channel) = dynamic_channel([], |builder| builder);
        sets.send([
            instance(server.address()),
            instance(draining.address()).weight(0),
            instance(&unreachable),
        ]);
        wait_for("the server is ready", channel.ready(1)).await;
        let state = |address: &str| status_of(&channel, address).map(|status| status.state);
        wait_until("the other endpoint has failed", async || {
            state(&unreachable) == Some(EndpointState::Backoff)
        })
        .await;
        assert_eq!(state(draining.address()), Some(EndpointState::Draining));
        assert!(channel.ready(2).now_or_never().is_none());
    }

    #[tokio::test]
    async fn dropped_wait_leaves_the_channel_usable() {
        let server = EchoServer::start();
        let channel = static_channel([server.address()], |builder| builder);
        assert!(channel.ready(7).now_or_never().is_none());
        wait_for("one endpoint is ready", channel.ready(1)).await;
        wait_for("a call", call(&channel)).await.unwrap();
    }
}

mod endpoint_statuses {
    use super::*;

    #[tokio::test]
    async fn first_item_is_immediate() {
        let channel = static_channel([], |builder| builder);
        let mut changes = channel.endpoint_statuses();
        assert_eq!(changes.next().now_or_never(), Some(Some(vec![])));
    }

    #[tokio::test]
    async fn slow_reader_gets_the_latest_state() {
        let servers = [EchoServer::start(), EchoServer::start()];
        let (sets, channel) = dynamic_channel([], |builder| builder);
        let mut changes = channel.endpoint_statuses();
        for server in &servers {
            sets.send([instance(server.address())]);
            wait_until("the set is in use", async || {
                status_of(&channel, server.address()).is_some()
            })
            .await;
        }
        wait_for("the endpoint is ready", channel.ready(1)).await;

        // All changes so far are one item.
        let latest = wait_for("an item", changes.next()).await.unwrap();
        let addresses: Vec<&str> = latest.iter().map(|e| e.address.as_str()).collect();
        assert_eq!(addresses, [servers[1].address()]);
        assert_eq!(latest, channel.endpoints());
    }

    #[tokio::test]
    async fn every_change_is_followed_by_an_item() {
        let mut server = EchoServer::start();
        let channel = static_channel([server.address()], |builder| builder);
        let mut changes = channel.endpoint_statuses();
        let mut wait_until = async |state: EndpointState| {
            let reached = async {
                while let Some(endpoints) = changes.next().await {
                    if endpoints.iter().any(|endpoint| endpoint.state == state) {
                        return;
                    }
                }
                panic!("the stream has ended");
            };
            wait_for("the state is reached", reached).await;
        };
        wait_until(EndpointState::Ready).await;
        server.begin_shutdown();
        drop(server);
        wait_until(EndpointState::Backoff).await;
    }

    #[tokio::test]
    async fn stream_ends_with_the_channel() {
        let channel = static_channel([], |builder| builder);
        let mut changes = channel.endpoint_statuses();
        let clone = channel.clone();
        drop(channel);
        changes.next().await.unwrap();
        drop(clone);
        let ended = async { while changes.next().await.is_some() {} };
        wait_for("the stream ends", ended).await;
    }
}
