//! All channels and directories of a service in a process share one watch.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{
    TestResult, connect, key, listing, value, wait_for, wait_until, watcher_count,
};
use futures::StreamExt;
use goo_etcd::format::{EtcdNaming, Format, Kratos};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{BalancedChannel, Client, Config, Directory, Error, Snapshot};
use tokio::runtime::Runtime;

async fn wait_for_watchers(etcd: &Etcd, count: u64) {
    wait_until(&format!("there are {count} watches"), async || {
        watcher_count(etcd).await.unwrap() == count
    })
    .await;
}

#[tokio::test]
async fn channels_of_a_service_share_one_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client.put(key("a"), value("h:1"), None).await?;
    // Some are opened concurrently, others one after another.
    let together = (0..50).map(|_| BalancedChannel::connect(&client, "greeter"));
    let channels = futures::future::try_join_all(together).await?;
    let mut directories = Vec::new();
    for _ in 0..10 {
        directories.push(Directory::watch(&client.clone(), "greeter").await?);
    }
    assert_eq!(watcher_count(&etcd).await?, 1);
    client.put(key("b"), value("h:2"), None).await?;
    for directory in &directories {
        wait_until("every directory shows it", async || {
            listing(&directory.snapshot()) == ["a=h:1", "b=h:2"]
        })
        .await;
    }
    drop(directories);
    wait_until("the channel has both", async || {
        channels[49].endpoints().len() == 2
    })
    .await;
    assert_eq!(watcher_count(&etcd).await?, 1);
    drop(channels);
    wait_for_watchers(&etcd, 0).await;
    let again = Directory::watch(&client, "greeter").await?;
    assert_eq!(again.snapshot().len(), 2);
    assert_eq!(watcher_count(&etcd).await?, 1);
    Ok(())
}

#[tokio::test]
async fn other_settings_open_another_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let (client, other) = (
        connect(etcd.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let chosen: Arc<dyn Format> = Arc::new(EtcdNaming);
    let builder = |service: &str| Directory::builder(&client, service);
    let mut held = vec![builder("greeter").watch().await?];
    // The same settings, given in other ways.
    held.push(builder("greeter").format(EtcdNaming).watch().await?);
    held.push(builder("greeter").format(chosen).watch().await?);
    held.push(builder("greeter").prefix("services").watch().await?);
    assert_eq!(watcher_count(&etcd).await?, 1);
    held.push(builder("greeter2").watch().await?);
    assert_eq!(watcher_count(&etcd).await?, 2);
    held.push(builder("greeter").prefix("elsewhere").watch().await?);
    assert_eq!(watcher_count(&etcd).await?, 3);
    held.push(builder("greeter").format(Kratos).watch().await?);
    assert_eq!(watcher_count(&etcd).await?, 4);
    held.push(builder("greeter").and_format(Kratos).watch().await?);
    assert_eq!(watcher_count(&etcd).await?, 6);
    held.push(Directory::watch(&other, "greeter").await?);
    assert_eq!(watcher_count(&etcd).await?, 7);
    drop(held);
    wait_for_watchers(&etcd, 0).await;
    Ok(())
}

#[tokio::test]
async fn cancelled_open_does_not_stop_the_others() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    // No response arrives until the proxy is restored.
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
        held.push(wait_for("the directory", other).await??);
    }
    assert_eq!(watcher_count(&etcd).await?, 1);
    Ok(())
}

#[tokio::test]
async fn failed_or_closed_directory_is_not_shared() -> TestResult {
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
    wait_until("the directory", async || {
        Directory::watch(&client, "greeter").await.is_ok()
    })
    .await;
    let held = Directory::watch(&client, "greeter").await?;
    let changes = held.changes();
    client.close().await?;
    wait_for("the end of the changes", changes.for_each(async |_| ())).await;
    wait_until("the directory is stale", async || {
        !held.snapshot().freshness().is_live()
    })
    .await;
    // The stale directory is not returned again.
    wait_until("the client is closed", async || {
        let again = Directory::watch(&client, "greeter").await;
        matches!(again, Err(Error::Closed { .. }))
    })
    .await;
    Ok(())
}

/// A runtime beside others in the same process.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn another_runtime_takes_over_the_watch() -> TestResult {
    let (main, first, second) = (runtime(), runtime(), runtime());
    let (etcd, client) = main.block_on(async {
        let etcd = Etcd::start().await.unwrap();
        let client = connect(etcd.endpoint()).await;
        client.put(key("a"), value("h:1"), None).await.unwrap();
        (etcd, client)
    });
    let watch = |runtime: &Runtime| runtime.block_on(Directory::watch(&client, "greeter"));
    let held = [watch(&first)?, watch(&second)?];
    assert_eq!(main.block_on(watcher_count(&etcd))?, 1);
    let wait_until_all = async |is: &dyn Fn(&Snapshot) -> bool| {
        for directory in &held {
            wait_until("both directories show it", async || {
                is(&directory.snapshot())
            })
            .await;
        }
    };
    let is_live = |snapshot: &Snapshot| snapshot.freshness().is_live();

    drop(first);
    main.block_on(async {
        client.delete(key("a"), None).await?;
        client.put(key("b"), value("h:2"), None).await?;
        wait_until_all(&|snapshot| is_live(snapshot) && listing(snapshot) == ["b=h:2"]).await;
        wait_for_watchers(&etcd, 1).await;
        TestResult::Ok(())
    })?;
    // No task follows etcd any more, and the directory says so.
    drop(second);
    main.block_on(wait_until_all(&|snapshot| !is_live(snapshot)));
    let stale = format!("{:?}", held[0].snapshot().freshness());
    assert!(
        stale.contains("no task is watching etcd any more"),
        "{stale}"
    );
    assert_eq!(listing(&held[0].snapshot()), ["b=h:2"]);
    // A new directory is followed again.
    let third = watch(&main)?;
    assert!(third.snapshot().freshness().is_live());
    assert_eq!(main.block_on(watcher_count(&etcd))?, 1);
    Ok(())
}

#[test]
fn concurrent_open_survives_the_end_of_a_runtime() -> TestResult {
    let (main, first, second) = (runtime(), runtime(), runtime());
    let (etcd, proxy, client) = main.block_on(async {
        let etcd = Etcd::start().await.unwrap();
        let proxy = Proxy::start(etcd.endpoint()).await.unwrap();
        let client = connect(proxy.endpoint()).await;
        (etcd, proxy, client)
    });
    // No response arrives until the proxy is restored.
    proxy.blackhole();
    let build = |runtime: &Runtime| {
        let client = client.clone();
        let (started_tx, started) = tokio::sync::oneshot::channel();
        let mut building = Box::pin(async move { Directory::watch(&client, "greeter").await });
        let building = runtime.spawn(async move {
            assert!(futures::poll!(&mut building).is_pending());
            started_tx.send(()).unwrap();
            building.await
        });
        main.block_on(started).unwrap();
        building
    };
    let _one = build(&first);
    let others = [build(&second), build(&second), build(&main)];
    drop(first);
    main.block_on(async {
        proxy.restore().await?;
        let mut held = Vec::new();
        for other in others {
            held.push(wait_for("the directory", other).await??);
        }
        wait_for_watchers(&etcd, 1).await;
        TestResult::Ok(())
    })
}
