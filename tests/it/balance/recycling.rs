//! Servers and proxies that end connections after some requests, after a time, or while idle.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use goo_etcd::BalancedChannel;
use goo_etcd::balance::EndpointState;
use helloworld::echo::echo_client::EchoClient;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use crate::support::balanced::{
    Load, call, hello, is_ready, static_channel, status_of, wait_until_ready,
};
use crate::support::frames::{
    ACK, ENHANCE_YOUR_CALM, FrameConnection, FrameServer, GOAWAY, HEADERS, NO_ERROR, PING, frame,
    go_away_frame, settings_frame,
};
use crate::support::wait_until;

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

mod goaway {
    use super::*;

    /// nginx `keepalive_requests`, AWS ALB, Envoy (grpc-java#8310, grpc-java#11728, grpc-go#2205).
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
            FrameServer::start(move |connection| drain_with_ping(connection, Arc::clone(&count)))
                .await;
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
}

mod closed {
    use super::*;

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
}

mod greeting {
    use super::*;

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
}

mod texts {
    use super::*;

    /// nginx responds so to headers above its limit.
    #[tokio::test]
    async fn caller_is_told_the_goaway_of_a_refused_stream() {
        let server = FrameServer::start(|mut connection| async move {
            connection.handshake(&[]).await?;
            connection.next_request().await?;
            connection.send_go_away(0, ENHANCE_YOUR_CALM, "").await?;
            connection.close().await
        })
        .await;
        let channel = channel([&server]);
        let status = call(&channel).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        let text = "connection lost: GOAWAY ENHANCE_YOUR_CALM";
        assert!(status.message().contains(text), "{status:?}");
        // The call and one transparent retry.
        let error = || status_of(&channel, server.address())?.last_error;
        wait_until("the connection is lost", async || error().is_some()).await;
        assert!(error().unwrap().contains("GOAWAY ENHANCE_YOUR_CALM"));
    }

    #[tokio::test]
    async fn caller_is_told_the_goaway_that_ended_its_stream() {
        let server = FrameServer::start(|mut connection| async move {
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
        assert!(error.is_none_or(|error| error.contains("GOAWAY INTERNAL_ERROR: out of memory")));
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
}

mod throughput {
    use super::*;

    const TIME: Duration = Duration::from_secs(2);

    /// Successful calls of 16 tasks.
    async fn count<S>(make: impl Fn() -> EchoClient<S>) -> u64
    where
        S: tonic::client::GrpcService<tonic::body::Body> + Send + 'static,
        S::Future: Send,
        S::Error: Into<tonic::codegen::StdError>,
        S::ResponseBody: tonic::transport::Body<Data = bytes::Bytes> + Send + 'static,
        <S::ResponseBody as tonic::transport::Body>::Error: Into<tonic::codegen::StdError> + Send,
    {
        let mut tasks = JoinSet::new();
        let until = Instant::now() + TIME;
        for _ in 0..16 {
            let mut client = make();
            tasks.spawn(async move {
                let mut succeeded = 0;
                while Instant::now() < until {
                    // Bounded, because tonic's channel has been seen to hang.
                    let call = timeout(Duration::from_secs(1), client.unary(hello()));
                    succeeded += u64::from(matches!(call.await, Ok(Ok(_))));
                }
                succeeded
            });
        }
        tasks.join_all().await.into_iter().sum()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn at_least_0_7_times_that_of_a_plain_channel() {
        let server = recycling_server(100).await;
        let ours = channel([&server]);
        let uri = format!("http://{}", server.address());
        let plain = tonic::transport::Endpoint::new(uri).unwrap().connect_lazy();
        let plain = count(|| EchoClient::new(plain.clone())).await;
        let ours = count(|| EchoClient::new(ours.clone())).await;
        assert!(ours * 10 >= plain * 7, "{ours} and {plain}");
    }
}
