//! Authentication: expiring tokens, wrong passwords, missing permissions.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::raw::{self, RawServer};
use crate::support::users::{enable_auth, user};
use crate::support::{PATIENCE, TestResult, wait_for, wait_until};
use futures::StreamExt;
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Error, PutOptions, WatchOptions};
use http::Response;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::Code;

/// Where the user `app` may read and write.
const APP: &str = "app/";

/// A cluster whose tokens expire after 5 s without use.
async fn start_cluster_with_short_tokens() -> TestResult<EtcdCluster> {
    let cluster = Etcd::builder()
        .args(["--auth-token-ttl", "5"])
        .start_cluster(3)
        .await?;
    enable_auth(cluster.member(0), APP).await?;
    Ok(cluster)
}

/// The number of authentications that a member has received.
async fn authentications(etcd: &Etcd) -> TestResult<u64> {
    crate::support::call_count(etcd, "Authenticate").await
}

/// The number of authentications on all members.
async fn all_authentications(cluster: &EtcdCluster) -> TestResult<u64> {
    let mut sum = 0;
    for member in cluster.members() {
        sum += authentications(member).await?;
    }
    Ok(sum)
}

/// Watches on `app/`, each polled in its own task.
struct PolledWatches {
    tasks: JoinSet<()>,
    seen: Vec<Arc<AtomicUsize>>,
}

impl PolledWatches {
    async fn start(client: &Client, watches: usize) -> TestResult<Self> {
        let mut tasks = JoinSet::new();
        let mut seen = Vec::new();
        for _ in 0..watches {
            let prefix = WatchOptions::new().with_prefix();
            let mut watch = client.watch("app/", prefix).await?;
            let events = Arc::new(AtomicUsize::new(0));
            seen.push(Arc::clone(&events));
            tasks.spawn(async move {
                while let Some(response) = watch.next().await {
                    let more = response.unwrap().events().len();
                    events.fetch_add(more, Ordering::Relaxed);
                }
            });
        }
        Ok(Self { tasks, seen })
    }

    /// Puts a key and waits until each watch has yielded the event.
    async fn assert_all_see(mut self, client: &Client, key: &str) -> TestResult {
        let before: Vec<_> = self
            .seen
            .iter()
            .map(|n| n.load(Ordering::Relaxed))
            .collect();
        client.put(key, "seen", None).await?;
        wait_until("every watch yields the event", async || {
            let mut both = self.seen.iter().zip(&before);
            both.all(|(seen, before)| seen.load(Ordering::Relaxed) > *before)
        })
        .await;
        // No watch has failed.
        assert!(self.tasks.try_join_next().is_none());
        Ok(())
    }
}

#[tokio::test]
async fn expired_token_is_renewed_once_per_member() -> TestResult {
    let cluster = start_cluster_with_short_tokens().await?;
    let client = Client::new("app", user("app", "hunter2", cluster.endpoints())).await?;
    // Counted from the first token on, so that authentications during the idle time count as well.
    let before = all_authentications(&cluster).await?;
    let watches = PolledWatches::start(&client, 50).await?;
    let mut watch = client
        .watch("app/", WatchOptions::new().with_prefix())
        .await?;
    let lease = client.grant(6).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    let on_lease = PutOptions::new().with_lease(lease);
    client.put("app/kept", "1", on_lease).await?;

    sleep(Duration::from_secs(15)).await;
    // Many concurrent calls find the token expired on each member.
    let puts = (0..64).map(|n| client.put(format!("app/{n}"), "2", None));
    futures::future::try_join_all(puts).await?;
    let gets = (0..64).map(|n| client.get(format!("app/{n}"), None));
    for got in futures::future::try_join_all(gets).await? {
        assert_eq!(got.count(), 1);
    }
    assert_eq!(client.get("app/kept", None).await?.count(), 1);
    let mut seen = 0;
    while seen < 65 {
        seen += wait_for("an event", watch.next())
            .await
            .unwrap()?
            .events()
            .len();
    }
    assert_eq!(kept.next().await.unwrap()?.id(), lease);
    // New streams work on every member as well.
    for _ in 0..6 {
        drop(client.watch("app/a", None).await?);
        client.keep_alive_once(lease).await?;
    }
    watches.assert_all_see(&client, "app/a").await?;
    let more = all_authentications(&cluster).await? - before;
    assert!((1..=6).contains(&more), "{more} authentications");
    Ok(())
}

