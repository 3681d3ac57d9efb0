//! One watch per service and process, however many channels use it.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::format::{EtcdNaming, Format, Kratos};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{BalancedChannel, Client, Config, Directory, Error, Snapshot};
use support::{TestResult, connect, eventually, key, shown, soon, value, watchers};
use tokio::runtime::Runtime;

async fn until_watchers(etcd: &Etcd, count: u64) {
    eventually(&format!("there are {count} watches"), async || {
        watchers(etcd).await.unwrap() == count
    })
    .await;
}

#[tokio::test]
async fn given_many_channels_of_one_service_then_there_is_one_watch_until_the_last_is_gone()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client.put(key("a"), value("h:1"), None).await?;
    // At once, and one after the other.
    let together = (0..50).map(|_| BalancedChannel::connect(&client, "greeter"));
    let channels = futures::future::try_join_all(together).await?;
    let mut directories = Vec::new();
    for _ in 0..10 {
        directories.push(Directory::watch(&client.clone(), "greeter").await?);
    }
    assert_eq!(watchers(&etcd).await?, 1);
    client.put(key("b"), value("h:2"), None).await?;
    for directory in &directories {
        eventually("all see it", async || {
            shown(&directory.snapshot()) == ["a=h:1", "b=h:2"]
        })
        .await;
    }
    drop(directories);
    eventually("channels too", async || channels[49].endpoints().len() == 2).await;
    assert_eq!(watchers(&etcd).await?, 1);
    drop(channels);
    until_watchers(&etcd, 0).await;
    let again = Directory::watch(&client, "greeter").await?;
    assert_eq!(again.snapshot().len(), 2);
    assert_eq!(watchers(&etcd).await?, 1);
    Ok(())
}

#[tokio::test]
async fn given_other_settings_then_it_is_another_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let (client, other) = (
        connect(etcd.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let chosen: Arc<dyn Format> = Arc::new(EtcdNaming);
    let of = |service: &str| Directory::builder(&client, service);
    let mut held = vec![of("greeter").watch().await?];
    // The same, said in other ways.
    held.push(of("greeter").format(EtcdNaming).watch().await?);
    held.push(of("greeter").format(chosen).watch().await?);
    held.push(of("greeter").prefix("services").watch().await?);
    assert_eq!(watchers(&etcd).await?, 1);
    held.push(of("greeter2").watch().await?);
    assert_eq!(watchers(&etcd).await?, 2);
    held.push(of("greeter").prefix("elsewhere").watch().await?);
    assert_eq!(watchers(&etcd).await?, 3);
    held.push(of("greeter").format(Kratos).watch().await?);
    assert_eq!(watchers(&etcd).await?, 4);
    held.push(of("greeter").and_format(Kratos).watch().await?);
    assert_eq!(watchers(&etcd).await?, 6);
    held.push(Directory::watch(&other, "greeter").await?);
    assert_eq!(watchers(&etcd).await?, 7);
    drop(held);
    until_watchers(&etcd, 0).await;
    Ok(())
}

#[tokio::test]
async fn given_the_first_gives_up_while_it_is_built_then_the_others_get_it() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    // Nothing answers for now.
    proxy.blackhole();
    let build = |client: &Client| {
        let client = client.clone();
        tokio::spawn(async move { Directory::watch(&client, "greeter").await })
    };
    let first = build(&client);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let others: Vec<_> = (0..5).map(|_| build(&client)).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    first.abort();
    assert!(first.await.is_err_and(|error| error.is_cancelled()));
    proxy.restore().await?;
    let mut held = Vec::new();
    for other in others {
        held.push(soon("it is there", other).await??);
    }
    assert_eq!(watchers(&etcd).await?, 1);
    Ok(())
}

