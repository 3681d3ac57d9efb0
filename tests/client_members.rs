//! Which members a client uses: auto sync, many endpoints, dead endpoints.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error};
use support::raw::{self, RawServer};
use support::{PATIENCE, TestResult, calls, eventually, soon};
use tokio::time::timeout;
use tracing_subscriber::fmt::MakeWriter;

fn config(endpoints: Vec<String>) -> Config {
    let mut config = Config::default();
    config.endpoints = endpoints;
    config.dial_timeout = PATIENCE;
    config
}

fn synced(endpoints: Vec<String>) -> Config {
    let mut config = config(endpoints);
    config.auto_sync = true;
    config.auto_sync_interval = Duration::from_millis(200);
    config
}

async fn reads(etcd: &Etcd) -> TestResult<u64> {
    calls(etcd, "Range").await
}

async fn is_used(client: &Client, member: &Etcd) -> bool {
    let before = reads(member).await.unwrap();
    for _ in 0..20 {
        client.get("key", None).await.unwrap();
    }
    reads(member).await.unwrap() > before
}

#[tokio::test]
async fn given_auto_sync_then_members_are_used_as_they_come_and_not_after_they_went() -> TestResult
{
    let (log, _scope) = Log::begin("goo_etcd::client::transport::members=info");
    let cluster = EtcdCluster::start().await?;
    // It is told of one, behind a proxy, and finds the others.
    let proxy = Proxy::start(cluster.member(0).endpoint()).await?;
    let client = Client::new("main", synced(vec![proxy.endpoint()])).await?;
    for member in cluster.members() {
        eventually("a member is found", async || is_used(&client, member).await).await;
    }
    eventually("its own address is used", async || proxy.connections() == 0).await;
    // The proxy is none of them, so not one call more goes there, though it would be answered.
    let sent = proxy.bytes_up();
    for _ in 0..200 {
        client.get("key", None).await?;
    }
    assert_eq!((proxy.bytes_up(), proxy.connections()), (sent, 0));

    // One leaves.
    let list = client.member_list().await?;
    let gone = cluster.member(2);
    let id = list
        .members()
        .iter()
        .find(|m| m.name() == gone.name())
        .ok_or("listed")?
        .id();
    // etcd refuses while it does not see its members connected for long enough.
    eventually("it is removed", async || {
        match client.member_remove(id).await {
            Ok(_) => true,
            // It may have been asked itself, and be gone before it answers.
            Err(error) => error.code() == Some(tonic::Code::NotFound),
        }
    })
    .await;
    // Each member lists what it knows, and one may know it later.
    eventually("it is not listed", async || {
        let list = client.member_list().await.unwrap();
        list.members().iter().all(|member| member.id() != id)
    })
    .await;
    eventually("it is known to be gone", async || {
        let last = log.last("etcd's members have changed");
        !last.contains(&gone.endpoint())
    })
    .await;
    // From then on all calls are to the others, as these count them.
    let others = [cluster.member(0), cluster.member(1)];
    let before = reads(others[0]).await? + reads(others[1]).await?;
    for _ in 0..200 {
        client.get("key", None).await?;
    }
    let there = reads(others[0]).await? + reads(others[1]).await? - before;
    assert!(there >= 200, "{there} of 200");
    // Nor is it tried to be reached any more.
    gone.kill().await?;
    let there = tokio::net::TcpListener::bind(gone.endpoint()).await?;
    let reading = async {
        loop {
            client.get("key", None).await.unwrap();
        }
    };
    let tried = tokio::select! {
        tried = timeout(Duration::from_secs(3), there.accept()) => tried,
        () = reading => unreachable!(),
    };
    assert!(tried.is_err(), "{tried:?}");
    drop(there);

    // It comes back under another id, with nothing: used again, once it has caught up.
    cluster.replace(2).await?;
    eventually("it is used again", async || is_used(&client, gone).await).await;
    Ok(())
}

