//! A directory as a stream of changes: never an error, never an end, and nobody waits for a slow
//! consumer.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::support::greeter::{GreeterServer, call_greeter};
use crate::support::{SnapshotRecorder, TestResult, connect, key, value, wait_for, wait_until};
use futures::{FutureExt, StreamExt};
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Directory, Discovery, Instance, Registrar};
use tower::discover::Change;

/// All that a discovery yields without waiting: `+id=address` and `-id`.
fn ready(discovery: &mut Discovery) -> Vec<String> {
    let mut changes = Vec::new();
    while let Some(next) = discovery.next().now_or_never() {
        changes.push(told(next.expect("a discovery never ends")));
    }
    changes
}

type Told = Result<Change<goo_etcd::InstanceKey, Instance>, std::convert::Infallible>;

fn told(change: Told) -> String {
    match change.expect("a discovery never fails") {
        Change::Insert(_, instance) => format!("+{}={}", instance.id, instance.address),
        Change::Remove(key) => format!("-{}", key.as_str().trim_start_matches("services/greeter/")),
    }
}

async fn put(client: &Client, id: &str, address: &str) -> TestResult<i64> {
    let answer = client.put(key(id), value(address), None).await?;
    Ok(answer.header().map_or(0, |header| header.revision()))
}

#[tokio::test]
async fn given_a_consumer_that_does_not_poll_then_it_blocks_nobody_and_later_gets_the_net_difference()
-> TestResult {
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
        // Slowly enough for hundreds of steps to be seen: those of some milliseconds are shown together.
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    // `c` ends as it began.
    last = last.max(put(&client, "c", "10.0.0.1:80").await?);
    // Nobody has waited: not the directory, not those who look at it, not a registration.
    wait_until("the directory has all changes", async || {
        directory.snapshot().revision() == last
    })
    .await;
    wait_until("those who look have them too", async || {
        seen.last()
            .is_some_and(|snapshot| snapshot.revision() == last)
    })
    .await;
    assert!(
        seen.all().len() > 100,
        "too few steps were seen to prove anything"
    );
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
    wait_until("it is gone", async || directory.snapshot().len() == 3).await;
    assert_eq!(ready(&mut idle), ["-d"]);
    Ok(())
}

#[tokio::test]
async fn given_a_consumer_halfway_through_when_things_change_then_it_is_told_only_what_is_still_true()
-> TestResult {
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
            .map(told)
            .as_deref(),
        Some("+a=10.0.0.1:80")
    );
    client.delete(key("a"), None).await?;
    client.delete(key("b"), None).await?;
    wait_until("both are gone", async || directory.snapshot().len() == 1).await;
    // It was never told of `b`, so there is nothing to take back.
    assert_eq!(ready(&mut discovery), ["-a", "+c=10.0.0.1:80"]);
    Ok(())
}

#[tokio::test]
async fn given_etcd_is_restarted_and_wiped_then_the_discovery_goes_on_without_error_or_end()
-> TestResult {
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
            .map(told)
            .as_deref(),
        Some("+b=10.0.0.2:80")
    );

    etcd.wipe_and_restart().await?;
    put(&client, "c", "10.0.0.3:80").await?;
    let mut all = BTreeMap::from([("a".to_owned(), ()), ("b".to_owned(), ())]);
    wait_until("only the new history is told", async || {
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
    assert!(
        silent.is_err(),
        "after its client was closed it neither ends nor fails"
    );
    Ok(())
}

#[tokio::test]
async fn given_an_instance_drains_or_has_weight_0_then_it_is_removed_until_it_is_back() -> TestResult
{
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
            .map(told)
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
    // The directory itself shows it still, as what it is.
    let snapshot = directory.snapshot();
    assert_eq!(
        snapshot.instances().map(|i| i.weight).collect::<Vec<_>>(),
        [0]
    );
    // One that cannot be called from the beginning is not told of at all.
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
async fn given_a_channel_that_is_not_called_for_long_when_much_has_changed_then_it_calls_the_right_server()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let directory = Directory::watch(&client, "greeter").await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    // Far more changes than tonic's own buffer holds, each seen by the directory, none by a call.
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
    wait_until("only the right one is left", async || {
        directory
            .snapshot()
            .instances()
            .map(|instance| instance.address.clone())
            .eq([server.address().to_owned()])
    })
    .await;

    wait_until("the right one is called", async || {
        call_greeter(&channel).await.is_ok()
    })
    .await;
    for _ in 0..100 {
        assert_eq!(call_greeter(&channel).await?, server.address());
    }
    Ok(())
}