#[tokio::test]
async fn moved_watches_renew_the_token_once() -> TestResult {
    let cluster = start_cluster_with_short_tokens().await?;
    // At first only one member is reachable, so it has all watches.
    let mut proxies = Vec::new();
    for endpoint in cluster.endpoints() {
        proxies.push(Proxy::start(endpoint).await?);
    }
    let [first, second, third] = &proxies[..] else {
        unreachable!();
    };
    second.cut().await;
    third.cut().await;
    let endpoints = proxies.iter().map(Proxy::endpoint);
    let client = Client::new("app", user("app", "hunter2", endpoints)).await?;
    let watches = PolledWatches::start(&client, 50).await?;
    // Calls keep the token on the second member, but not on the third.
    second.restore().await?;
    for _ in 0..70 {
        client.get("app/a", None).await?;
        sleep(Duration::from_millis(100)).await;
    }
    assert!(second.connections() > 0);
    let before = all_authentications(&cluster).await?;
    third.restore().await?;
    wait_until("the third member is connected", async || {
        third.connections() > 0
    })
    .await;
    sleep(Duration::from_millis(200)).await;
    first.cut().await;

    watches.assert_all_see(&client, "app/a").await?;
    let more = all_authentications(&cluster).await? - before;
    assert!((1..=2).contains(&more), "{more} authentications");
    Ok(())
}

/// The calls that a server has received.
#[derive(Default)]
struct Calls {
    authentications: AtomicUsize,
    streams: AtomicUsize,
}

/// A server that issues the token "t", but refuses it on the first streams, as etcd 3.6 does.
async fn etcd_that_learns_tokens_slowly(calls: Arc<Calls>) -> RawServer {
    const REFUSALS: usize = 4;
    RawServer::start(move |request, mut respond| {
        let calls = Arc::clone(&calls);
        async move {
            let path = request.uri().path();
            let is_watch = path.ends_with("/Watch");
            if path.ends_with("/Authenticate") {
                calls.authentications.fetch_add(1, Ordering::Relaxed);
                return raw::respond_with(respond, &[0x12, 1, b't']);
            }
            if !is_watch && !path.ends_with("/LeaseKeepAlive") {
                return raw::respond_ok(respond);
            }
            let is_refused = calls.streams.fetch_add(1, Ordering::Relaxed) < REFUSALS;
            const REASON: &str = "etcdserver: invalid auth token";
            match (is_refused, is_watch) {
                // `created` and `canceled` with a reason.
                (true, true) => {
                    let reason = [&[0x18, 1, 0x20, 1, 0x32, 30], REASON.as_bytes()].concat();
                    raw::respond_with(respond, &reason);
                }
                (true, false) => {
                    let head = Response::builder()
                        .header("content-type", "application/grpc")
                        .header("grpc-status", "16")
                        .header("grpc-message", REASON);
                    respond.send_response(head.body(()).unwrap(), true).ok();
                }
                // `created`.
                (false, true) => raw::respond_with(respond, &[0x18, 1]),
                // The lease 7 has a TTL of 60 s.
                (false, false) => raw::respond_with(respond, &[0x10, 7, 0x18, 60]),
            }
        }
    })
    .await
}

