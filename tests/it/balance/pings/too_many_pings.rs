//! gRFC A8: the server permits fewer pings than usual, and says so with code and debug data.

use std::sync::atomic::Ordering;

use goo_etcd::balance::BalancedChannelBuilder;
use tokio::time::sleep;

use super::server::{Answer, Server};
use super::{HOUR, MINUTE, address, channel};
use crate::support::balanced::{call, is_ready, status_of};
use crate::support::frames::{ENHANCE_YOUR_CALM, NO_ERROR};
use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::wait_until;

/// The pauses between the pings of an idle connection after a GOAWAY, and `last_error`.
async fn after_go_away(code: u32, debug_data: &'static str) -> (Vec<u64>, String) {
    let server = Server::new(Answer::GoAway(code, debug_data));
    // The second endpoint takes the calls while the first one is not connected.
    let other = Server::new(Answer::Ok);
    let channel = channel(&[&server, &other], |builder| builder).await;
    server.is_full.store(true, Ordering::SeqCst);
    while server.calls() == 0 {
        call(&channel).await.unwrap();
    }
    let last_error = || status_of(&channel, &address(0)).unwrap().last_error;
    wait_until("the connection is lost", async || last_error().is_some()).await;
    let error = last_error().unwrap();
    server.answer(Answer::Ok);
    server.is_full.store(false, Ordering::SeqCst);
    sleep(HOUR).await;
    assert_eq!(server.accepted(), 2);
    assert_eq!(other.ping_pauses(0).last(), Some(&10));
    // The advice stays, although the endpoint is ready again.
    assert!(is_ready(&channel, &address(0)));
    let stays = last_error().is_some_and(|stays| stays == error);
    assert_eq!(stays, error.contains("keep_alive_interval"), "{error}");
    (server.ping_pauses(1), error)
}

#[tokio::test(start_paused = true)]
async fn interval_doubles_for_this_endpoint() {
    let (pauses, error) = after_go_away(ENHANCE_YOUR_CALM, "too_many_pings").await;
    assert_eq!(pauses, [20]);
    assert!(
        error.contains("GOAWAY ENHANCE_YOUR_CALM: too_many_pings"),
        "{error}"
    );
    assert!(error.contains("http2_keep_alive_interval"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn code_or_debug_data_alone_change_nothing() {
    let (pauses, error) = after_go_away(ENHANCE_YOUR_CALM, "too much").await;
    assert_eq!(pauses, [10]);
    assert!(!error.contains("http2_keep_alive_interval"), "{error}");
    let (pauses, error) = after_go_away(NO_ERROR, "too_many_pings").await;
    assert_eq!(pauses, [10]);
    assert!(!error.contains("http2_keep_alive_interval"), "{error}");
}

#[tokio::test]
async fn each_doubling_is_logged_once() {
    if !isolate("balance::pings::too_many_pings::each_doubling_is_logged_once").await {
        return;
    }
    tokio::time::pause();
    let (log, _scope) = Log::start("goo_etcd=warn");
    let answer = Answer::GoAway(ENHANCE_YOUR_CALM, "too_many_pings");
    let server = Server::new(answer);
    let settings = |builder: BalancedChannelBuilder| builder.connections_per_endpoint(2);
    let channel = channel(&[&server], settings).await;
    for _ in 0..2 {
        call(&channel).await.unwrap();
    }
    sleep(MINUTE).await;
    let text = log.text();
    let warnings: Vec<_> = text
        .lines()
        .filter(|line| line.contains("too many pings"))
        .collect();
    assert!(!warnings.is_empty(), "{text}");
    for interval in ["interval=20s", "interval=40s"] {
        let count = warnings
            .iter()
            .filter(|line| line.contains(interval))
            .count();
        assert!(count <= 1, "{text}");
    }
    assert!(warnings[0].contains("s0:1"), "{text}");
}