#[tokio::test]
async fn given_an_answer_without_client_urls_then_nothing_changes() -> TestResult {
    let (log, _scope) = Log::begin("goo_etcd::client::transport::members=debug");
    // As etcd behind an address translation is often set up: it does not tell where it is.
    let cluster = Etcd::builder()
        .args(["--advertise-client-urls", "https://127.0.0.1:1"])
        .start_cluster(3)
        .await?;
    let client = Client::new("main", synced(cluster.endpoints())).await?;
    // And one that has not started tells nothing at all. etcd refuses while it does not see its members
    // connected for long enough.
    eventually("it is added", async || {
        client.member_add(["http://127.0.0.1:1"]).await.is_ok()
    })
    .await;
    eventually("every member lists it", async || {
        let mut listed = Vec::new();
        for member in cluster.members() {
            let list = member.client().await.unwrap().member_list().await.unwrap();
            listed.push(
                list.members()
                    .iter()
                    .any(|member| member.name().is_empty() && member.client_urls().is_empty()),
            );
        }
        listed.iter().all(|listed| *listed)
    })
    .await;

    let lists = async || -> TestResult<u64> {
        let mut lists = 0;
        for member in cluster.members() {
            lists += calls(member, "MemberList").await?;
        }
        Ok(lists)
    };
    let before = lists().await?;
    eventually("it is read several times", async || {
        lists().await.unwrap() >= before + 3
    })
    .await;
    for _ in 0..20 {
        client.put("key", "1", None).await?;
    }
    log.last("etcd lists no member with a client URL");
    let written = log.written();
    assert!(!written.contains("members have changed"), "{written}");
    for member in cluster.members() {
        eventually("each is used", async || is_used(&client, member).await).await;
    }
    Ok(())
}

#[tokio::test]
async fn given_a_learner_then_it_is_not_asked_before_it_is_promoted() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = Client::new("main", synced(cluster.endpoints())).await?;
    // It will never start, so it has no name, no URL, and cannot be promoted.
    // etcd refuses while it does not see its members connected for long enough.
    let mut id = 0;
    eventually("it is added", async || {
        let added = client.member_add_as_learner(["http://127.0.0.1:1"]).await;
        id = added
            .ok()
            .and_then(|added| added.member().map(|m| m.id()))
            .unwrap_or(0);
        id != 0
    })
    .await;
    let refused = client.member_promote(id).await.unwrap_err().to_string();
    assert!(
        refused.contains(&format!("promote member {id:x}")),
        "{refused}"
    );
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..50 {
        client.get("key", None).await?;
    }
    client.member_remove(id).await?;
    Ok(())
}

#[tokio::test]
async fn given_a_learner_that_has_caught_up_then_it_is_promoted_and_used() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = Client::new("main", synced(cluster.endpoints())).await?;
    cluster.replace_with_learner(2).await?;
    let learner = cluster.member(2);
    let list = client.member_list().await?;
    let listed = list.members().iter().find(|m| m.name() == learner.name());
    let listed = listed.ok_or("listed")?;
    assert!(listed.is_learner());
    eventually("it is not asked", async || !is_used(&client, learner).await).await;
    assert!(!is_used(&client, learner).await);
    // It must have caught up, as etcd sees it.
    eventually("it is promoted", async || {
        client.member_promote(listed.id()).await.is_ok()
    })
    .await;
    // Each member lists what it knows, and one may know it later.
    eventually("it is listed as one that votes", async || {
        let list = client.member_list().await.unwrap();
        list.members().iter().all(|member| !member.is_learner())
    })
    .await;
    eventually("it is used", async || is_used(&client, learner).await).await;
    Ok(())
}

