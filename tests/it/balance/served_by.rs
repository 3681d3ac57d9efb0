//! Which endpoint served a call.

use std::collections::BTreeSet;

use goo_etcd::balance::ServedBy;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;

use crate::support::balanced::{hello, static_channel, wait_until_ready};
use crate::support::echo::EchoServer;

fn served_by(extensions: &http::Extensions) -> &str {
    extensions.get::<ServedBy>().unwrap().address()
}

#[tokio::test]
async fn names_the_endpoint_of_each_unary_response() {
    let servers = [EchoServer::start(), EchoServer::start()];
    let channel = static_channel(servers.each_ref().map(EchoServer::address), |builder| {
        builder
    });
    wait_until_ready(&channel, 2).await;
    let mut client = EchoClient::new(channel);
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        let response = client.unary(hello()).await.unwrap();
        let address = served_by(response.extensions()).to_owned();
        assert_eq!(response.into_inner().server, address);
        seen.insert(address);
    }
    assert_eq!(seen.len(), 2);
}

#[tokio::test]
async fn names_the_endpoint_of_a_stream() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| builder);
    let request = EchoRequest {
        count: 1,
        ..hello()
    };
    let mut client = EchoClient::new(channel);
    let response = client.server_stream(request).await.unwrap();
    assert_eq!(served_by(response.extensions()), server.address());
}
