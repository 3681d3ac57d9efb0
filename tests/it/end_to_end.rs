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
async fn given_a_client_that_was_there_first_when_a_server_registers_then_it_is_called()
-> TestResult {
    let etcd = Etcd::start().await?;
    let channel = channel_to_greeter(&etcd).await?;
    // A call that began while there was nobody to answer it, too.
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
async fn given_a_registered_server_when_a_client_starts_then_it_calls_that_server() -> TestResult {
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
async fn given_greeter_and_greeter2_then_a_client_of_greeter_neither_sees_nor_calls_greeter2()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::new(&client);
    let (ours, theirs) = (GreeterServer::start().await, GreeterServer::start().await);
    // One that is there before, and shows in the list; one that comes later, and shows in the watch.
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
    wait_until("what came last is seen", async || {
        directory.snapshot().len() == 2
    })
    .await;

    for snapshot in seen.all() {
        assert_eq!(
            snapshot.undecodable(),
            0,
            "read as ours, and not understood"
        );
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
async fn given_two_servers_when_one_leaves_on_its_signal_then_no_call_fails_and_the_other_gets_them_all()
-> TestResult {
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
    let mut answered = std::collections::BTreeSet::new();
    wait_until("both are called", async || {
        answered.insert(call_greeter(&channel).await.unwrap());
        answered.len() == 2
    })
    .await;

    let (signal, signalled) = tokio::sync::oneshot::channel::<()>();
    let left = tokio::spawn(leaving.leave_on(signalled));
    signal.send(()).unwrap();
    while !left.is_finished() {
        call_greeter(&channel).await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // As in `serve_with_shutdown`: only now the server stops.
    leaves.stop().await;
    for _ in 0..100 {
        assert_eq!(call_greeter(&channel).await?, stays.address());
    }
    let only = format!("{0}={0}", stays.address());
    wait_until("it has left the directory too", async || {
        listing(&directory.snapshot()) == [only.as_str()]
    })
    .await;
    Ok(())
}
