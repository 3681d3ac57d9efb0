//! A directory as a stream of changes, which never fails, never ends, and never blocks on a slow
//! consumer.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::greeter::{GreeterServer, call_greeter};
use crate::support::{SnapshotRecorder, TestResult, connect, key, value, wait_for, wait_until};
use futures::{FutureExt, StreamExt};
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Directory, Discovery, Instance, Registrar};
use tower::discover::Change;

/// The changes that a discovery yields without waiting, as `+id=address` and `-id`.
fn ready(discovery: &mut Discovery) -> Vec<String> {
    let mut changes = Vec::new();
    while let Some(next) = discovery.next().now_or_never() {
        changes.push(describe(next.expect("a discovery never ends")));
    }
    changes
}

type Item = Result<Change<goo_etcd::InstanceKey, Instance>, std::convert::Infallible>;

fn describe(change: Item) -> String {
    match change.expect("a discovery never fails") {
        Change::Insert(_, instance) => format!("+{}={}", instance.id, instance.address),
        Change::Remove(key) => format!("-{}", key.as_str().trim_start_matches("services/greeter/")),
    }
}

async fn put(client: &Client, id: &str, address: &str) -> TestResult<i64> {
    let response = client.put(key(id), value(address), None).await?;
    Ok(response.header().map_or(0, |header| header.revision()))
}

#[tokio::test]
async fn unpolled_consumer_blocks_nobody() -> TestResult {
    const CHANGES: usize = 1_000;
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for id in ["a", "b", "c"] {
        put(&client, id, "10.0.0.1:80").await?;
    }
    let directory = Directory::watch(&client, "greeter").await?;
    let mut idle = directory.discover();
    let begin = ["+a=10.0.0.1:80", "+b=10.0.0.1:80", "+c=10.0.0.1:80"];
    assert_eq!(ready(&mut idle), begin);
    let mut never_polled = directory.discover();
    let mut busy = directory.discover();
    let seen = SnapshotRecorder::new(&directory);

    let mut last = 0;
    for change in 0..CHANGES {
        let id = ["a", "b", "c"][change % 3];
        last = put(&client, id, &format!("10.0.1.1:{}", change + 1)).await?;
        // Slow enough for hundreds of snapshots: changes within some milliseconds share one.
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    // `c` ends with its first value.
    last = last.max(put(&client, "c", "10.0.0.1:80").await?);
    // The idle consumer has not delayed the directory, other consumers or a registration.
    wait_until("the directory has all changes", async || {
        directory.snapshot().revision() == last
    })
    .await;
    wait_until("the recorder has all changes", async || {
        seen.last()
            .is_some_and(|snapshot| snapshot.revision() == last)
    })
    .await;
    assert!(seen.all().len() > 100, "too few snapshots");
    let present = ["+a=10.0.1.1:1000", "+b=10.0.1.1:998", "+c=10.0.0.1:80"];
    assert_eq!(ready(&mut busy), present);
    let registrar = Registrar::new(&client);
    let registered = registrar
        .register(Instance::new("greeter", "10.0.2.1:80").id("d"))
        .await?;
    wait_until("the registration is seen", async || {
        directory.snapshot().len() == 4
    })
    .await;
    assert_eq!(ready(&mut busy), ["+d=10.0.2.1:80"]);

    let net = ["+a=10.0.1.1:1000", "+b=10.0.1.1:998", "+d=10.0.2.1:80"];
    assert_eq!(ready(&mut idle), net);
    assert_eq!(
        ready(&mut never_polled),
        [&present[..], &["+d=10.0.2.1:80"]].concat()
    );
    registered.deregister().await?;
    wait_until("the directory shows it as deleted", async || {
        directory.snapshot().len() == 3
    })
    .await;
    assert_eq!(ready(&mut idle), ["-d"]);
    Ok(())
}

#[tokio::test]
async fn partly_read_difference_stays_consistent() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for id in ["a", "b", "c"] {
        put(&client, id, "10.0.0.1:80").await?;
    }
    let directory = Directory::watch(&client, "greeter").await?;
    let mut discovery = directory.discover();
    assert_eq!(
        wait_for("a change", discovery.next())
            .await
            .map(describe)
            .as_deref(),
        Some("+a=10.0.0.1:80")
    );
    client.delete(key("a"), None).await?;
    client.delete(key("b"), None).await?;
    wait_until("both are deleted", async || directory.snapshot().len() == 1).await;
    // The discovery has not yielded `b`, so it does not remove it.
    assert_eq!(ready(&mut discovery), ["-a", "+c=10.0.0.1:80"]);
    Ok(())
}

