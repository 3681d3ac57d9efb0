//! The client against a real etcd: keys, transactions, leases, cluster, time limits, close.

use std::time::Duration;

use crate::support::{PATIENCE, TestResult, config, wait_for};
use futures::StreamExt;
use goo_etcd::client::{CompactionOptions, DeleteOptions, SortOrder, SortTarget};
use goo_etcd::testing::Etcd;
use goo_etcd::{
    Client, Compare, CompareOp, Config, Error, GetOptions, PutOptions, TxnOp, TxnOpResponse,
};
use tokio::time::{Instant, timeout};

#[tokio::test]
async fn keys_are_put_read_listed_and_deleted() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    assert_eq!(client.name(), "main");
    client.ping().await?;

    client.put("a/1", "one", None).await?;
    client.put(b"a/2".to_vec(), vec![0xff], None).await?;
    let put = client
        .put("a/1", "uno", PutOptions::new().with_prev_key())
        .await?;
    assert_eq!(put.prev_key().map(|kv| kv.value()), Some(&b"one"[..]));

    let got = client.get("a/1", None).await?;
    assert_eq!(got.kvs()[0].value(), b"uno");
    let all = client
        .get("a/", Some(GetOptions::new().with_prefix()))
        .await?;
    assert_eq!(all.count(), 2);

    let deleted = client
        .delete("a/", DeleteOptions::new().with_prefix())
        .await?;
    assert_eq!(deleted.deleted(), 2);
    assert_eq!(client.get("a/1", None).await?.count(), 0);

    // The raw client sees the same etcd.
    client.client().put("raw", "1", None).await?;
    assert_eq!(client.get("raw", None).await?.count(), 1);
    Ok(())
}

#[tokio::test]
async fn get_options_work_as_in_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    // Keys are created in reverse order; `c` is changed once more.
    let mut created = std::collections::BTreeMap::new();
    for key in ["e", "d", "c", "b", "a"] {
        let put = client.put(key, format!("{key}1"), None).await?;
        created.insert(key, put.header().ok_or("a header")?.revision());
    }
    let changed = client.put("c", "c2", None).await?;
    let changed = changed.header().ok_or("a header")?.revision();
    let got = async |options: GetOptions| {
        let got = client.get("a", options.with_range("z")).await?;
        let kvs = got.kvs().iter();
        let pairs = kvs.map(|kv| (kv.key_str().unwrap(), kv.value_str().unwrap()));
        let pairs: Vec<_> = pairs.map(|(key, value)| format!("{key}={value}")).collect();
        Ok::<_, Error>((pairs.join(" "), got.count(), got.more()))
    };
    let all = || GetOptions::new();
    let text = |text: &str, count, more| (text.to_owned(), count, more);

    let everything = "a=a1 b=b1 c=c2 d=d1 e=e1";
    assert_eq!(got(all()).await?, text(everything, 5, false));
    assert_eq!(got(all().with_limit(2)).await?, text("a=a1 b=b1", 5, true));
    assert_eq!(got(all().with_count_only()).await?, text("", 5, false));
    assert_eq!(
        got(all().with_keys_only()).await?,
        text("a= b= c= d= e=", 5, false)
    );
    assert_eq!(
        got(all().with_min_mod_revision(created["b"])).await?.0,
        "a=a1 b=b1 c=c2"
    );
    assert_eq!(
        got(all().with_max_mod_revision(created["b"])).await?.0,
        "b=b1 d=d1 e=e1"
    );
    assert_eq!(
        got(all().with_min_create_revision(created["c"])).await?.0,
        "a=a1 b=b1 c=c2"
    );
    assert_eq!(
        got(all().with_max_create_revision(created["c"])).await?.0,
        "c=c2 d=d1 e=e1"
    );
    assert_eq!(
        got(all().with_revision(changed - 1)).await?.0,
        "a=a1 b=b1 c=c1 d=d1 e=e1"
    );
    let sorted = all().with_sort(SortTarget::Create, SortOrder::Descend);
    assert_eq!(
        got(sorted.with_limit(3)).await?,
        text("a=a1 b=b1 c=c2", 5, true)
    );
    assert_eq!(got(all().with_serializable()).await?.0, everything);
    let from = client.get("d", GetOptions::new().with_from_key()).await?;
    assert_eq!(from.count(), 2);
    Ok(())
}

