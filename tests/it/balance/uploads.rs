//! Keep-alive while a request is sent that takes long.

use std::future::{Future, ready};
use std::io;
use std::time::{Duration, Instant};

use goo_etcd::BalancedChannel;
use goo_etcd::testing::Proxy;
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Uri;
use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use tokio::io::BufStream;
use tokio::net::TcpSocket;
use tokio::time::sleep;
use tonic::{Code, Status};

use crate::support::balanced::{call_with_timeout, static_channel, wait_until_ready};
use crate::support::echo_process::EchoProcess;
use crate::support::frames::{
    ACK, DATA, FrameConnection, FrameServer, INITIAL_WINDOW_SIZE, PING, SETTINGS, WINDOW_UPDATE,
};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Wide enough for a busy machine to answer a ping.
const INTERVAL: Duration = Duration::from_secs(1);
const TIMEOUT: Duration = Duration::from_secs(1);

/// The time in which a stopped server must be found, for a busy machine. Without keep-alive it is
/// never found.
const FOUND_WITHIN: Duration = Duration::from_secs(15);

fn channel(address: &str) -> BalancedChannel {
    static_channel([address], |builder| {
        builder
            .http2_keep_alive_interval(Some(INTERVAL))
            .keep_alive_timeout(TIMEOUT)
    })
}

async fn upload(channel: &BalancedChannel, bytes: usize) -> Result<(), Status> {
    let request = EchoRequest {
        payload: vec![7; bytes],
        ..EchoRequest::default()
    };
    let client = EchoClient::new(channel.clone());
    let mut client = client.max_encoding_message_size(usize::MAX);
    client.unary(request).await.map(drop)
}

/// Sends messages of 64 KiB until the call fails.
async fn upload_for_ever(channel: &BalancedChannel) -> Status {
    let message = EchoRequest {
        payload: vec![7; 64 * 1024],
        ..EchoRequest::default()
    };
    let mut client = EchoClient::new(channel.clone());
    let messages = futures::stream::repeat(message);
    client.client_stream(messages).await.unwrap_err()
}

/// Grants windows of 8 MiB, so that nothing but TCP slows an upload down.
async fn open_windows(connection: &mut FrameConnection) -> io::Result<()> {
    let window = 8 * MIB as u32;
    connection
        .handshake(&[(INITIAL_WINDOW_SIZE, window)])
        .await?;
    let increment = window.to_be_bytes();
    connection
        .write_frame(WINDOW_UPDATE, 0, 0, &increment)
        .await
}

/// Answers requests and pings, and sends nothing while it reads a request that fits in the windows.
async fn answer_requests(connection: FrameConnection) -> io::Result<()> {
    answer_slowly(connection, Duration::ZERO).await
}

/// Pauses before each frame of DATA, which holds 16 KiB.
async fn answer_slowly(mut connection: FrameConnection, pause: Duration) -> io::Result<()> {
    open_windows(&mut connection).await?;
    loop {
        let frame = connection.read_frame().await?;
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => {
                connection.write_frame(SETTINGS, ACK, 0, &[]).await?;
            }
            PING => connection.write_frame(PING, ACK, 0, &frame.payload).await?,
            DATA => {
                sleep(pause).await;
                if frame.is_end_stream() {
                    connection.respond_ok(frame.stream).await?;
                }
            }
            _ => {}
        }
    }
}

/// 4 MiB at 160 KiB/s failed after 13 s, because the ping waited behind what the system had
/// buffered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_upload_ends() {
    let server = FrameServer::start(answer_requests).await;
    let proxy = Proxy::start(server.address()).await.unwrap();
    let endpoint = proxy.endpoint();
    let channel = channel(endpoint.trim_start_matches("http://"));
    wait_until_ready(&channel, 1).await;
    proxy.limit_rate(800 * KIB as u32);
    let started = Instant::now();
    upload(&channel, 4 * MIB).await.unwrap();
    let took = started.elapsed();
    assert!(took > 2 * (INTERVAL + TIMEOUT), "not slow: {took:?}");
    assert_eq!(server.accepted(), 1);
}

/// The ping after the last write waits behind all that the system has taken and not sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ping_does_not_wait_long_behind_an_upload() {
    let socket = TcpSocket::new_v4().unwrap();
    // The server's system takes little ahead of the server, as a slow network does.
    socket.set_recv_buffer_size(8 * KIB as u32).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    // 10 KiB/s if the interval and the timeout were 13 s together, as they are by default.
    let pause = (INTERVAL + TIMEOUT) * 16 / 130;
    let server = FrameServer::start_on(socket.listen(8).unwrap(), move |connection| {
        answer_slowly(connection, pause)
    });
    let channel = channel(server.address());
    wait_until_ready(&channel, 1).await;
    upload(&channel, 144 * KIB).await.unwrap();
    assert_eq!(server.accepted(), 1);
}

/// A system that receives makes room in large steps, and what its side holds may take longer than
/// the interval and the timeout, which are 13 s. Over a pipe in paused time.
#[tokio::test(start_paused = true)]
async fn server_that_reads_in_slow_steps_gets_the_end() {
    let connector = tower::service_fn(|_: Uri| {
        let (client, io) = tokio::io::duplex(128 * KIB);
        tokio::spawn(read_in_steps(FrameConnection::new(io, 0)));
        ready(Ok::<_, io::Error>(TokioIo::new(client)))
    });
    let channel = static_channel(["pipe:1"], |builder| builder.connector(connector));
    wait_until_ready(&channel, 1).await;
    upload(&channel, 512 * KIB).await.unwrap();
    // The server has responded, so the next wait is as short as usual.
    let started = tokio::time::Instant::now();
    call_with_timeout(&channel, Duration::from_secs(60))
        .await
        .unwrap_err();
    let waited = started.elapsed();
    assert!(waited < Duration::from_secs(14), "{waited:?}");
}

