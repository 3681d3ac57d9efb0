//! Pings to servers that police them, as gRPC servers in Go, C++ and Java do by default.
//!
//! The servers are hand-written frames over pipes, and time is paused, so that hours pass at once.

mod idle;
mod server;
mod streams;
mod too_many_pings;

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use goo_etcd::BalancedChannel;
use goo_etcd::balance::BalancedChannelBuilder;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::time::sleep;

use self::server::Server;
use crate::support::balanced::{static_channel, wait_until_ready};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// A channel to servers behind pipes, of which the first has the address `s0:1`.
async fn channel(
    servers: &[&Arc<Server>],
    settings: impl FnOnce(BalancedChannelBuilder) -> BalancedChannelBuilder,
) -> BalancedChannel {
    let named = servers.iter().enumerate();
    let named: BTreeMap<String, Arc<Server>> = named
        .map(|(index, server)| (address(index), Arc::clone(server)))
        .collect();
    let addresses: Vec<String> = named.keys().cloned().collect();
    let connector = tower::service_fn(move |uri: Uri| {
        let server = Arc::clone(&named[uri.authority().unwrap().as_str()]);
        async move {
            while server.is_full.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(1)).await;
            }
            let (client, io) = tokio::io::duplex(64 * 1024);
            server.accept(io);
            Ok::<_, io::Error>(TokioIo::new(client))
        }
    });
    let addresses = addresses.iter().map(String::as_str);
    let channel = static_channel(addresses, |builder| settings(builder.connector(connector)));
    wait_until_ready(&channel, servers.len()).await;
    channel
}

fn address(index: usize) -> String {
    format!("s{index}:1")
}