#[tokio::test]
async fn compaction_removes_only_older_revisions() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let mut revision = 0;
    for n in 0..5 {
        let put = client.put("key", n.to_string(), None).await?;
        revision = put.header().ok_or("a header")?.revision();
    }
    let physical = CompactionOptions::new().with_physical();
    client.compact(revision - 1, physical).await?;
    let at = |revision| GetOptions::new().with_revision(revision);
    let get = client.get("key", at(revision - 2));
    assert_compacted(get.await.unwrap_err(), revision - 1);
    let prefix = client.get("", at(1).with_prefix().with_limit(1));
    assert_compacted(prefix.await.unwrap_err(), revision - 1);
    let txn = [TxnOp::get("key", Some(at(revision - 2)))];
    let txn = client.txn().and_then(txn).commit();
    assert_compacted(txn.await.unwrap_err(), revision - 1);
    let again = client.compact(revision - 1, None);
    assert_compacted(again.await.unwrap_err(), revision - 1);
    let older = client.get("key", at(revision - 1)).await?;
    assert_eq!(older.kvs()[0].value(), b"3");
    assert_eq!(client.get("key", None).await?.kvs()[0].value(), b"4");
    // A revision in the future is no compacted one.
    let future = revision + 100;
    let refused = client.compact(future, None).await.unwrap_err();
    assert!(matches!(refused, Error::Rpc { .. }), "{refused:?}");
    assert_eq!(refused.code(), Some(tonic::Code::OutOfRange), "{refused}");
    assert!(
        refused.to_string().contains(&future.to_string()),
        "{refused}"
    );
    Ok(())
}

/// etcd cancels no watch after such compactions, so it does not say the revision.
#[tokio::test]
async fn compaction_of_nothing_fails_early() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut config = config([etcd.endpoint()]);
    config.request_timeout = PATIENCE * 10;
    let client = Client::new("main", config).await?;
    for revision in [0, 1] {
        client.compact(revision, None).await?;
        let again = wait_for("the refusal", client.compact(revision, None)).await;
        assert!(
            matches!(
                &again,
                Err(Error::Compacted {
                    compact_revision: 0,
                    ..
                })
            ),
            "{revision}: {again:?}"
        );
    }
    for negative in [-1, -5, i64::MIN] {
        let refused = client.compact(negative, None).await.unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused:?}");
        assert!(
            refused.to_string().contains(&negative.to_string()),
            "{refused}"
        );
    }
    Ok(())
}

fn assert_compacted(error: Error, oldest: i64) {
    assert!(
        matches!(error, Error::Compacted { compact_revision, .. } if compact_revision == oldest),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("compacted") && text.contains(&oldest.to_string()),
        "{text}"
    );
    assert!(!error.is_retryable(), "{error}");
}

#[tokio::test]
async fn member_update_changes_peer_urls() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let listed = client.member_list().await?;
    let (id, before) = (listed.members()[0].id(), listed.members()[0].peer_urls());
    let urls = [before[0].clone(), "http://127.0.0.1:1".to_owned()];
    let updated = client.member_update(id, urls.clone()).await?;
    assert_eq!(updated.members().len(), 1);
    let listed = client.member_list().await?;
    let mut now = listed.members()[0].peer_urls().to_vec();
    now.sort();
    let mut urls = urls.to_vec();
    urls.sort();
    assert_eq!((listed.members()[0].id(), now), (id, urls));
    let unknown = client.member_update(7, ["http://127.0.0.1:1"]).await;
    let unknown = unknown.unwrap_err();
    assert_eq!(unknown.code(), Some(tonic::Code::NotFound), "{unknown}");
    assert!(unknown.to_string().contains("update member 7"), "{unknown}");
    Ok(())
}

#[tokio::test]
async fn transaction_branches_on_its_comparisons() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let elect = |who: &'static str| {
        client
            .txn()
            .or_else([TxnOp::get("leader", None)])
            .when([Compare::create_revision("leader", CompareOp::Equal, 0)])
            .and_then([TxnOp::put("leader", who, None)])
            .and_then([TxnOp::put("term", "1", None)])
    };
    assert!(elect("me").commit().await?.succeeded());
    assert_eq!(client.get("term", None).await?.count(), 1);

    let second = elect("you").commit().await?;
    assert!(!second.succeeded());
    match &second.op_responses()[..] {
        [TxnOpResponse::Get(got)] => assert_eq!(got.kvs()[0].value(), b"me"),
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[tokio::test]
async fn revoked_lease_takes_its_keys() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let lease = client.grant(60).await?;
    assert_eq!(lease.ttl(), 60);
    client
        .put("leased", "1", PutOptions::new().with_lease(lease.id()))
        .await?;
    let renewed = client.keep_alive_once(lease.id()).await?;
    assert_eq!((renewed.id(), renewed.ttl()), (lease.id(), 60));

    client.revoke(lease.id()).await?;
    assert_eq!(client.get("leased", None).await?.count(), 0);
    for error in [
        client.keep_alive_once(lease.id()).await.unwrap_err(),
        client.revoke(lease.id()).await.unwrap_err(),
        client.keep_alive(lease.id()).await.unwrap_err(),
    ] {
        assert!(
            matches!(error, Error::LeaseNotFound { id, .. } if id == lease.id()),
            "{error}"
        );
    }
    let error = client.grant(0).await.unwrap_err().to_string();
    assert!(error.contains("ttl") && error.contains("\"0\""), "{error}");
    Ok(())
}

