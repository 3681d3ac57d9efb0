//! The client as a user: tokens that expire, passwords and permissions that are refused.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error, PutOptions, WatchOptions};
use support::{PATIENCE, TestResult, eventually, soon};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tonic::Code;

/// Turns authentication on, with a user `app` who may do what is under `app/`.
async fn secure(etcd: &Etcd) -> TestResult {
    let mut auth = etcd.client().await?.auth_client();
    auth.user_add("root", "root's", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.role_add("app").await?;
    let permission = etcd_client::Permission::read_write("app/").with_prefix();
    auth.role_grant_permission("app", permission).await?;
    auth.user_grant_role("app", "app").await?;
    auth.auth_enable().await?;
    Ok(())
}

/// Tokens that nobody uses are forgotten after 5 s.
async fn cluster_that_forgets() -> TestResult<EtcdCluster> {
    let cluster = Etcd::builder()
        .args(["--auth-token-ttl", "5"])
        .start_cluster(3)
        .await?;
    secure(cluster.member(0)).await?;
    Ok(cluster)
}

fn user(endpoints: Vec<String>, password: &str) -> Config {
    let mut config = Config::default();
    config.endpoints = endpoints;
    config.username = Some("app".to_owned());
    config.password = Some(password.to_owned());
    config.dial_timeout = PATIENCE;
    config
}

/// How often a member has been asked for a token.
async fn authentications(etcd: &Etcd) -> TestResult<u64> {
    support::calls(etcd, "Authenticate").await
}

/// The same on all members.
async fn all_authentications(cluster: &EtcdCluster) -> TestResult<u64> {
    let mut sum = 0;
    for member in cluster.members() {
        sum += authentications(member).await?;
    }
    Ok(sum)
}

/// Watches on what the user may read, each polled in a task of its own.
struct Watched {
    tasks: JoinSet<()>,
    seen: Vec<Arc<AtomicUsize>>,
}

impl Watched {
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

    /// Waits until each has seen one more event, which a put makes.
    async fn all_see(mut self, client: &Client, key: &str) -> TestResult {
        let before: Vec<_> = self
            .seen
            .iter()
            .map(|n| n.load(Ordering::Relaxed))
            .collect();
        client.put(key, "seen", None).await?;
        eventually("every watch sees it", async || {
            let mut both = self.seen.iter().zip(&before);
            both.all(|(seen, before)| seen.load(Ordering::Relaxed) > *before)
        })
        .await;
        // None of them has failed.
        assert!(self.tasks.try_join_next().is_none());
        Ok(())
    }
}

#[tokio::test]
async fn given_a_token_that_expires_while_idle_then_all_goes_on_and_it_is_renewed_once_for_each_member()
-> TestResult {
    let cluster = cluster_that_forgets().await?;
    let client = Client::new("app", user(cluster.endpoints(), "hunter2")).await?;
    // From the first token on: the idle time is no time for a storm either.
    let before = all_authentications(&cluster).await?;
    let watched = Watched::start(&client, 50).await?;
    let mut watch = client
        .watch("app/", WatchOptions::new().with_prefix())
        .await?;
    let lease = client.grant(6).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    let on_lease = PutOptions::new().with_lease(lease);
    client.put("app/kept", "1", on_lease).await?;

    sleep(Duration::from_secs(15)).await;
    // Many at a time find it expired, on each member.
    let puts = (0..64).map(|n| client.put(format!("app/{n}"), "2", None));
    futures::future::try_join_all(puts).await?;
    let gets = (0..64).map(|n| client.get(format!("app/{n}"), None));
    for got in futures::future::try_join_all(gets).await? {
        assert_eq!(got.count(), 1);
    }
    assert_eq!(client.get("app/kept", None).await?.count(), 1);
    let mut seen = 0;
    while seen < 65 {
        seen += soon("an event", watch.next())
            .await
            .unwrap()?
            .events()
            .len();
    }
    assert_eq!(kept.next().await.unwrap()?.id(), lease);
    // New streams as well, whichever member they come to.
    for _ in 0..6 {
        drop(client.watch("app/a", None).await?);
        client.keep_alive_once(lease).await?;
    }
    watched.all_see(&client, "app/a").await?;
    let more = all_authentications(&cluster).await? - before;
    assert!((1..=6).contains(&more), "{more} authentications");
    Ok(())
}

#[tokio::test]
async fn given_fifty_watches_whose_member_dies_when_they_come_to_one_that_forgot_the_token_then_it_is_renewed_once()
-> TestResult {
    let cluster = cluster_that_forgets().await?;
    // At first only one can be reached, and has all the watches.
    let mut proxies = Vec::new();
    for endpoint in cluster.endpoints() {
        proxies.push(Proxy::start(endpoint).await?);
    }
    let [first, second, third] = &proxies[..] else {
        unreachable!();
    };
    second.cut().await;
    third.cut().await;
    let endpoints = proxies.iter().map(Proxy::endpoint).collect();
    let client = Client::new("app", user(endpoints, "hunter2")).await?;
    let watched = Watched::start(&client, 50).await?;
    // The second one is kept in use, and the third forgets the token.
    second.restore().await?;
    for _ in 0..70 {
        client.get("app/a", None).await?;
        sleep(Duration::from_millis(100)).await;
    }
    assert!(second.connections() > 0);
    let before = all_authentications(&cluster).await?;
    third.restore().await?;
    eventually("it is connected", async || third.connections() > 0).await;
    sleep(Duration::from_millis(200)).await;
    first.cut().await;

    watched.all_see(&client, "app/a").await?;
    let more = all_authentications(&cluster).await? - before;
    assert!((1..=2).contains(&more), "{more} authentications");
    Ok(())
}

#[tokio::test]
async fn given_a_wrong_password_then_new_fails_at_once_after_one_try() -> TestResult {
    let etcd = Etcd::start().await?;
    secure(&etcd).await?;
    let before = authentications(&etcd).await?;
    let mut config = user(vec![etcd.endpoint()], "hunter3");
    // Longer than the test waits: it must not be what ends it.
    config.dial_timeout = PATIENCE * 10;
    let refused = soon("it is refused", Client::new("wrong", config)).await;
    let error = refused.unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(text.contains("authenticate as \"app\""), "{text}");
    assert!(text.contains("authentication failed"), "{text}");
    assert!(!text.contains("hunter3"), "{text}");
    assert_eq!(authentications(&etcd).await? - before, 1);
    Ok(())
}

#[tokio::test]
async fn given_a_user_without_permission_then_each_call_is_refused_once() -> TestResult {
    let etcd = Etcd::start().await?;
    secure(&etcd).await?;
    let client = Client::new("app", user(vec![etcd.endpoint()], "hunter2")).await?;
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
    // It goes on with what it may do.
    client.put("app/a", "1", None).await?;
    client.ping().await?;
    // From 3.5.28 on it tells its status only to root.
    if let Err(refused) = client.status(etcd.endpoint()).await {
        assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    }
    Ok(())
}

#[tokio::test]
async fn given_a_client_that_waits_for_nobody_then_its_first_calls_authenticate_once_for_all()
-> TestResult {
    let etcd = Etcd::start().await?;
    secure(&etcd).await?;
    let before = authentications(&etcd).await?;
    let client = Client::connect_lazy("app", user(vec![etcd.endpoint()], "hunter2"))?;
    assert_eq!(authentications(&etcd).await?, before);
    let puts = (0..64).map(|n| client.put(format!("app/{n}"), "1", None));
    futures::future::try_join_all(puts).await?;
    let mut watch = client
        .watch("app/", WatchOptions::new().with_prefix())
        .await?;
    client.put("app/a", "2", None).await?;
    assert_eq!(
        soon("an event", watch.next())
            .await
            .unwrap()?
            .events()
            .len(),
        1
    );
    // The client beneath is the same user.
    assert_eq!(client.client().get("app/a", None).await?.count(), 1);
    let refused = client.put("other", "1", None).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    assert_eq!(authentications(&etcd).await? - before, 1);
    Ok(())
}

#[tokio::test]
async fn given_a_client_that_waits_for_nobody_and_a_wrong_password_then_each_call_says_so_once()
-> TestResult {
    let etcd = Etcd::start().await?;
    secure(&etcd).await?;
    let before = authentications(&etcd).await?;
    let client = Client::connect_lazy("wrong", user(vec![etcd.endpoint()], "hunter3"))?;
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
async fn given_a_client_that_waits_for_nobody_when_etcd_asks_for_no_user_then_it_goes_on_without()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::connect_lazy("app", user(vec![etcd.endpoint()], "hunter2"))?;
    client.put("other", "1", None).await?;
    assert_eq!(client.get("other", None).await?.count(), 1);
    Ok(())
}

/// What etcd refuses is not to be had from a file either.
#[tokio::test]
async fn given_a_cache_and_a_user_without_permission_then_a_directory_is_refused() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = tempfile::TempDir::new()?;
    let open = async |client: &Client| {
        let builder = goo_etcd::Directory::builder(client, "greeter");
        builder.cache_dir(folder.path()).watch().await
    };
    let client = support::connect(etcd.endpoint()).await;
    client
        .put(support::key("a"), support::value("h:1"), None)
        .await?;
    let directory = open(&client).await?;
    support::eventually("it is written", async || {
        std::fs::read_dir(folder.path()).is_ok_and(|files| files.count() == 1)
    })
    .await;
    drop((directory, client));
    secure(&etcd).await?;
    // Of the same name, so that it finds the file.
    let client = Client::connect_lazy("test", user(vec![etcd.endpoint()], "hunter2"))?;
    let refused = open(&client).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    Ok(())
}