#[tokio::test]
async fn given_a_hundred_endpoints_of_which_one_lives_then_no_call_fails() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut endpoints: Vec<_> = (1..100).map(|port| format!("127.0.0.1:{port}")).collect();
    endpoints.insert(50, etcd.endpoint());
    let client = Client::new("main", config(endpoints)).await?;
    for n in 0..200 {
        client.put("key", n.to_string(), None).await?;
        assert_eq!(client.get("key", None).await?.count(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn given_nothing_listening_then_new_fails_in_time_with_each_endpoint_and_what_it_met()
-> TestResult {
    // Never accepted from: it hangs after the TCP handshake.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let hangs = silent.local_addr()?.to_string();
    let mut config = config(vec!["127.0.0.1:1".to_owned(), hangs.clone()]);
    config.dial_timeout = Duration::from_secs(2);
    let begun = tokio::time::Instant::now();
    let error = soon("it fails", Client::new("main", config))
        .await
        .unwrap_err();
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    let Error::Unreachable {
        endpoints, reason, ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(endpoints, ["127.0.0.1:1", hangs.as_str()]);
    assert!(
        reason.contains("127.0.0.1:1: cannot connect") && reason.contains("refused"),
        "{reason}"
    );
    assert!(reason.contains(&hangs), "{reason}");
    Ok(())
}

/// What is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Of what the filter says, from now on in this thread.
    fn begin(filter: &str) -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(log.clone())
            .with_ansi(false)
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn written(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// The latest line with this in it.
    fn last(&self, part: &str) -> String {
        let written = self.written();
        let mut lines = written.lines().filter(|line| line.contains(part));
        let line = lines.next_back();
        line.unwrap_or_else(|| panic!("{part} in {written}"))
            .to_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test]
async fn given_the_debug_log_then_each_call_is_one_event_without_keys_or_values() -> TestResult {
    let (log, _scope) = Log::begin("goo_etcd::client::transport::call_log=debug");
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
        let written = log.written();
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
        says(&log.last("etcdserverpb.Watch/Watch"), &member, "dropped");
        assert!(
            !written.contains("the-key") && !written.contains("the-value"),
            "{written}"
        );
    }
    Ok(())
}

fn says(line: &str, member: &str, status: &str) {
    for part in [
        format!("member=\"{member}\""),
        format!("status=\"{status}\""),
    ] {
        assert!(line.contains(&part), "{part} in {line}");
    }
}

#[tokio::test]
async fn given_the_debug_log_then_a_call_that_is_not_answered_says_whom_it_was_asked_of()
-> TestResult {
    let (log, _scope) = Log::begin("goo_etcd::client::transport::call_log=debug");
    let etcd = Etcd::start().await?;
    let mut config = config(vec![etcd.endpoint()]);
    config.enable_grpc_debug_log = true;
    config.request_timeout = Duration::from_millis(500);
    config.max_call_send_msg_size = 1000;
    let client = Client::new("main", config).await?;

    // It asks nobody.
    client.put("key", vec![7; 1001], None).await.unwrap_err();
    says(&log.last("KV/Put"), "none", "OutOfRange");

    // It runs out of time.
    etcd.pause().await?;
    client.put("key", "1", None).await.unwrap_err();
    says(&log.last("KV/Put"), &etcd.endpoint(), "dropped");
    client.get("key", None).await.unwrap_err();
    says(&log.last("KV/Range"), &etcd.endpoint(), "dropped");
    Ok(())
}

#[tokio::test]
async fn given_the_debug_log_then_a_read_names_the_member_that_answered_it_and_not_the_one_asked_last()
-> TestResult {
    let (log, _scope) = Log::begin("goo_etcd::client::transport::call_log=debug");
    // A read is sent to another beside the first after 400 ms, that is before this one answers.
    let slow = RawServer::start(|request, respond| async move {
        if request.uri().path().ends_with("/Range") {
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
        raw::answer(respond);
    })
    .await;
    let hangs = RawServer::start(|request, respond| async move {
        if request.uri().path().ends_with("/Range") {
            return std::future::pending().await;
        }
        raw::answer(respond);
    })
    .await;
    let endpoints = vec![slow.address().to_owned(), hangs.address().to_owned()];
    let mut config = config(endpoints);
    config.enable_grpc_debug_log = true;
    config.request_timeout = Duration::from_secs(2);
    let client = Client::new("main", config).await?;
    for _ in 0..6 {
        client.get("key", None).await?;
        says(&log.last("KV/Range"), slow.address(), "Ok");
    }
    Ok(())
}
