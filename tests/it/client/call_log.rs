//! The debug log of a client's calls (`enable_grpc_debug_log`).
//!
//! Each of these tests runs in a child process, see [`Log`].

use std::time::Duration;

use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::raw::{self, RawServer};
use crate::support::{TestResult, config};
use goo_etcd::Client;
use goo_etcd::testing::Etcd;

#[tokio::test]
async fn each_call_is_one_event_without_keys_or_values() -> TestResult {
    if !isolate("client::call_log::each_call_is_one_event_without_keys_or_values").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::client::transport::call_log=debug");
    let etcd = Etcd::start().await?;
    for enabled in [false, true] {
        let mut config = config(vec![etcd.endpoint()]);
        config.enable_grpc_debug_log = enabled;
        let client = Client::new("main", config).await?;
        client.put("the-key", "the-value", None).await?;
        client.get("the-key", None).await?;
        client.revoke(7).await.unwrap_err();
        drop(client.watch("the-key", None).await?);
        client.status(etcd.endpoint()).await?;
        client.close().await?;
        let written = log.text();
        if !enabled {
            assert_eq!(written, "");
            continue;
        }
        let member = etcd.endpoint();
        for (method, status) in [
            ("etcdserverpb.KV/Put", "Ok"),
            ("etcdserverpb.KV/Range", "Ok"),
            ("etcdserverpb.Lease/LeaseRevoke", "NotFound"),
            ("etcdserverpb.Maintenance/Status", "Ok"),
        ] {
            let line = log.last(method);
            for part in [status, &member, "time="] {
                assert!(line.contains(part), "{part} in {line}");
            }
        }
        assert_eq!(written.matches("KV/Put").count(), 1, "{written}");
        assert_logged(&log.last("etcdserverpb.Watch/Watch"), &member, "dropped");
        assert!(
            !written.contains("the-key") && !written.contains("the-value"),
            "{written}"
        );
    }
    Ok(())
}

fn assert_logged(line: &str, member: &str, status: &str) {
    for part in [
        format!("member=\"{member}\""),
        format!("status=\"{status}\""),
    ] {
        assert!(line.contains(&part), "{part} in {line}");
    }
}

#[tokio::test]
async fn unanswered_call_names_the_member_asked() -> TestResult {
    if !isolate("client::call_log::unanswered_call_names_the_member_asked").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::client::transport::call_log=debug");
    let etcd = Etcd::start().await?;
    let mut config = config(vec![etcd.endpoint()]);
    config.enable_grpc_debug_log = true;
    config.request_timeout = Duration::from_millis(500);
    config.max_call_send_msg_size = 1000;
    let client = Client::new("main", config).await?;

    // A request over the limit is refused before any member is asked.
    client.put("key", vec![7; 1001], None).await.unwrap_err();
    assert_logged(&log.last("KV/Put"), "none", "OutOfRange");

    // The paused member does not respond in time.
    etcd.pause().await?;
    client.put("key", "1", None).await.unwrap_err();
    assert_logged(&log.last("KV/Put"), &etcd.endpoint(), "dropped");
    client.get("key", None).await.unwrap_err();
    assert_logged(&log.last("KV/Range"), &etcd.endpoint(), "dropped");
    Ok(())
}

#[tokio::test]
async fn hedged_read_names_the_member_that_answered() -> TestResult {
    if !isolate("client::call_log::hedged_read_names_the_member_that_answered").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::client::transport::call_log=debug");
    // After 1 s a read is also sent to another member. This one responds later than that.
    let slow = RawServer::start(|request, respond| async move {
        if request.uri().path().ends_with("/Range") {
            tokio::time::sleep(Duration::from_millis(1_200)).await;
        }
        raw::respond_ok(respond);
    })
    .await;
    let hangs = RawServer::start(|request, respond| async move {
        if request.uri().path().ends_with("/Range") {
            return std::future::pending().await;
        }
        raw::respond_ok(respond);
    })
    .await;
    let endpoints = vec![slow.address().to_owned(), hangs.address().to_owned()];
    let mut config = config(endpoints);
    config.enable_grpc_debug_log = true;
    config.request_timeout = Duration::from_secs(5);
    let client = Client::new("main", config).await?;
    for _ in 0..6 {
        client.get("key", None).await?;
        assert_logged(&log.last("KV/Range"), slow.address(), "Ok");
    }
    Ok(())
}