/// A JWT says how old it is, and etcd takes none that is older than its users and roles.
#[tokio::test]
async fn given_jwts_when_users_change_then_the_token_is_renewed_once_and_no_call_or_watch_fails()
-> TestResult {
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
    secure(&etcd).await?;
    let client = Client::new("app", user(vec![etcd.endpoint()], "hunter2")).await?;
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
        let response = soon("an event", watch.next()).await.unwrap()?;
        seen += response.events().len();
    }
    Ok(())
}

#[tokio::test]
async fn given_a_token_that_expires_between_two_renewals_then_the_lease_is_kept() -> TestResult {
    let all = support::etcds().into_iter().map(|builder| async {
        let etcd = builder.args(["--auth-token-ttl", "2"]).start().await?;
        secure(&etcd).await?;
        let client = Client::new("app", user(vec![etcd.endpoint()], "hunter2")).await?;
        // Renewed every 4 s, and nothing else keeps the token.
        let lease = client.grant(12).await?.id();
        let mut kept = client.keep_alive(lease).await?;
        for _ in 0..4 {
            let answer = soon("a renewal", kept.next()).await.unwrap()?;
            assert_eq!(answer.ttl(), 12);
        }
        drop(kept);
        // And a lock, which would be told that it is lost.
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
async fn given_a_user_when_authentication_is_turned_on_later_then_all_goes_on() -> TestResult {
    let all = support::etcds().into_iter().map(|builder| async {
        let etcd = builder.start().await?;
        let config = user(vec![etcd.endpoint()], "hunter2");
        let early = Client::new("early", config.clone()).await?;
        let lazy = Client::connect_lazy("lazy", config)?;
        let mut watches = Vec::new();
        let mut kept = Vec::new();
        for client in [&early, &lazy] {
            client.put("app/a", "0", None).await?;
            let prefix = WatchOptions::new().with_prefix();
            watches.push(client.watch("app/", prefix).await?);
            let lease = client.grant(2).await?.id();
            let on_lease = PutOptions::new().with_lease(lease);
            let key = format!("app/of-{}", client.name());
            client.put(key, "", on_lease).await?;
            kept.push(client.keep_alive(lease).await?);
        }
        secure(&etcd).await?;
        for client in [&early, &lazy] {
            client.put("app/b", client.name(), None).await?;
            assert_eq!(client.get("app/b", None).await?.count(), 1);
            drop(client.watch("app/a", None).await?);
            let refused = client.put("other", "", None).await.unwrap_err();
            assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
        }
        // Beyond the time to live of the leases.
        sleep(Duration::from_secs(4)).await;
        for client in [&early, &lazy] {
            let key = format!("app/of-{}", client.name());
            assert_eq!(client.get(key, None).await?.count(), 1);
        }
        for kept in &mut kept {
            soon("a renewal", kept.next()).await.unwrap()?;
        }
        for watch in &mut watches {
            let mut last = String::new();
            while last != "lazy" {
                let response = soon("an event", watch.next()).await.unwrap()?;
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
async fn given_a_range_that_is_refused_though_its_first_key_is_not_then_a_watch_says_so_at_once()
-> TestResult {
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
    let client = Client::new("app", user(vec![etcd.endpoint()], "hunter2")).await?;
    drop(client.watch("config", None).await?);
    let before = (
        authentications(&etcd).await?,
        support::calls(&etcd, "Watch").await?,
    );
    let prefix = WatchOptions::new().with_prefix();
    let refused = client.watch("config", prefix).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");
    assert_eq!(authentications(&etcd).await?, before.0);
    assert_eq!(support::calls(&etcd, "Watch").await? - before.1, 1);
    Ok(())
}

#[tokio::test]
async fn given_a_token_that_has_expired_and_a_member_that_hangs_then_no_read_fails() -> TestResult {
    let cluster = cluster_that_forgets().await?;
    let client = Client::new("app", user(cluster.endpoints(), "hunter2")).await?;
    client.put("app/a", "1", None).await?;
    // The one that leads, by which all others are held up, and then one of those.
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