/// Reads 64 KiB every 7 s, responds once, and then hangs.
async fn read_in_steps(mut connection: FrameConnection) -> io::Result<()> {
    open_windows(&mut connection).await?;
    let mut received = 0;
    loop {
        let frame = connection.read_frame().await?;
        match frame.kind {
            PING => connection.write_frame(PING, ACK, 0, &frame.payload).await?,
            DATA => received += frame.payload.len(),
            _ => {}
        }
        if frame.is_end_stream() {
            connection.respond_ok(frame.stream).await?;
            return std::future::pending().await;
        }
        if received >= 64 * KIB {
            received -= 64 * KIB;
            sleep(Duration::from_secs(7)).await;
        }
    }
}

/// A server that has stopped takes nothing any more, once its windows or the system's buffers are
/// full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_process_is_found_in_mid_upload() {
    let server = EchoProcess::start().await;
    let channel = channel(server.address());
    wait_until_ready(&channel, 1).await;
    let uploading = tokio::spawn({
        let channel = channel.clone();
        async move { upload_for_ever(&channel).await }
    });
    sleep(INTERVAL / 2).await;
    server.pause().await;
    let stopped = Instant::now();
    let error = uploading.await.unwrap();
    let took = stopped.elapsed();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(error.message().contains("keep-alive"), "{error:?}");
    assert!(took <= FOUND_WITHIN, "{took:?}");
    server.signal(Signal::SIGCONT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_stops_reading_is_found_in_mid_upload() {
    let server = FrameServer::start(|mut connection| async move {
        open_windows(&mut connection).await?;
        let mut received = 0;
        while received < MIB {
            let frame = connection.next().await?;
            if frame.kind == DATA {
                received += frame.payload.len();
            }
        }
        std::future::pending().await
    })
    .await;
    let channel = channel(server.address());
    wait_until_ready(&channel, 1).await;
    let started = Instant::now();
    let error = upload(&channel, 64 * MIB).await.unwrap_err();
    let took = started.elapsed();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(error.message().contains("keep-alive"), "{error:?}");
    assert!(took <= FOUND_WITHIN, "{took:?}");
}

/// A connector's I/O may take bytes into a buffer of its own, as TLS does, while the server takes
/// none. Such writes are no signs of life. Over a pipe in paused time.
#[tokio::test(start_paused = true)]
async fn hung_server_behind_a_buffer_is_found() {
    let channel = buffered_channel(hang_in_mid_upload);
    wait_until_ready(&channel, 1).await;
    let started = tokio::time::Instant::now();
    let error = upload(&channel, 100_000).await.unwrap_err();
    let took = started.elapsed();
    assert!(error.message().contains("keep-alive"), "{error:?}");
    assert!(took < Duration::from_secs(14), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn small_messages_into_a_buffer_are_no_signs_of_life() {
    let channel = buffered_channel(hang_in_mid_upload);
    wait_until_ready(&channel, 1).await;
    // The first message fills the pipe, and the others fit in the buffer.
    let messages = futures::stream::unfold(100_000, |size| async move {
        let payload = vec![7; size];
        if size == 100 {
            sleep(Duration::from_secs(2)).await;
        }
        let message = EchoRequest {
            payload,
            ..EchoRequest::default()
        };
        Some((message, 100))
    });
    let started = tokio::time::Instant::now();
    let mut client = EchoClient::new(channel.clone());
    let error = client.client_stream(messages).await.unwrap_err();
    let took = started.elapsed();
    assert!(error.message().contains("keep-alive"), "{error:?}");
    assert!(took < Duration::from_secs(14), "{took:?}");
}

/// Writes that a full buffer lets wait are signs of life when they succeed.
#[tokio::test(start_paused = true)]
async fn slow_upload_through_a_buffer_ends() {
    let channel = buffered_channel(|connection| {
        // 16 KiB/s.
        answer_slowly(connection, Duration::from_secs(1))
    });
    wait_until_ready(&channel, 1).await;
    let started = tokio::time::Instant::now();
    upload(&channel, 512 * KIB).await.unwrap();
    let took = started.elapsed();
    assert!(took > Duration::from_secs(26), "not slow: {took:?}");
}

/// A channel to a server at the other end of a pipe, behind a buffer as large as the pipe.
fn buffered_channel<F>(serve: fn(FrameConnection) -> F) -> BalancedChannel
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let connector = tower::service_fn(move |_: Uri| {
        let (client, io) = tokio::io::duplex(64 * KIB);
        tokio::spawn(serve(FrameConnection::new(io, 0)));
        let buffered = BufStream::with_capacity(8 * KIB, 64 * KIB, client);
        ready(Ok::<_, io::Error>(TokioIo::new(buffered)))
    });
    static_channel(["pipe:1"], |builder| builder.connector(connector))
}

/// Reads until the first request begins.
async fn hang_in_mid_upload(mut connection: FrameConnection) -> io::Result<()> {
    open_windows(&mut connection).await?;
    while connection.read_frame().await?.kind != DATA {}
    std::future::pending().await
}
