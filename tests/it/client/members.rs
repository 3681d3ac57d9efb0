//! The members that a client uses: auto sync, learners, many endpoints, dead endpoints.

use std::time::Duration;

use crate::support::frames::FrameServer;
use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::{Feature, TestResult, call_count, config, connect, wait_for, wait_until};
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error};
use tokio::time::timeout;

fn auto_sync_config(endpoints: Vec<String>) -> Config {
    let mut config = config(endpoints);
    config.auto_sync = true;
    config.auto_sync_interval = Duration::from_millis(200);
    config
}

async fn reads(etcd: &Etcd) -> TestResult<u64> {
    call_count(etcd, "Range").await
}

async fn is_used(client: &Client, member: &Etcd) -> bool {
    let before = reads(member).await.unwrap();
    for _ in 0..20 {
        client.get("key", None).await.unwrap();
    }
    reads(member).await.unwrap() > before
}

#[tokio::test]
async fn auto_sync_follows_the_member_list() -> TestResult {
    if !isolate("client::members::auto_sync_follows_the_member_list").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::client::transport::members=info");
    let cluster = EtcdCluster::start().await?;
    // The client is configured with a proxy to one member, and finds the members.
    let proxy = Proxy::start(cluster.member(0).endpoint()).await?;
    let client = Client::new("main", auto_sync_config(vec![proxy.endpoint()])).await?;
    for member in cluster.members() {
        wait_until("the member is used", async || {
            is_used(&client, member).await
        })
        .await;
    }
    wait_until("the proxy is not used", async || proxy.connections() == 0).await;
    // The proxy is not in the member list, so no further call goes there, although it would work.
    let sent = proxy.bytes_up();
    for _ in 0..200 {
        client.get("key", None).await?;
    }
    assert_eq!((proxy.bytes_up(), proxy.connections()), (sent, 0));

    // A member is removed.
    let list = client.member_list().await?;
    let gone = cluster.member(2);
    let id = list
        .members()
        .iter()
        .find(|m| m.name() == gone.name())
        .ok_or("listed")?
        .id();
    // etcd refuses until its members have been connected for long enough.
    wait_until("the member is removed", async || {
        match client.member_remove(id).await {
            Ok(_) => true,
            // The call may go to the removed member, which shuts down before it responds.
            Err(error) => error.code() == Some(tonic::Code::NotFound),
        }
    })
    .await;
    // A member may learn of the change later than others.
    wait_until("the member is not listed", async || {
        let list = client.member_list().await.unwrap();
        list.members().iter().all(|member| member.id() != id)
    })
    .await;
    wait_until("the client has the new list", async || {
        let last = log.last("etcd's members have changed");
        !last.contains(&gone.endpoint())
    })
    .await;
    // From now on all calls go to the other members, by their own counters.
    let others = [cluster.member(0), cluster.member(1)];
    let before = reads(others[0]).await? + reads(others[1]).await?;
    for _ in 0..200 {
        client.get("key", None).await?;
    }
    let there = reads(others[0]).await? + reads(others[1]).await? - before;
    assert!(there >= 200, "{there} of 200");
    // The client does not try to connect to the removed member.
    gone.kill().await?;
    let listener = tokio::net::TcpListener::bind(gone.endpoint()).await?;
    let reading = async {
        loop {
            client.get("key", None).await.unwrap();
        }
    };
    let accepted = tokio::select! {
        accepted = timeout(Duration::from_secs(3), listener.accept()) => accepted,
        () = reading => unreachable!(),
    };
    assert!(accepted.is_err(), "{accepted:?}");
    drop(listener);

    // The member returns with a new id and an empty disk, and is used once it has caught up.
    cluster.replace(2).await?;
    wait_until("the member is used again", async || {
        is_used(&client, gone).await
    })
    .await;
    Ok(())
}