#[tokio::test]
async fn discovery_survives_restart_and_wipe() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    put(&client, "a", "10.0.0.1:80").await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let mut discovery = directory.discover();
    assert_eq!(ready(&mut discovery), ["+a=10.0.0.1:80"]);

    etcd.kill().await?;
    wait_until("the loss is noticed", async || {
        !directory.snapshot().freshness().is_live()
    })
    .await;
    // An outage is no change.
    assert!(ready(&mut discovery).is_empty());
    etcd.start_again().await?;
    put(&client, "b", "10.0.0.2:80").await?;
    assert_eq!(
        wait_for("a change", discovery.next())
            .await
            .map(describe)
            .as_deref(),
        Some("+b=10.0.0.2:80")
    );

    etcd.wipe_and_restart().await?;
    put(&client, "c", "10.0.0.3:80").await?;
    let mut all = BTreeMap::from([("a".to_owned(), ()), ("b".to_owned(), ())]);
    wait_until("only the new history is yielded", async || {
        for change in ready(&mut discovery) {
            let (id, _) = change[1..].split_once('=').unwrap_or((&change[1..], ""));
            match &change[..1] {
                "+" => all.insert(id.to_owned(), ()),
                _ => all.remove(id),
            };
        }
        all.keys().eq(["c"])
    })
    .await;

    client.close().await?;
    let silent = tokio::time::timeout(Duration::from_secs(1), discovery.next()).await;
    assert!(silent.is_err(), "after the close of the client: {silent:?}");
    Ok(())
}

#[tokio::test]
async fn draining_and_weight_0_are_removed() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::new(&client);
    let address = "10.0.0.1:80";
    let registered = registrar
        .register(Instance::new("greeter", address).id("a"))
        .await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let mut discovery = directory.discover();
    let mut next = async || {
        wait_for("a change", discovery.next())
            .await
            .map(describe)
            .unwrap()
    };
    assert_eq!(next().await, "+a=10.0.0.1:80");
    registered
        .update(|instance| instance.draining = true)
        .await?;
    assert_eq!(next().await, "-a");
    registered
        .update(|instance| instance.draining = false)
        .await?;
    assert_eq!(next().await, "+a=10.0.0.1:80");
    registered.update(|instance| instance.weight = 0).await?;
    assert_eq!(next().await, "-a");
    // The directory still shows the instance with its weight.
    let snapshot = directory.snapshot();
    assert_eq!(
        snapshot.instances().map(|i| i.weight).collect::<Vec<_>>(),
        [0]
    );
    // An instance that drains from the start is never yielded.
    let _drains = registrar
        .register(Instance::new("greeter", address).id("b").draining(true))
        .await?;
    let _serves = registrar
        .register(Instance::new("greeter", address).id("c"))
        .await?;
    assert_eq!(next().await, "+c=10.0.0.1:80");
    Ok(())
}

#[tokio::test]
async fn idle_tonic_channel_calls_the_current_server() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    // Far more changes than tonic's own buffer holds, without a call in between.
    for round in 0..100 {
        put(
            &client,
            &format!("{}", round % 10),
            &format!("127.0.0.1:{}", round + 1),
        )
        .await?;
        let revision = put(&client, "churn", &format!("127.0.0.1:{}", round + 1)).await?;
        wait_until("the change is seen", async || {
            directory.snapshot().revision() == revision
        })
        .await;
    }
    for id in 0..10 {
        client.delete(key(&id.to_string()), None).await?;
    }
    client.delete(key("churn"), None).await?;
    let server = GreeterServer::start().await;
    put(&client, "right", server.address()).await?;
    wait_until("only the last server is left", async || {
        directory
            .snapshot()
            .instances()
            .map(|instance| instance.address.clone())
            .eq([server.address().to_owned()])
    })
    .await;

    wait_until("the last server is called", async || {
        call_greeter(&channel).await.is_ok()
    })
    .await;
    for _ in 0..100 {
        assert_eq!(call_greeter(&channel).await?, server.address());
    }
    Ok(())
}

/// tonic's own channel is fed by a task, which would end with the panic.
#[tokio::test]
async fn instance_whose_configuration_panics_is_left_out() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::new(&client);
    let instance = |id: &str| Instance::new("greeter", "10.0.4.1:80").id(id);
    let _a = registrar.register(instance("a")).await?;
    let b = registrar.register(instance("b")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let mut endpoints = directory.discover_endpoints(|instance, endpoint| {
        assert_ne!(instance.id, "a", "bad configuration");
        endpoint
    });
    let mut next = async || match wait_for("a change", endpoints.next()).await {
        Some(Ok(Change::Insert(key, _))) => format!("+{}", key.as_str()),
        Some(Ok(Change::Remove(key))) => format!("-{}", key.as_str()),
        other => panic!("{other:?}"),
    };
    assert_eq!(next().await, "-services/greeter/a");
    assert_eq!(next().await, "+services/greeter/b");
    b.update(|instance| instance.weight = 7).await?;
    assert_eq!(next().await, "+services/greeter/b");
    Ok(())
}