#[tokio::test]
async fn token_that_spreads_slowly_is_not_renewed() -> TestResult {
    for is_watch in [true, false] {
        let calls = Arc::new(Calls::default());
        let etcd = etcd_that_learns_tokens_slowly(Arc::clone(&calls)).await;
        let started = Instant::now();
        let client = Client::new("app", user("app", "hunter2", [etcd.address()])).await?;
        if is_watch {
            drop(client.watch("app/a", None).await?);
        } else {
            client.keep_alive_once(7).await?;
        }
        // A token is new for 2 s.
        let limit = 1 + started.elapsed().as_secs() as usize / 2;
        let authentications = calls.authentications.load(Ordering::Relaxed);
        assert!(authentications <= limit, "{authentications}, {is_watch}");
        // A machine that stands still for a second makes a renewal open one more.
        let streams = calls.streams.load(Ordering::Relaxed);
        assert!(streams >= 5, "{streams}, {is_watch}");
    }
    Ok(())
}

#[tokio::test]
async fn wrong_password_fails_after_one_attempt() -> TestResult {
    let etcd = Etcd::start().await?;
    enable_auth(&etcd, APP).await?;
    let before = authentications(&etcd).await?;
    let mut config = user("app", "hunter3", [etcd.endpoint()]);
    // Longer than the test waits, so that the timeout cannot end the call.
    config.dial_timeout = PATIENCE * 10;
    let result = wait_for("the error", Client::new("wrong", config)).await;
    let error = result.unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("authenticate as \"app\""), "{text}");
    assert!(text.contains("authentication failed"), "{text}");
    assert!(!text.contains("hunter3"), "{text}");
    assert_eq!(authentications(&etcd).await? - before, 1);
    Ok(())
}

#[tokio::test]
async fn missing_permission_refuses_each_call_once() -> TestResult {
    let etcd = Etcd::start().await?;
    enable_auth(&etcd, APP).await?;
    let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
    let before = authentications(&etcd).await?;
    let refusals = [
        client.put("other", "1", None).await.unwrap_err(),
        client.get("other", None).await.unwrap_err(),
        client.delete("other", None).await.unwrap_err(),
        client.watch("other", None).await.unwrap_err(),
        client
            .txn()
            .and_then([goo_etcd::TxnOp::put("other", "1", None)])
            .commit()
            .await
            .unwrap_err(),
    ];
    for refused in refusals {
        assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
        assert!(matches!(refused, Error::Rpc { .. }), "{refused:?}");
    }
    assert_eq!(authentications(&etcd).await?, before);
    // Permitted calls still work.
    client.put("app/a", "1", None).await?;
    client.ping().await?;
    // Some releases of etcd (3.5.30 is one) show the status only to root.
    if let Err(refused) = client.status(etcd.endpoint()).await {
        assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    }
    Ok(())
}

#[tokio::test]
async fn lazy_client_authenticates_once_for_its_first_calls() -> TestResult {
    let etcd = Etcd::start().await?;
    enable_auth(&etcd, APP).await?;
    let before = authentications(&etcd).await?;
    let client = Client::connect_lazy("app", user("app", "hunter2", [etcd.endpoint()]))?;
    assert_eq!(authentications(&etcd).await?, before);
    let puts = (0..64).map(|n| client.put(format!("app/{n}"), "1", None));
    futures::future::try_join_all(puts).await?;
    let mut watch = client
        .watch("app/", WatchOptions::new().with_prefix())
        .await?;
    client.put("app/a", "2", None).await?;
    assert_eq!(
        wait_for("an event", watch.next())
            .await
            .unwrap()?
            .events()
            .len(),
        1
    );
    // The underlying client is the same user.
    assert_eq!(client.client().get("app/a", None).await?.count(), 1);
    let refused = client.put("other", "1", None).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    assert_eq!(authentications(&etcd).await? - before, 1);
    Ok(())
}

#[tokio::test]
async fn lazy_client_with_a_wrong_password_fails_each_call() -> TestResult {
    let etcd = Etcd::start().await?;
    enable_auth(&etcd, APP).await?;
    let before = authentications(&etcd).await?;
    let client = Client::connect_lazy("wrong", user("app", "hunter3", [etcd.endpoint()]))?;
    for done in 1..4 {
        let error = client.get("app/a", None).await.unwrap_err();
        let text = format!("{error} {error:?} {client:?}");
        assert!(text.contains("authenticate as \"app\""), "{text}");
        assert!(text.contains("authentication failed"), "{text}");
        assert!(!text.contains("hunter3"), "{text}");
        assert_eq!(authentications(&etcd).await? - before, done);
    }
    Ok(())
}