#[tokio::test]
async fn keep_alive_works_without_polling() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let lease = client.grant(2).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    client
        .put("kept", "1", PutOptions::new().with_lease(lease))
        .await?;

    tokio::time::sleep(Duration::from_secs(7)).await;
    assert_eq!(client.get("kept", None).await?.count(), 1);
    assert_eq!(kept.next().await.unwrap()?.id(), lease);

    drop(kept);
    timeout(PATIENCE, async {
        while client.get("kept", None).await.unwrap().count() > 0 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn keep_alive_survives_a_restart() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let lease = client.grant(3).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    assert_eq!(kept.next().await.unwrap()?.id(), lease);

    etcd.kill().await?;
    // After a TTL without etcd the stream reports that the lease is unconfirmed, and goes on.
    let doubt = timeout(PATIENCE, kept.next()).await?.unwrap().unwrap_err();
    assert!(
        matches!(doubt, Error::LeaseUnconfirmed { id, after, .. }
            if id == lease && after >= Duration::from_secs(3)),
        "{doubt}"
    );
    etcd.start_again().await?;
    assert_eq!(timeout(PATIENCE, kept.next()).await?.unwrap()?.ttl(), 3);

    client.revoke(lease).await?;
    let end = timeout(PATIENCE, async {
        loop {
            match kept.next().await {
                Some(Ok(_)) => {}
                end => return end,
            }
        }
    })
    .await?;
    assert!(
        matches!(end, Some(Err(Error::LeaseNotFound { id, .. })) if id == lease),
        "{end:?}"
    );
    assert!(kept.next().await.is_none());
    Ok(())
}

#[tokio::test]
async fn unreachable_endpoints_fail_after_dial_timeout() -> TestResult {
    let config = Config::builder()
        .endpoints(["127.0.0.1:1", "127.0.0.1:2"])
        .dial_timeout(Duration::from_secs(1))
        .build()?;
    let start = Instant::now();
    let error = timeout(PATIENCE, Client::new("main", config))
        .await?
        .unwrap_err();
    assert!(start.elapsed() >= Duration::from_secs(1));
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    for part in ["127.0.0.1:1", "127.0.0.1:2", "1s", "refused"] {
        assert!(text.contains(part), "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn connect_finds_one_live_endpoint_of_a_hundred() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut config = config([etcd.endpoint()]);
    config
        .endpoints
        .extend((1..100).map(|port| format!("127.0.0.1:{port}")));
    config.dial_timeout = PATIENCE;
    let client = timeout(PATIENCE * 2, Client::new("main", config)).await??;
    client.close().await?;
    Ok(())
}

#[tokio::test]
async fn killed_member_fails_no_later_read() -> TestResult {
    let cluster = Etcd::builder().start_cluster(3).await?;
    let mut config = Config::default();
    config.endpoints = cluster.endpoints();
    let client = Client::new("main", config).await?;
    client.put("key", "value", None).await?;
    for dead in cluster.members() {
        dead.kill().await?;
        let mut failed = 0;
        for _ in 0..100 {
            failed += u32::from(client.get("key", None).await.is_err());
        }
        assert_eq!(failed, 0, "of 100 reads");
        dead.start_again().await?;
    }
    Ok(())
}

#[tokio::test]
async fn timeout_names_the_call() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut config = config([etcd.endpoint()]);
    config.request_timeout = Duration::from_millis(300);
    let client = Client::new("main", config).await?;
    etcd.pause().await?;
    let error = client.put("the-key", "the-value", None).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("put \"the-key\"") && text.contains("300ms"),
        "{text}"
    );
    assert!(!text.contains("the-value"), "{text}");
    etcd.resume()?;
    timeout(PATIENCE, async { while client.ping().await.is_err() {} }).await?;
    Ok(())
}

#[tokio::test]
async fn error_names_call_and_cause() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    etcd.kill().await?;
    // The first call may still use the connection that has just been lost.
    let _ = client.get("the-key", None).await;
    let error = client.get("the-key", None).await.unwrap_err();
    assert_eq!(error.code(), Some(tonic::Code::Unavailable), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("get \"the-key\"") && text.contains("refused"),
        "{text}"
    );
    Ok(())
}

