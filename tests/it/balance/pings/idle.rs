//! Keep-alive without calls, and the ping before the next call.

use std::sync::atomic::Ordering;

use goo_etcd::balance::BalancedChannelBuilder;
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::server::{Answer, Event, Server};
use super::{HOUR, MINUTE, SECOND, address, channel};
use crate::support::balanced::{call, call_with_timeout, is_ready, wait_until_ready};

#[tokio::test(start_paused = true)]
async fn connection_gets_one_ping_and_stays() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    sleep(2 * HOUR).await;
    assert_eq!(server.ping_pauses(0), [10]);
    sleep(24 * HOUR).await;
    server.assert_never_too_many_pings();
    assert_eq!(server.accepted(), 1);
    call(&channel).await.unwrap();
    sleep(2 * HOUR).await;
    call(&channel).await.unwrap();
    server.assert_never_too_many_pings();
    assert_eq!(server.accepted(), 1);
}

#[tokio::test(start_paused = true)]
async fn first_call_pays_one_ping() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    for idle in [MINUTE, HOUR, HOUR] {
        sleep(idle).await;
        let before = server.events(0).len();
        for _ in 0..3 {
            call(&channel).await.unwrap();
        }
        let events = server.events(0).split_off(before);
        assert_eq!(events, [Event::Ping, Event::Call, Event::Call, Event::Call]);
    }
    // Many at a time share the ping.
    sleep(HOUR).await;
    let before = server.events(0).len();
    let calls = (0..50).map(|_| call(&channel));
    futures::future::try_join_all(calls).await.unwrap();
    let events = server.events(0).split_off(before);
    assert_eq!(events.len(), 51);
    assert_eq!(events[..2], [Event::Ping, Event::Call]);
    assert_eq!(server.accepted(), 1);
}

#[tokio::test(start_paused = true)]
async fn call_soon_after_the_pings_pays_none() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    sleep(19 * SECOND).await;
    call(&channel).await.unwrap();
    assert_eq!(server.events(0), [Event::Ping, Event::Call]);
}

#[tokio::test(start_paused = true)]
async fn server_that_hung_meanwhile_costs_no_call() {
    let servers = [Server::new(Answer::Ok), Server::new(Answer::Ok)];
    let [hung, live] = &servers;
    let channel = channel(&[hung, live], |builder| builder).await;
    sleep(HOUR).await;
    hung.freeze();
    for _ in 0..100 {
        call(&channel).await.unwrap();
    }
    assert!(hung.seen(0).iter().all(|(event, _)| *event != Event::Call));
    assert!(live.calls() > 0);
}

/// Not one keep-alive timeout after the other: `ready_timeout` would end the call.
#[tokio::test(start_paused = true)]
async fn many_servers_that_hung_meanwhile_cost_no_call() {
    let servers: Vec<_> = (0..8).map(|_| Server::new(Answer::Ok)).collect();
    let channel = channel(&servers.iter().collect::<Vec<_>>(), |builder| builder).await;
    let (live, hung) = servers.split_first().unwrap();
    for _ in 0..5 {
        sleep(HOUR).await;
        hung.iter().for_each(|server| server.freeze());
        let started = Instant::now();
        for _ in 0..100 {
            call(&channel).await.unwrap();
        }
        assert!(started.elapsed() < 5 * SECOND, "{:?}", started.elapsed());
        wait_until_ready(&channel, servers.len()).await;
    }
    assert!(live.calls() > 0);
}

/// The response to the ping takes longer than usual, but not too long.
#[tokio::test(start_paused = true)]
async fn slow_response_to_the_ping_costs_no_call() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    sleep(HOUR).await;
    server.slow.store(true, Ordering::SeqCst);
    let started = Instant::now();
    let calls = (0..50).map(|_| call(&channel));
    futures::future::try_join_all(calls).await.unwrap();
    assert!((2 * SECOND..3 * SECOND).contains(&started.elapsed()));
    assert_eq!(server.accepted(), 1);
    let expected = [Event::Ping, Event::Ping, Event::Call];
    assert_eq!(server.events(0)[..3], expected);
}