#[tokio::test]
async fn lazy_client_works_without_authentication() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::connect_lazy("app", user("app", "hunter2", [etcd.endpoint()]))?;
    client.put("other", "1", None).await?;
    assert_eq!(client.get("other", None).await?.count(), 1);
    Ok(())
}

/// A cache file must not show instances that etcd refuses to list.
#[tokio::test]
async fn cache_does_not_bypass_permissions() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = tempfile::TempDir::new()?;
    let open = async |client: &Client| {
        let builder = goo_etcd::Directory::builder(client, "greeter");
        builder.cache_dir(folder.path()).watch().await
    };
    let client = crate::support::connect(etcd.endpoint()).await;
    client
        .put(crate::support::key("a"), crate::support::value("h:1"), None)
        .await?;
    let directory = open(&client).await?;
    crate::support::wait_until("the cache is written", async || {
        std::fs::read_dir(folder.path()).is_ok_and(|files| files.count() == 1)
    })
    .await;
    drop((directory, client));
    enable_auth(&etcd, APP).await?;
    // A client of the same name finds the file.
    let client = Client::connect_lazy("test", user("app", "hunter2", [etcd.endpoint()]))?;
    // The first call authenticates, which on a busy machine may take longer than a cached directory
    // waits for its list.
    client.ping().await?;
    let refused = open(&client).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    Ok(())
}

/// etcd refuses a JWT that is older than the latest change of users and roles.
#[tokio::test]
async fn outdated_jwt_is_renewed_once() -> TestResult {
    let secret = tempfile::NamedTempFile::new()?;
    std::fs::write(&secret, "a key of HMAC may be any bytes, as these")?;
    let key = secret.path().display();
    let etcd = Etcd::builder()
        .args([
            "--auth-token".to_owned(),
            format!("jwt,priv-key={key},sign-method=HS256,ttl=10m"),
        ])
        .start()
        .await?;
    enable_auth(&etcd, APP).await?;
    let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
    client.put("app/a", "1", None).await?;
    let prefix = WatchOptions::new().with_prefix();
    let mut watch = client.watch("app/", prefix).await?;
    let as_root = etcd_client::ConnectOptions::new().with_user("root", "root's");
    for n in 0..3 {
        let root = etcd_client::Client::connect([etcd.endpoint()], Some(as_root.clone())).await?;
        let user = format!("other-{n}");
        root.auth_client().user_add(user, "hunter3", None).await?;
        let before = authentications(&etcd).await?;
        match n {
            0 => {
                let puts = (0..16).map(|n| client.put(format!("app/{n}"), "2", None));
                futures::future::try_join_all(puts).await?;
            }
            1 => assert_eq!(client.get("app/a", None).await?.count(), 1),
            _ => drop(client.watch("app/a", None).await?),
        }
        assert_eq!(authentications(&etcd).await? - before, 1, "{n}");
    }
    let mut seen = 0;
    while seen < 16 {
        let response = wait_for("an event", watch.next()).await.unwrap()?;
        seen += response.events().len();
    }
    Ok(())
}

#[tokio::test]
async fn token_expiry_between_renewals_keeps_the_lease() -> TestResult {
    let all = crate::support::etcd_versions()
        .into_iter()
        .map(|builder| async {
            let etcd = builder.args(["--auth-token-ttl", "2"]).start().await?;
            enable_auth(&etcd, APP).await?;
            let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
            // The lease is renewed every 4 s; no other call keeps the token alive.
            let lease = client.grant(12).await?.id();
            let mut kept = client.keep_alive(lease).await?;
            for _ in 0..4 {
                let response = wait_for("a renewal", kept.next()).await.unwrap()?;
                assert_eq!(response.ttl(), 12);
            }
            drop(kept);
            // A lock that is not renewed would be lost.
            let lock = client.lock("app/lock", Duration::from_secs(12)).await?;
            sleep(Duration::from_secs(14)).await;
            assert!(lock.is_held());
            lock.unlock().await?;
            TestResult::Ok(())
        });
    futures::future::try_join_all(all).await?;
    Ok(())
}