/// etcd#7588: behind address translation, in Docker for example, etcd advertises URLs that clients
/// cannot use.
#[tokio::test]
async fn auto_sync_keeps_what_a_useless_list_cannot_replace() -> TestResult {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    // Accepts connections and calls, and responds to no call.
    let hung = FrameServer::start(async |mut connection| {
        connection.handshake(&[]).await?;
        loop {
            connection.next().await?;
        }
    })
    .await;
    let other_cluster = Etcd::start().await?;
    let advertised = [
        "127.0.0.1:1".to_owned(),
        "0.0.0.0:2379".to_owned(),
        "nowhere.invalid:2379".to_owned(),
        silent.local_addr()?.to_string(),
        hung.address().to_owned(),
        other_cluster.endpoint(),
    ];
    let run = async |advertised: &str| -> TestResult {
        let url = format!("http://{advertised}");
        let etcd = Etcd::builder()
            .args(["--advertise-client-urls", &url])
            .start()
            .await?;
        let client = Client::new("main", auto_sync_config(vec![etcd.endpoint()])).await?;
        let lists = call_count(&etcd, "MemberList").await?;
        wait_until("the list is read several times", async || {
            client.put("key", advertised, None).await.unwrap();
            call_count(&etcd, "MemberList").await.unwrap() >= lists + 5
        })
        .await;
        for n in 0..50 {
            client.put("key", n.to_string(), None).await?;
            let response = client.get("key", None).await?;
            assert_eq!(response.kvs()[0].value_str()?, n.to_string());
        }
        Ok(())
    };
    futures::future::try_join_all(advertised.iter().map(|address| run(address))).await?;
    assert_eq!(call_count(&other_cluster, "Put").await?, 0);
    Ok(())
}

