//! From a server's registration to a client's call, through tonic's own balanced channel.

use std::time::Duration;

use crate::support::greeter::{GreeterServer, call_greeter};
use crate::support::{SnapshotRecorder, TestResult, connect, listing, wait_until};
use goo_etcd::testing::Etcd;
use goo_etcd::{Directory, Instance, Registrar};
use tonic::transport::Channel;

async fn channel_to_greeter(etcd: &Etcd) -> TestResult<Channel> {
    let directory = Directory::watch(&connect(etcd.endpoint()).await, "greeter").await?;
    Ok(directory.balance_channel(|_, endpoint| endpoint))
}

#[tokio::test]
async fn client_started_first_calls_a_later_server() -> TestResult {
    let etcd = Etcd::start().await?;
    let channel = channel_to_greeter(&etcd).await?;
    // A call that starts before the server waits for it.
    let early = tokio::spawn({
        let channel = channel.clone();
        async move { call_greeter(&channel).await }
    });

    let server = GreeterServer::start().await;
    let registrar = Registrar::new(&connect(etcd.endpoint()).await);
    let registered = registrar
        .register(Instance::new("greeter", server.address()))
        .await?;
    assert_eq!(
        registered.key(),
        format!("services/greeter/{}", server.address())
    );

    assert_eq!(early.await??, server.address());
    assert_eq!(call_greeter(&channel).await?, server.address());
    Ok(())
}

#[tokio::test]
async fn later_client_calls_a_registered_server() -> TestResult {
    let etcd = Etcd::start().await?;
    let server = GreeterServer::start().await;
    let registrar = Registrar::new(&connect(etcd.endpoint()).await);
    let _registered = registrar
        .register(Instance::new("greeter", server.address()))
        .await?;

    let channel = channel_to_greeter(&etcd).await?;
    assert_eq!(call_greeter(&channel).await?, server.address());
    Ok(())
}

#[tokio::test]
async fn services_with_a_common_prefix_are_separate() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::new(&client);
    let (ours, theirs) = (GreeterServer::start().await, GreeterServer::start().await);
    // One instance of `greeter2` is in the list, another in the watch.
    let _theirs = registrar
        .register(Instance::new("greeter2", theirs.address()))
        .await?;
    let _ours = registrar
        .register(Instance::new("greeter", ours.address()))
        .await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = SnapshotRecorder::new(&directory);
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    let _later = registrar
        .register(Instance::new("greeter2", theirs.address()).id("later"))
        .await?;
    let last = registrar
        .register(Instance::new("greeter", ours.address()).id("last"))
        .await?;
    wait_until("the last instance is shown", async || {
        directory.snapshot().len() == 2
    })
    .await;

    for snapshot in seen.all() {
        assert_eq!(snapshot.undecodable(), 0, "a key of greeter2 was read");
        for instance in snapshot.instances() {
            assert_eq!(instance.service, "greeter");
            assert_eq!(instance.address, ours.address());
        }
    }
    for _ in 0..20 {
        assert_eq!(call_greeter(&channel).await?, ours.address());
    }
    last.deregister().await?;
    let greeter2 = Directory::watch(&client, "greeter2").await?;
    assert_eq!(greeter2.snapshot().len(), 2);
    assert_eq!(greeter2.snapshot().range(), "services/greeter2/");
    Ok(())
}

#[tokio::test]
async fn leaving_server_fails_no_call() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::new(&client);
    let (stays, leaves) = (GreeterServer::start().await, GreeterServer::start().await);
    let _stays = registrar
        .register(Instance::new("greeter", stays.address()))
        .await?;
    let leaving = registrar
        .register(Instance::new("greeter", leaves.address()))
        .await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    let mut called = std::collections::BTreeSet::new();
    wait_until("both are called", async || {
        called.insert(call_greeter(&channel).await.unwrap());
        called.len() == 2
    })
    .await;

    let (signal, signalled) = tokio::sync::oneshot::channel::<()>();
    let left = tokio::spawn(leaving.leave_on(signalled));
    signal.send(()).unwrap();
    while !left.is_finished() {
        call_greeter(&channel).await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // As with `serve_with_shutdown`, the server stops only after it has left.
    leaves.stop().await;
    for _ in 0..100 {
        assert_eq!(call_greeter(&channel).await?, stays.address());
    }
    let only = format!("{0}={0}", stays.address());
    wait_until("the directory has only the other", async || {
        listing(&directory.snapshot()) == [only.as_str()]
    })
    .await;
    Ok(())
}
