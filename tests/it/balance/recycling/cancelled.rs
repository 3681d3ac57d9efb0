//! Servers that count cancelled streams.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::channel;
use crate::support::balanced::{call_with_timeout, is_ready, wait_until_ready};
use crate::support::frames::{ENHANCE_YOUR_CALM, FrameServer, RST_STREAM};

/// Ends each connection at its 200th cancelled stream, and responds to no request.
/// reactor-netty#3894.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limit_on_cancelled_streams_leaves_the_endpoint_connected() {
    let server = FrameServer::start(|mut connection| async move {
        connection.handshake(&[]).await?;
        let (mut last, mut cancelled) = (0, 0);
        while cancelled < 200 {
            let frame = connection.next().await?;
            last = last.max(frame.stream);
            cancelled += usize::from(frame.kind == RST_STREAM);
        }
        connection
            .send_go_away(last, ENHANCE_YOUR_CALM, "too many resets")
            .await?;
        connection.close().await
    })
    .await;
    let channel = channel([&server]);
    wait_until_ready(&channel, 1).await;
    let mut callers = JoinSet::new();
    for _ in 0..64 {
        let channel = channel.clone();
        callers.spawn(async move {
            loop {
                let _ = call_with_timeout(&channel, Duration::from_millis(30)).await;
            }
        });
    }
    let (mut ready, mut looks) = (0, 0);
    // Connections live for about 100 ms. A new one takes some milliseconds, or more on a busy
    // machine. With backoff the endpoint is connected for 2 % of the time.
    while server.accepted() < 30 {
        assert!(looks < 10_000, "{} connections", server.accepted());
        ready += usize::from(is_ready(&channel, server.address()));
        looks += 1;
        sleep(Duration::from_millis(5)).await;
    }
    assert!(ready * 2 >= looks, "connected {ready} of {looks} times");
}