#[tokio::test(start_paused = true)]
async fn only_server_that_hung_meanwhile_gets_the_call_again() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    sleep(HOUR).await;
    server.freeze();
    let started = Instant::now();
    call(&channel).await.unwrap();
    assert!(started.elapsed() < 5 * SECOND, "{:?}", started.elapsed());
    assert_eq!(server.accepted(), 2);
    assert_eq!(server.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn message_names_the_ping_without_a_response() {
    let server = Server::new(Answer::Ok);
    let settings = |builder: BalancedChannelBuilder| builder.ready_timeout(SECOND);
    let channel = channel(&[&server], settings).await;
    sleep(HOUR).await;
    server.freeze();
    let status = call(&channel).await.unwrap_err();
    let text = "s0:1 (ready, no response to a ping)";
    assert!(status.message().contains(text), "{status}");
}

/// The time of the call is over when the second server has not responded either.
#[tokio::test(start_paused = true)]
async fn call_that_was_never_sent_says_so() {
    let servers = [Server::new(Answer::Ok), Server::new(Answer::Ok)];
    let settings = |builder: BalancedChannelBuilder| builder.ready_timeout(SECOND / 2);
    let channel = channel(&servers.each_ref(), settings).await;
    sleep(HOUR).await;
    servers.iter().for_each(|server| server.freeze());
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let text = "the request was not sent: no response to a ping";
    assert!(status.message().contains(text), "{status}");
}

#[tokio::test(start_paused = true)]
async fn server_that_hangs_soon_is_found_without_a_call() {
    let server = Server::new(Answer::Ok);
    let channel = channel(&[&server], |builder| builder).await;
    call(&channel).await.unwrap();
    server.freeze();
    sleep(14 * SECOND).await;
    wait_until_ready(&channel, 1).await;
    assert_eq!(server.accepted(), 2);
}

/// The second ping was sent before a call to which the server sent nothing back.
#[tokio::test(start_paused = true)]
async fn call_without_a_ping_left_gets_a_new_connection() {
    for (answer, waits) in [(Answer::Nothing, true), (Answer::Reset, false)] {
        let server = Server::new(answer);
        let settings = |builder: BalancedChannelBuilder| builder.wait_for_ready(waits);
        let channel = channel(&[&server], settings).await;
        sleep(MINUTE).await;
        call_with_timeout(&channel, SECOND).await.unwrap_err();
        server.answer(Answer::Ok);
        sleep(MINUTE).await;
        let started = Instant::now();
        call(&channel).await.unwrap();
        assert!(started.elapsed() < SECOND, "{:?}", started.elapsed());
        assert_eq!(server.accepted(), 2);
        let expected = [Event::Ping, Event::Ping, Event::Call];
        assert_eq!(server.events(0), expected);
        assert!(is_ready(&channel, &address(0)));
    }
}

#[tokio::test(start_paused = true)]
async fn pings_may_be_off() {
    let server = Server::new(Answer::Ok);
    let settings = |builder: BalancedChannelBuilder| builder.http2_keep_alive_interval(None);
    let channel = channel(&[&server], settings).await;
    sleep(24 * HOUR).await;
    call(&channel).await.unwrap();
    assert_eq!(server.events(0), [Event::Call]);
}

#[tokio::test(start_paused = true)]
async fn pings_while_idle_may_be_off() {
    let server = Server::new(Answer::Ok);
    let settings = |builder: BalancedChannelBuilder| builder.keep_alive_while_idle(false);
    let channel = channel(&[&server], settings).await;
    sleep(24 * HOUR).await;
    assert_eq!(server.events(0), []);
    call(&channel).await.unwrap();
    assert_eq!(server.events(0), [Event::Ping, Event::Call]);
}
