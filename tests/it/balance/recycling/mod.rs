//! Servers and proxies that end connections after some requests, after a time, or while idle.

mod aged;
mod cancelled;
mod closed;
mod goaway;
mod greeting;
mod texts;
mod throughput;

use std::io;
use std::time::Duration;

use goo_etcd::BalancedChannel;

use crate::support::balanced::{Load, static_channel};
use crate::support::frames::{FrameConnection, FrameServer, NO_ERROR};

/// The last stream of a GOAWAY that announces another one (RFC 9113, section 6.8).
const ANY_STREAM: u32 = 0x7fff_ffff;

/// How long calls wait for an endpoint in these tests. A connection that is replaced at once takes
/// milliseconds; a backoff takes 5 s and more after some connections.
const READY_TIMEOUT: Duration = Duration::from_secs(3);

fn channel<'a>(servers: impl IntoIterator<Item = &'a FrameServer>) -> BalancedChannel {
    let addresses = servers.into_iter().map(FrameServer::address);
    static_channel(addresses, |channel| channel.ready_timeout(READY_TIMEOUT))
}

/// A server that responds to this many requests on each connection, and then sends GOAWAY. Streams
/// above the GOAWAY's last are not processed.
async fn recycling_server(requests: usize) -> FrameServer {
    FrameServer::start(move |mut connection| async move {
        connection.handshake(&[]).await?;
        let mut last = 0;
        for _ in 0..requests {
            let stream = connection.next_request().await?;
            connection.respond_ok(stream).await?;
            last = last.max(stream);
        }
        // A stream below `last` whose request is not complete yet counts as processed.
        connection.send_go_away(last, NO_ERROR, "").await?;
        serve_up_to(&mut connection, last).await
    })
    .await
}

/// Responds to the requests that complete on streams up to `last`, until the client closes.
async fn serve_up_to(connection: &mut FrameConnection, last: u32) -> io::Result<()> {
    loop {
        let stream = connection.next_request().await?;
        if stream <= last {
            connection.respond_ok(stream).await?;
        }
    }
}

/// Makes calls with 16 tasks, none of which fails.
async fn assert_calls_succeed(channel: &BalancedChannel, calls: u64) {
    let load = Load::start(channel, 16);
    load.wait_for_calls(calls).await;
    load.finish().await.assert_no_failure();
}
