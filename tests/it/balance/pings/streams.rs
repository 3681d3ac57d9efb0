//! Keep-alive while a call is open.

use std::time::Duration;

use goo_etcd::BalancedChannel;
use goo_etcd::balance::BalancedChannelBuilder;
use helloworld::echo::EchoReply;
use helloworld::echo::echo_client::EchoClient;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Streaming};

use super::server::{Answer, Server};
use super::{HOUR, SECOND, channel};
use crate::support::balanced::{call, hello};

async fn open_stream(channel: &BalancedChannel) -> Streaming<EchoReply> {
    let mut client = EchoClient::new(channel.clone());
    client.server_stream(hello()).await.unwrap().into_inner()
}

/// grpc-go#4579 and many others: "too_many_pings" on a stream without messages.
#[tokio::test(start_paused = true)]
async fn silent_stream_stays_open() {
    let server = Server::new(Answer::Head);
    let channel = channel(&[&server], |builder| builder).await;
    let mut stream = open_stream(&channel).await;
    timeout(HOUR, stream.message()).await.unwrap_err();
    server.assert_never_too_many_pings();
    assert_eq!(server.accepted(), 1);
    let pauses = server.ping_pauses(0);
    assert_eq!(pauses[..2], [10, 10], "{pauses:?}");
    assert!(pauses[2..].iter().all(|pause| *pause == 310), "{pauses:?}");
    assert!(pauses.len() > 12);
}

/// As grpc-go, which sends the head of a response with its first message.
#[tokio::test(start_paused = true)]
async fn call_without_response_stays_open() {
    let server = Server::new(Answer::Nothing);
    let channel = channel(&[&server], |builder| builder).await;
    timeout(HOUR, call(&channel)).await.unwrap_err();
    server.assert_never_too_many_pings();
    assert_eq!(server.accepted(), 1);
}

#[tokio::test(start_paused = true)]
async fn short_interval_is_no_abuse() {
    let server = Server::new(Answer::Head);
    let settings =
        |builder: BalancedChannelBuilder| builder.http2_keep_alive_interval(Some(SECOND / 10));
    let channel = channel(&[&server], settings).await;
    let mut stream = open_stream(&channel).await;
    timeout(HOUR, stream.message()).await.unwrap_err();
    server.assert_never_too_many_pings();
    assert_eq!(server.accepted(), 1);
}

#[tokio::test(start_paused = true)]
async fn hung_server_is_found_within_interval_and_timeout() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    for pause in [SECOND, 9 * SECOND, 25 * SECOND] {
        sleep(pause).await;
        call(&channel).await.unwrap();
    }
    server.freeze();
    let sent = Instant::now();
    let error = call(&channel).await.unwrap_err();
    let waited = sent.elapsed();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(error.message().contains("keep-alive"), "{error:?}");
    assert!((13 * SECOND..14 * SECOND).contains(&waited), "{waited:?}");
}

/// tonic drops the response without reading a body that is empty.
#[tokio::test(start_paused = true)]
async fn hung_server_is_found_after_a_status_without_a_message() {
    let server = Server::new(Answer::NotFound);
    let channel = channel(&[&server], |builder| builder).await;
    for _ in 0..3 {
        call(&channel).await.unwrap_err();
    }
    server.freeze();
    let sent = Instant::now();
    call(&channel).await.unwrap_err();
    let waited = sent.elapsed();
    assert!((13 * SECOND..14 * SECOND).contains(&waited), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn request_that_is_not_sent_opens_no_stream() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    let _unread = open_stream(&channel).await;
    sleep(SECOND).await;
    let mut request = tonic::Request::new(hello());
    let large = "x".repeat(20_000).parse().unwrap();
    request.metadata_mut().insert("x-large", large);
    let mut client = EchoClient::new(channel.clone());
    let error = client.unary(request).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error:?}");
    sleep(HOUR).await;
    assert_eq!(server.ping_pauses(0), [10]);
    server.assert_never_too_many_pings();
}

/// The server has forgotten the stream, and counts pings as on an idle connection.
#[tokio::test(start_paused = true)]
async fn unread_response_is_no_open_stream() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    let mut unread = open_stream(&channel).await;
    sleep(HOUR).await;
    assert_eq!(server.ping_pauses(0), [10]);
    call(&channel).await.unwrap();
    assert!(unread.message().await.unwrap().is_some());
    server.assert_never_too_many_pings();
    assert_eq!(server.accepted(), 1);
}

/// Calls, cancelled calls, silent streams and idle times in any order.
#[tokio::test(start_paused = true)]
async fn no_mixture_of_calls_is_too_many_pings() {
    for seed in 0..20 {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        let mut random = fastrand::Rng::with_seed(seed);
        for _ in 0..60 {
            let time = Duration::from_secs(random.u64(0..400));
            server.answer(
                *random
                    .choice([&Answer::Ok, &Answer::Head, &Answer::Nothing])
                    .unwrap(),
            );
            match random.u8(0..3) {
                0 => sleep(time).await,
                1 => {
                    let _ = timeout(time, call(&channel)).await;
                }
                _ => {
                    let _ =
                        timeout(time, async { open_stream(&channel).await.message().await }).await;
                }
            }
        }
        server.assert_never_too_many_pings();
    }
}