#[tokio::test]
async fn close_ends_all_calls_and_streams() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let clone = client.clone();
    let mut raw = client.client();
    let lease = client.grant(60).await?.id();
    let mut watch = client.watch("key", None).await?;
    let mut kept = client.keep_alive(lease).await?;
    kept.next().await.unwrap()?;

    etcd.pause().await?;
    let put = tokio::spawn(async move { clone.put("key", "value", None).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    client.close().await?;
    client.close().await?;
    assert!(client.is_closed());

    let closed = |error: Error| {
        assert!(
            matches!(&error, Error::Closed { name, .. } if name == "main"),
            "{error:?}"
        );
    };
    closed(timeout(PATIENCE, put).await??.unwrap_err());
    closed(timeout(PATIENCE, watch.next()).await?.unwrap().unwrap_err());
    assert!(watch.next().await.is_none());
    closed(timeout(PATIENCE, kept.next()).await?.unwrap().unwrap_err());
    assert!(kept.next().await.is_none());
    closed(client.ping().await.unwrap_err());
    closed(client.watch("key", None).await.unwrap_err());
    closed(client.keep_alive(lease).await.unwrap_err());
    closed(client.status(etcd.endpoint()).await.unwrap_err());
    // The connections are closed for the raw client as well.
    assert!(timeout(PATIENCE, raw.get("key", None)).await?.is_err());
    Ok(())
}

#[tokio::test]
async fn status_asks_the_given_member() -> TestResult {
    let cluster = Etcd::builder().start_cluster(3).await?;
    let mut config = Config::default();
    config.endpoints = cluster.endpoints();
    let client = Client::new("main", config).await?;
    let members = client.member_list().await?;
    assert_eq!(members.members().len(), 3);
    for _ in 0..3 {
        for member in members.members() {
            let status = client.status(&member.client_urls()[0]).await?;
            assert_eq!(status.header().map(|h| h.member_id()), Some(member.id()));
        }
    }
    Ok(())
}

#[tokio::test]
async fn users_authenticate_and_renew_tokens() -> TestResult {
    let etcd = Etcd::builder()
        .args(["--auth-token-ttl", "1"])
        .start()
        .await?;
    let open = Client::new("admin", config([etcd.endpoint()])).await?;
    let mut auth = open.client().auth_client();
    auth.user_add("root", "secret", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.role_add("app").await?;
    auth.role_grant_permission(
        "app",
        etcd_client::Permission::read_write("app/").with_prefix(),
    )
    .await?;
    auth.user_grant_role("app", "app").await?;

    // While authentication is disabled, credentials are ignored, as in etcd's own client.
    let mut config = config([etcd.endpoint()]);
    (config.username, config.password) = (Some("app".into()), Some("hunter2".into()));
    Client::new("early", config.clone()).await?.ping().await?;

    auth.auth_enable().await?;
    let app = Client::new("app", config.clone()).await?;
    assert!(!format!("{app:?}").contains("hunter2"));
    app.put("app/a", "1", None).await?;
    let mut watch = app
        .watch("app/", goo_etcd::WatchOptions::new().with_prefix())
        .await?;

    let mut wrong = config;
    wrong.password = Some("hunter3".into());
    wrong.dial_timeout = PATIENCE * 10;
    let error = timeout(PATIENCE, Client::new("wrong", wrong))
        .await?
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("authenticate as \"app\""), "{text}");
    assert!(text.contains("authentication failed"), "{text}");
    assert!(!format!("{error:?}").contains("hunter3"), "{error:?}");

    for refused in [
        app.put("other", "1", None).await.unwrap_err(),
        app.watch("other", None).await.unwrap_err(),
    ] {
        assert_eq!(
            refused.code(),
            Some(tonic::Code::PermissionDenied),
            "{refused}"
        );
    }

    // The token expires after a second without use.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut second = app.watch("app/b", None).await?;
    app.put("app/b", "2", None).await?;
    for watch in [&mut watch, &mut second] {
        let response = timeout(PATIENCE, watch.next()).await?.unwrap()?;
        assert_eq!(response.events()[0].kv().unwrap().key(), b"app/b");
    }
    Ok(())
}

#[tokio::test]
async fn leases_hold_if_the_minimum_ttl_equals_a_probes() -> TestResult {
    // The minimum TTL is one and a half times the election timeout: 13 s.
    let etcd = Etcd::builder()
        .args(["--heartbeat-interval", "100", "--election-timeout", "8700"])
        .start()
        .await?;
    let client = Client::new("main", config([etcd.endpoint()])).await?;
    let mut plain = etcd.client().await?;
    assert_eq!(plain.lease_grant(10, None).await?.ttl(), 13);
    let granted = client.grant(10).await?;
    assert_eq!(granted.ttl(), 13);
    assert_eq!(client.keep_alive_once(granted.id()).await?.ttl(), 13);
    assert_eq!(client.grant_with_id(77, 13).await?.ttl(), 13);
    assert_eq!(client.keep_alive_once(77).await?.ttl(), 13);
    Ok(())
}