/// A member may have been given the URL of another cluster. With authentication enabled, some
/// releases of etcd (3.6.16 is one) tell the id of their cluster only to users.
#[tokio::test]
async fn auto_sync_keeps_the_password_from_other_clusters() -> TestResult {
    let other_cluster = Etcd::start().await?;
    let url = other_cluster.client_url();
    let etcd = Etcd::builder()
        .args(["--advertise-client-urls", &url])
        .start()
        .await?;
    for etcd in [&etcd, &other_cluster] {
        let mut auth = etcd.client().await?.auth_client();
        auth.user_add("root", "secret", None).await?;
        auth.user_grant_role("root", "root").await?;
        auth.auth_enable().await?;
    }
    let mut config = auto_sync_config(vec![etcd.endpoint()]);
    config.username = Some("root".to_owned());
    config.password = Some("secret".to_owned());
    let client = Client::new("main", config).await?;
    wait_until("the listed address is probed", async || {
        client.put("key", "1", None).await.unwrap();
        call_count(&other_cluster, "MemberList").await.unwrap() > 0
    })
    .await;
    for n in 0..50 {
        client.put("key", n.to_string(), None).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let calls = async |method| call_count(&other_cluster, method).await;
    assert_eq!((calls("Put").await?, calls("Authenticate").await?), (0, 0));
    Ok(())
}

#[tokio::test]
async fn auto_sync_returns_to_the_configured_endpoints() -> TestResult {
    let listed = Proxy::start("127.0.0.1:1").await?;
    let url = format!("http://{}", listed.endpoint());
    let etcd = Etcd::builder()
        .args(["--advertise-client-urls", &url])
        .start()
        .await?;
    listed.set_target(etcd.endpoint());
    let configured = Proxy::start(etcd.endpoint()).await?;
    let client = Client::new("main", auto_sync_config(vec![configured.endpoint()])).await?;
    for _ in 0..2 {
        wait_until(
            "the listed member replaces the configured endpoint",
            async || {
                client.put("key", "1", None).await.unwrap();
                configured.connections() == 0
            },
        )
        .await;
        assert!(listed.connections() > 0);
        // All listed members are lost.
        listed.cut().await;
        for _ in 0..20 {
            client.put("key", "2", None).await?;
        }
        listed.restore().await?;
    }
    Ok(())
}

#[tokio::test]
async fn auto_sync_ignores_lists_without_client_urls() -> TestResult {
    if !isolate("client::members::auto_sync_ignores_lists_without_client_urls").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::client::transport::members=debug");
    // Behind address translation, etcd often advertises a URL that clients cannot use.
    let cluster = Etcd::builder()
        .args(["--advertise-client-urls", "https://127.0.0.1:1"])
        .start_cluster(3)
        .await?;
    let client = Client::new("main", auto_sync_config(cluster.endpoints())).await?;
    // A member that has not started has no URL at all. etcd refuses until its members have been
    // connected for long enough.
    wait_until("the member is added", async || {
        client.member_add(["http://127.0.0.1:1"]).await.is_ok()
    })
    .await;
    wait_until("every member lists the new one", async || {
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
            lists += call_count(member, "MemberList").await?;
        }
        Ok(lists)
    };
    let before = lists().await?;
    wait_until("the list is read several times", async || {
        lists().await.unwrap() >= before + 3
    })
    .await;
    for _ in 0..20 {
        client.put("key", "1", None).await?;
    }
    log.last("etcd lists no member with a client URL");
    let written = log.text();
    assert!(!written.contains("members have changed"), "{written}");
    for member in cluster.members() {
        wait_until("the member is used", async || {
            is_used(&client, member).await
        })
        .await;
    }
    Ok(())
}

#[tokio::test]
async fn learner_gets_no_calls() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = Client::new("main", auto_sync_config(cluster.endpoints())).await?;
    // The learner never starts, so it has no name and no URL, and cannot be promoted.
    // etcd refuses until its members have been connected for long enough.
    let mut id = 0;
    wait_until("the learner is added", async || {
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
async fn promoted_learner_is_used() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let client = Client::new("main", auto_sync_config(cluster.endpoints())).await?;
    cluster.replace_with_learner(2).await?;
    let learner = cluster.member(2);
    let list = client.member_list().await?;
    let listed = list.members().iter().find(|m| m.name() == learner.name());
    let listed = listed.ok_or("listed")?;
    assert!(listed.is_learner());
    wait_until("the learner is not used", async || {
        !is_used(&client, learner).await
    })
    .await;
    assert!(!is_used(&client, learner).await);
    // etcd refuses until the learner has caught up.
    wait_until("the learner is promoted", async || {
        client.member_promote(listed.id()).await.is_ok()
    })
    .await;
    // A member may learn of the change later than others.
    wait_until("the learner is listed as a voter", async || {
        let list = client.member_list().await.unwrap();
        list.members().iter().all(|member| !member.is_learner())
    })
    .await;
    wait_until("the promoted member is used", async || {
        is_used(&client, learner).await
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn one_live_endpoint_of_a_hundred_is_enough() -> TestResult {
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
async fn unreachable_endpoints_are_named_with_their_errors() -> TestResult {
    // The listener does not accept, so a connection hangs after the TCP handshake.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let hangs = silent.local_addr()?.to_string();
    let mut config = config(vec!["127.0.0.1:1".to_owned(), hangs.clone()]);
    config.dial_timeout = Duration::from_secs(2);
    let started = tokio::time::Instant::now();
    let error = wait_for("the error", Client::new("main", config))
        .await
        .unwrap_err();
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
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

/// Go's client asks for a linearizable list as well.
#[tokio::test]
async fn member_list_has_all_ended_changes() -> TestResult {
    if Feature::LINEARIZABLE_MEMBER_LIST.is_missing() {
        return Ok(());
    }
    let cluster = EtcdCluster::start().await?;
    let clients = cluster.members().iter().map(|m| connect(m.endpoint()));
    let clients = futures::future::join_all(clients).await;
    let is_listed = async |client: &Client, id| -> TestResult<bool> {
        let list = client.member_list().await?;
        Ok(list.members().iter().any(|member| member.id() == id))
    };
    for round in 0..100 {
        let [changing, listing] = [round, round + 1].map(|n| &clients[n % 3]);
        let mut id = 0;
        // etcd refuses until its members have been connected for long enough.
        wait_until("the learner is added", async || {
            let added = changing.member_add_as_learner(["http://127.0.0.1:1"]).await;
            id = added.map_or(0, |added| added.member().map_or(0, |member| member.id()));
            id != 0
        })
        .await;
        assert!(is_listed(listing, id).await?, "not in round {round}");
        changing.member_remove(id).await?;
        assert!(!is_listed(listing, id).await?, "still in round {round}");
    }
    Ok(())
}