#[tokio::test]
async fn authentication_may_be_enabled_later() -> TestResult {
    let all = crate::support::etcd_versions()
        .into_iter()
        .map(|builder| async {
            let etcd = builder.start().await?;
            let config = user("app", "hunter2", [etcd.endpoint()]);
            let early = Client::new("early", config.clone()).await?;
            let lazy = Client::connect_lazy("lazy", config)?;
            let mut watches = Vec::new();
            let mut kept = Vec::new();
            for client in [&early, &lazy] {
                client.put("app/a", "0", None).await?;
                let prefix = WatchOptions::new().with_prefix();
                watches.push(client.watch("app/", prefix).await?);
                let lease = client.grant(5).await?.id();
                let on_lease = PutOptions::new().with_lease(lease);
                let key = format!("app/of-{}", client.name());
                client.put(key, "", on_lease).await?;
                kept.push(client.keep_alive(lease).await?);
            }
            enable_auth(&etcd, APP).await?;
            for client in [&early, &lazy] {
                client.put("app/b", client.name(), None).await?;
                assert_eq!(client.get("app/b", None).await?.count(), 1);
                drop(client.watch("app/a", None).await?);
                let refused = client.put("other", "", None).await.unwrap_err();
                assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
            }
            // Longer than the TTL of the leases.
            sleep(Duration::from_secs(8)).await;
            for client in [&early, &lazy] {
                let key = format!("app/of-{}", client.name());
                assert_eq!(client.get(key, None).await?.count(), 1);
            }
            for kept in &mut kept {
                wait_for("a renewal", kept.next()).await.unwrap()?;
            }
            for watch in &mut watches {
                let mut last = String::new();
                while last != "lazy" {
                    let response = wait_for("an event", watch.next()).await.unwrap()?;
                    let event = response.events().last().ok_or("an event")?;
                    last = event.kv().ok_or("a key")?.value_str()?.to_owned();
                }
            }
            TestResult::Ok(())
        });
    futures::future::try_join_all(all).await?;
    Ok(())
}

#[tokio::test]
async fn watch_of_a_forbidden_range_fails_at_once() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut auth = etcd.client().await?.auth_client();
    auth.role_add("app").await?;
    let permission = etcd_client::Permission::read_write("config");
    auth.role_grant_permission("app", permission).await?;
    auth.user_add("root", "root's", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.user_grant_role("app", "app").await?;
    auth.auth_enable().await?;
    let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
    drop(client.watch("config", None).await?);
    let before = (
        authentications(&etcd).await?,
        crate::support::call_count(&etcd, "Watch").await?,
    );
    let prefix = WatchOptions::new().with_prefix();
    let refused = client.watch("config", prefix).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    assert_eq!(authentications(&etcd).await?, before.0);
    assert_eq!(
        crate::support::call_count(&etcd, "Watch").await? - before.1,
        1
    );
    Ok(())
}

#[tokio::test]
async fn expired_token_and_hung_member_fail_no_read() -> TestResult {
    let cluster = start_cluster_with_short_tokens().await?;
    let mut config = user("app", "hunter2", cluster.endpoints());
    // The election of another leader takes seconds on a busy machine.
    config.request_timeout = PATIENCE;
    let client = Client::new("app", config).await?;
    client.put("app/a", "1", None).await?;
    // Pauses the leader, which stalls its followers, then a follower.
    let leader = cluster.leader().await?;
    for member in [leader, (leader + 1) % 3].map(|member| cluster.member(member)) {
        sleep(Duration::from_secs(8)).await;
        member.pause().await?;
        let gets = (0..32).map(|_| client.get("app/a", None));
        for got in futures::future::join_all(gets).await {
            assert_eq!(got?.count(), 1);
        }
        member.resume()?;
    }
    Ok(())
}