#[tokio::test]
async fn given_one_that_failed_or_was_closed_then_the_next_is_made_anew() -> TestResult {
    let etcd = Etcd::start().await?;
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        .request_timeout(Duration::from_millis(500))
        .build()?;
    let client = Client::connect_lazy("main", config)?;
    etcd.kill().await?;
    let failed = Directory::watch(&client, "greeter").await;
    assert!(failed.is_err(), "{failed:?}");
    etcd.start_again().await?;
    eventually("it is there", async || {
        Directory::watch(&client, "greeter").await.is_ok()
    })
    .await;
    let held = Directory::watch(&client, "greeter").await?;
    let changes = held.changes();
    client.close().await?;
    soon("its changes end", changes.for_each(async |_| ())).await;
    eventually("it says so", async || {
        !held.snapshot().freshness().is_live()
    })
    .await;
    // Not the one that hears of nothing any more.
    eventually("it is closed", async || {
        let again = Directory::watch(&client, "greeter").await;
        matches!(again, Err(Error::Closed { .. }))
    })
    .await;
    Ok(())
}

/// A runtime of its own, as one of several that a process may have.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn given_the_runtime_ends_whose_task_follows_then_another_follows_that_has_the_directory_too()
-> TestResult {
    let (main, first, second) = (runtime(), runtime(), runtime());
    let (etcd, client) = main.block_on(async {
        let etcd = Etcd::start().await.unwrap();
        let client = connect(etcd.endpoint()).await;
        client.put(key("a"), value("h:1"), None).await.unwrap();
        (etcd, client)
    });
    let watch = |runtime: &Runtime| runtime.block_on(Directory::watch(&client, "greeter"));
    let held = [watch(&first)?, watch(&second)?];
    assert_eq!(main.block_on(watchers(&etcd))?, 1);
    let becomes = async |is: &dyn Fn(&Snapshot) -> bool| {
        for directory in &held {
            eventually("both show it", async || is(&directory.snapshot())).await;
        }
    };
    let is_live = |snapshot: &Snapshot| snapshot.freshness().is_live();

    drop(first);
    main.block_on(async {
        client.delete(key("a"), None).await?;
        client.put(key("b"), value("h:2"), None).await?;
        becomes(&|snapshot| is_live(snapshot) && shown(snapshot) == ["b=h:2"]).await;
        until_watchers(&etcd, 1).await;
        TestResult::Ok(())
    })?;
    // Nobody is left to follow, and nothing says otherwise.
    drop(second);
    main.block_on(becomes(&|snapshot| !is_live(snapshot)));
    let stale = format!("{:?}", held[0].snapshot().freshness());
    assert!(
        stale.contains("no task is watching etcd any more"),
        "{stale}"
    );
    assert_eq!(shown(&held[0].snapshot()), ["b=h:2"]);
    // Who comes then has one that is followed.
    let third = watch(&main)?;
    assert!(third.snapshot().freshness().is_live());
    assert_eq!(main.block_on(watchers(&etcd))?, 1);
    Ok(())
}

#[test]
fn given_two_runtimes_build_it_at_once_and_one_ends_then_the_other_has_it() -> TestResult {
    let (main, first, second) = (runtime(), runtime(), runtime());
    let (etcd, proxy, client) = main.block_on(async {
        let etcd = Etcd::start().await.unwrap();
        let proxy = Proxy::start(etcd.endpoint()).await.unwrap();
        let client = connect(proxy.endpoint()).await;
        (etcd, proxy, client)
    });
    // Nothing answers for now.
    proxy.blackhole();
    let build = |runtime: &Runtime| {
        let client = client.clone();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let mut building = Box::pin(async move { Directory::watch(&client, "greeter").await });
        let building = runtime.spawn(async move {
            assert!(futures::poll!(&mut building).is_pending());
            begun.send(()).unwrap();
            building.await
        });
        main.block_on(has_begun).unwrap();
        building
    };
    let _one = build(&first);
    let others = [build(&second), build(&second), build(&main)];
    drop(first);
    main.block_on(async {
        proxy.restore().await?;
        let mut held = Vec::new();
        for other in others {
            held.push(soon("it is there", other).await??);
        }
        until_watchers(&etcd, 1).await;
        TestResult::Ok(())
    })
}
