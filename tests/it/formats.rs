//! The formats of Go frameworks, with real etcd servers and real gRPC servers.

use crate::support::process::ChildProcess;
use std::collections::BTreeSet;
use std::time::Duration;

use crate::support::greeter::{GreeterServer, call_greeter};
use crate::support::{
    PATIENCE, SnapshotRecorder, TestResult, connect, listing, wait_for, wait_until,
};
use futures::{FutureExt, StreamExt};
use goo_etcd::etcd_client::{Permission, PermissionType};
use goo_etcd::format::{
    DecodeError, DubboGo, EtcdNaming, Format, GoMicro, GoZero, KeyContext, KeyRange, Kitex, Kratos,
    Layout,
};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{
    BalancedChannel, Client, Config, Directory, Error, GetOptions, Instance, KeyValue, Registrar,
    RegistrationState,
};
use tonic::transport::Channel;
use tower::discover::Change;

async fn everything(client: &Client) -> TestResult<Vec<KeyValue>> {
    let all = GetOptions::new().with_all_keys();
    Ok(client.get("", all).await?.kvs().to_vec())
}

async fn all_keys(client: &Client) -> TestResult<Vec<String>> {
    let keys = everything(client).await?;
    let keys = keys.iter().map(|kv| kv.key_str().map(str::to_owned));
    Ok(keys.collect::<Result<_, _>>()?)
}

/// The servers that respond to enough calls that practically none is missed.
async fn called_servers(channel: &Channel) -> TestResult<BTreeSet<String>> {
    let mut servers = BTreeSet::new();
    for _ in 0..40 {
        servers.insert(call_greeter(channel).await?);
    }
    Ok(servers)
}

fn only(server: &GreeterServer) -> BTreeSet<String> {
    BTreeSet::from([server.address().to_owned()])
}

#[tokio::test]
async fn each_format_registers_and_discovers() -> TestResult {
    async fn assert_round_trip(etcd: &Etcd, layout: impl Format + Clone, ttl: i64) -> TestResult {
        let name = layout.name();
        let client = connect(etcd.endpoint()).await;
        let server = GreeterServer::start().await;
        let registrar = Registrar::builder(&client).format(layout.clone()).build()?;
        let directory = Directory::builder(&client, "greeter")
            .format(layout)
            .watch()
            .await?;
        assert!(directory.snapshot().is_empty(), "{name}");
        let instance = Instance::new("greeter", server.address())
            .weight(7)
            .zone("z")
            .version("v")
            .metadata("k", "v");
        let registration = registrar.register(instance.clone()).await?;
        let [kv] = everything(&client).await?.try_into().unwrap();
        assert_eq!(kv.key_str()?, registration.key());
        let mut raw = etcd.client().await?;
        let lease = raw.lease_time_to_live(kv.lease(), None).await?;
        assert_eq!(lease.granted_ttl(), ttl, "{name}");

        wait_until("the directory shows it", async || {
            directory.snapshot().len() == 1
        })
        .await;
        let found = directory.snapshot().instances().next().unwrap().clone();
        if name == "go-zero" {
            assert_eq!(*found, Instance::new("greeter", server.address()));
        } else {
            assert_eq!(*found, instance, "{name}");
        }
        let channel = directory.balance_channel(|_, endpoint| endpoint);
        assert_eq!(called_servers(&channel).await?, only(&server), "{name}");

        registration.drain(Duration::ZERO).await?;
        assert_eq!(registration.state(), RegistrationState::Deregistered);
        assert!(everything(&client).await?.is_empty(), "{name}");
        wait_until("the directory shows it as deleted", async || {
            directory.snapshot().is_empty()
        })
        .await;
        Ok(())
    }
    let etcd = Etcd::start().await?;
    assert_round_trip(&etcd, EtcdNaming, 10).await?;
    assert_round_trip(&etcd, GoZero, 10).await?;
    assert_round_trip(&etcd, Kratos, 15).await?;
    assert_round_trip(&etcd, Kitex, 60).await?;
    assert_round_trip(&etcd, GoMicro, 90).await?;
    assert_round_trip(&etcd, DubboGo, 10).await?;
    Ok(())
}

#[tokio::test]
async fn go_zero_keys_with_one_address_are_one_endpoint() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client
        .put("user.rpc/7587881534843123458", "10.0.0.5:8080", None)
        .await?;
    client.put("user.rpc/7", "10.0.0.5:8080", None).await?;
    client.put("user.rpc2/7", "10.0.0.6:8080", None).await?;
    let directory = Directory::builder(&client, "user.rpc")
        .format(GoZero)
        .watch()
        .await?;
    let expected = ["10.0.0.5:8080=10.0.0.5:8080"];
    assert_eq!(listing(&directory.snapshot()), expected);
    let mut discovery = directory.discover();
    assert!(matches!(
        discovery.next().await,
        Some(Ok(Change::Insert(..)))
    ));

    // The result does not depend on the order of deletion.
    for (first, second) in [("7", "7587881534843123458"), ("7587881534843123458", "7")] {
        let revision = directory.snapshot().revision();
        client.delete(format!("user.rpc/{first}"), None).await?;
        wait_until("the deletion is shown", async || {
            directory.snapshot().revision() > revision
        })
        .await;
        assert_eq!(listing(&directory.snapshot()), expected);
        assert!(
            discovery.next().now_or_never().is_none(),
            "a change was yielded"
        );
        client.delete(format!("user.rpc/{second}"), None).await?;
        wait_until("the directory shows it as deleted", async || {
            directory.snapshot().is_empty()
        })
        .await;
        assert!(matches!(
            discovery.next().await,
            Some(Ok(Change::Remove(..)))
        ));
        client
            .put(format!("user.rpc/{first}"), "10.0.0.5:8080", None)
            .await?;
        client
            .put(format!("user.rpc/{second}"), "10.0.0.5:8080", None)
            .await?;
        wait_until("it is shown again", async || {
            directory.snapshot().revision() > revision + 3
        })
        .await;
        assert!(matches!(
            discovery.next().await,
            Some(Ok(Change::Insert(..)))
        ));
    }
    Ok(())
}

#[tokio::test]
async fn go_zero_key_follows_its_value() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (old, new) = (GreeterServer::start().await, GreeterServer::start().await);
    client.put("user.rpc/7", old.address(), None).await?;
    let directory = Directory::builder(&client, "user.rpc")
        .format(GoZero)
        .watch()
        .await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    assert_eq!(called_servers(&channel).await?, only(&old));

    client.put("user.rpc/7", new.address(), None).await?;
    wait_until("the new server is called", async || {
        call_greeter(&channel).await.unwrap() == new.address()
    })
    .await;
    assert_eq!(called_servers(&channel).await?, only(&new));
    assert_eq!(directory.snapshot().len(), 1);
    Ok(())
}

#[tokio::test]
async fn go_zero_deploy_under_load_fails_no_call() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client).format(GoZero).build()?;
    let start = async || -> TestResult<_> {
        let server = GreeterServer::start().await;
        let instance = Instance::new("user.rpc", server.address());
        Ok((registrar.register(instance).await?, server))
    };
    let mut running = start().await?;
    let directory = Directory::builder(&client, "user.rpc")
        .format(GoZero)
        .watch()
        .await?;
    let channel = BalancedChannel::builder(directory).build()?;
    let calls = tokio::spawn(async move {
        let mut servers = BTreeSet::new();
        while servers.len() < 4 {
            servers.insert(call_greeter(&channel).await?);
        }
        Ok::<_, tonic::Status>(servers)
    });
    // go-zero's format has no draining mark.
    for _ in 0..3 {
        let next = start().await?;
        let (registration, server) = std::mem::replace(&mut running, next);
        registration.leave_on(async {}).await;
        server.stop().await;
    }
    let servers = tokio::time::timeout(PATIENCE, calls).await???;
    assert!(servers.contains(running.1.address()));
    Ok(())
}

#[tokio::test]
async fn kratos_scheme_selects_endpoint_and_tls() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (plain, http) = (GreeterServer::start().await, GreeterServer::start().await);
    let put = async |id: &str, endpoints: &[String]| {
        let value = format!(
            r#"{{"id":"{id}","name":"greeter","version":"","metadata":null,"endpoints":{endpoints:?}}}"#
        );
        client
            .put(format!("/microservices/greeter/{id}"), value, None)
            .await
    };
    let url = |scheme: &str, address: &str| format!("{scheme}://{address}");
    put(
        "both",
        &[url("http", http.address()), url("grpc", plain.address())],
    )
    .await?;
    put("http", &[url("http", http.address())]).await?;
    put("none", &[]).await?;
    let directory = Directory::builder(&client, "greeter")
        .format(Kratos)
        .watch()
        .await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    assert_eq!(
        listing(&directory.snapshot()),
        [format!("both={}", plain.address())]
    );
    assert_eq!(directory.snapshot().undecodable(), 0);
    assert_eq!(called_servers(&channel).await?, only(&plain));

    put(
        "tls",
        &[url("grpcs", "10.0.0.7:443"), url("grpc", http.address())],
    )
    .await?;
    wait_until("the directory shows it", async || {
        directory.snapshot().len() == 2
    })
    .await;
    let tls: Vec<_> = directory
        .snapshot()
        .instances()
        .map(|instance| (instance.id.clone(), instance.address.clone(), instance.tls))
        .collect();
    assert_eq!(
        tls,
        [
            ("tls".to_owned(), "10.0.0.7:443".to_owned(), Some(true)),
            ("both".to_owned(), plain.address().to_owned(), None),
        ]
    );
    Ok(())
}

/// An instance marked as TLS must not be called in plaintext, even by tonic's channel.
#[tokio::test]
async fn tls_instance_gets_no_plaintext() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let server = GreeterServer::start().await;
    let key = "/microservices/greeter/a";
    let value = |scheme: &str| {
        let endpoint = format!("{scheme}://{}", server.address());
        format!(r#"{{"id":"a","name":"greeter","endpoints":["{endpoint}"]}}"#)
    };
    client.put(key, value("grpcs"), None).await?;
    let directory = Directory::builder(&client, "greeter")
        .format(Kratos)
        .watch()
        .await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    let call =
        async || tokio::time::timeout(Duration::from_secs(1), called_servers(&channel)).await;
    assert!(call().await.is_err(), "it was called");
    client.put(key, value("grpc"), None).await?;
    assert!(
        wait_for("it is called", called_servers(&channel))
            .await
            .is_ok()
    );
    Ok(())
}

#[tokio::test]
async fn kitex_weight_defaults_to_10() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for (port, weight) in [(1, "0"), (2, "-3"), (3, "66")] {
        let value =
            format!(r#"{{"network":"tcp","address":"h:{port}","weight":{weight},"tags":null}}"#);
        client
            .put(format!("kitex/registry-etcd/echo/h:{port}"), value, None)
            .await?;
    }
    let directory = Directory::builder(&client, "echo")
        .format(Kitex)
        .watch()
        .await?;
    let weights: Vec<u32> = directory.snapshot().instances().map(|i| i.weight).collect();
    assert_eq!(weights, [10, 10, 66]);
    Ok(())
}

#[tokio::test]
async fn disabled_dubbo_go_instance_is_not_called() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (on, off) = (GreeterServer::start().await, GreeterServer::start().await);
    let put = async |server: &GreeterServer, enable: bool, healthy: bool| {
        let (host, port) = server.address().rsplit_once(':').unwrap();
        let value = format!(
            "{{\"ID\":\"\",\"ServiceName\":\"greeter\",\"Host\":\"{host}\",\"Port\":{port},\"Weight\":0,\"Enable\":{enable},\"Healthy\":{healthy},\"Metadata\":null}}\n"
        );
        client
            .put(format!("/services/greeter/{host}:{port}"), value, None)
            .await
    };
    put(&on, true, true).await?;
    put(&off, false, true).await?;
    let directory = Directory::builder(&client, "greeter")
        .format(DubboGo)
        .watch()
        .await?;
    let channel = directory.balance_channel(|_, endpoint| endpoint);
    assert_eq!(called_servers(&channel).await?, only(&on));
    assert_eq!(directory.snapshot().undecodable(), 0);

    put(&off, true, true).await?;
    wait_until("it is called", async || {
        call_greeter(&channel).await.unwrap() == off.address()
    })
    .await;
    put(&off, true, false).await?;
    wait_until("the directory shows it as deleted", async || {
        directory.snapshot().len() == 1
    })
    .await;
    wait_until("it is not called", async || {
        called_servers(&channel).await.unwrap() == only(&on)
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn entry_of_another_format_is_skipped() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let bad = [
        r#"{"name":"a","endpoints":5}"#,
        "nonsense",
        r#"{"address":9}"#,
        r#"{"nodes":9}"#,
        r#"{"Port":"9"}"#,
    ];
    // The number of undecodable values: JSON that is invalid in one format may be valid in another.
    async fn count_undecodable(
        client: &Client,
        format: impl Format + Clone,
        bad: &[&str],
    ) -> TestResult<usize> {
        let instance = Instance::new("a", "h:1");
        let prefix = format.default_prefix();
        let key = format.key(prefix, &instance);
        // A number, because go-zero checks only that.
        let bad_key = [&format.range(prefix, "a").start[..], b"999"].concat();
        let mut count = 0;
        for value in bad {
            client.put(&*key, format.encode(&instance)?, None).await?;
            client.put(&*bad_key, *value, None).await?;
            let directory = Directory::builder(client, "a")
                .format(format.clone())
                .watch()
                .await?;
            let snapshot = directory.snapshot();
            let of = format!("{}: {value}", format.name());
            assert_eq!(listing(&snapshot), ["h:1=h:1"], "{of}");
            let context = KeyContext::new(prefix, "a", &bad_key);
            let is_refused = format.decode(context, value.as_bytes());
            let is_refused = usize::from(is_refused.is_err());
            assert_eq!(snapshot.undecodable(), is_refused, "{of}");
            count += is_refused;
        }
        Ok(count)
    }
    assert_eq!(count_undecodable(&client, GoZero, &bad).await?, 5);
    assert_eq!(count_undecodable(&client, Kratos, &bad).await?, 2);
    assert_eq!(count_undecodable(&client, Kitex, &bad).await?, 5);
    assert_eq!(count_undecodable(&client, GoMicro, &bad).await?, 3);
    assert_eq!(count_undecodable(&client, DubboGo, &bad).await?, 5);
    Ok(())
}

#[tokio::test]
async fn two_formats_share_lease_and_transaction() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .format(Kratos)
        .and_format(EtcdNaming)
        .build()?;
    let directory = Directory::builder(&client, "greeter")
        .and_format(Kratos)
        .watch()
        .await?;
    let seen = SnapshotRecorder::new(&directory);
    let registration = registrar
        .register(Instance::new("greeter", "10.0.0.5:80").id("one").zone("z"))
        .await?;
    let keys = ["/microservices/greeter/one", "services/greeter/one"];
    assert_eq!(registration.keys(), keys);
    assert_eq!(registration.key(), keys[0]);
    let together = async || -> TestResult<i64> {
        let both = everything(&client).await?;
        assert_eq!(both.len(), 2);
        assert_eq!(both[0].lease(), both[1].lease());
        assert_ne!(both[0].lease(), 0);
        assert_eq!(both[0].mod_revision(), both[1].mod_revision());
        Ok(both[0].mod_revision())
    };
    let first = together().await?;
    registration.update(|instance| instance.weight = 9).await?;
    assert!(together().await? > first);
    wait_until("the change is seen", async || {
        let snapshot = directory.snapshot();
        let mut instances = snapshot.instances();
        instances.len() == 1 && instances.all(|instance| instance.weight == 9)
    })
    .await;
    let snapshot = directory.snapshot();
    let (key, instance) = snapshot.iter().next().unwrap();
    assert_eq!(key.as_str(), "10.0.0.5:80");
    assert_eq!(snapshot.get(key), Some(instance));
    assert_eq!(instance.zone.as_deref(), Some("z"));
    assert_eq!(
        snapshot.range(),
        "services/greeter/, /microservices/greeter/"
    );

    let _other = registrar
        .register(Instance::new("greeter", "10.0.0.6:80"))
        .await?;
    registration.deregister().await?;
    let left = all_keys(&client).await?;
    assert_eq!(
        left,
        [
            "/microservices/greeter/10.0.0.6:80",
            "services/greeter/10.0.0.6:80"
        ]
    );
    // Both keys were deleted in one revision.
    let mut raw = etcd.client().await?;
    let revision = raw.get("none", None).await?.header().unwrap().revision();
    let before = goo_etcd::GetOptions::new()
        .with_all_keys()
        .with_revision(revision - 1);
    assert_eq!(client.get("", before).await?.kvs().len(), 4);
    wait_until("the directory shows it as deleted", async || {
        directory.snapshot().len() == 1
    })
    .await;
    // No snapshot shows the instance twice.
    for snapshot in seen.all() {
        let addresses: BTreeSet<_> = snapshot.instances().map(|i| &i.address).collect();
        assert_eq!(addresses.len(), snapshot.len());
    }
    Ok(())
}

#[tokio::test]
async fn deregister_leaves_keys_of_another_process() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .format(Kratos)
        .and_format(EtcdNaming)
        .build()?;
    let _stays = registrar.register(Instance::new("greeter", "h:2")).await?;
    let leaving = registrar
        .register(Instance::new("greeter", "h:1").id("one"))
        .await?;
    // Under another lease, as if by another process; a key without a lease would be overwritten.
    let other = goo_etcd::PutOptions::new().with_lease(client.grant(60).await?.id());
    client
        .put("services/greeter/one", r#"{"Addr":"h:9"}"#, other)
        .await?;
    leaving.deregister().await?;
    let left = all_keys(&client).await?;
    assert_eq!(
        left,
        [
            "/microservices/greeter/h:2",
            "services/greeter/h:2",
            "services/greeter/one"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn lost_lease_is_recovered_in_every_format() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .format(GoZero)
        .and_format(Kitex)
        .and_format(GoMicro)
        .build()?;
    let registration = registrar
        .register(Instance::new("greeter", "h:1").id("7"))
        .await?;
    assert_eq!(registration.keys().len(), 3);
    let lease = everything(&client).await?[0].lease();
    client.revoke(lease).await?;
    assert!(all_keys(&client).await?.is_empty());
    wait_until("all are back", async || {
        all_keys(&client).await.unwrap().len() == 3
    })
    .await;
    let back = everything(&client).await?;
    assert!(
        back.iter()
            .all(|kv| kv.lease() == back[0].lease() && kv.lease() != lease)
    );
    Ok(())
}

#[tokio::test]
async fn instances_with_a_common_key_are_refused() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client).and_format(Kitex).build()?;
    let _first = registrar
        .register(Instance::new("greeter", "h:1").id("1"))
        .await?;
    let second = registrar
        .register(Instance::new("greeter", "h:1").id("2"))
        .await;
    assert!(matches!(
        second,
        Err(Error::InstanceAlreadyRegistered { key, .. }) if key == "kitex/registry-etcd/greeter/h:1"
    ));
    let twice = Registrar::builder(&client).and_format(EtcdNaming).build()?;
    let error = twice
        .register(Instance::new("greeter", "h:1"))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("set another prefix for one"),
        "{error}"
    );
    let kratos = Registrar::builder(&client).and_format(Kratos).build()?;
    let error = kratos
        .register(Instance::new("greeter", "unix:/a"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("grpc://host:port"), "{error}");
    Ok(())
}

#[tokio::test]
async fn formats_may_use_other_service_names() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let go_zero = Layout::new(GoZero).service("user.rpc");
    let staging = Layout::new(Kratos).prefix("/staging");
    let registrar = Registrar::builder(&client)
        .and_format(go_zero.clone())
        .and_format(staging.clone())
        .build()?;
    let directory = Directory::builder(&client, "user")
        .and_format(go_zero)
        .and_format(staging)
        .watch()
        .await?;
    client.put("user.rpc/7", "h:7", None).await?;
    let _own = registrar
        .register(Instance::new("user", "h:1").id("1"))
        .await?;
    assert_eq!(
        all_keys(&client).await?,
        [
            "/staging/user/1",
            "services/user/1",
            "user.rpc/1",
            "user.rpc/7"
        ]
    );
    wait_until("both are seen", async || directory.snapshot().len() == 2).await;
    assert_eq!(listing(&directory.snapshot()), ["1=h:1", "h:7=h:7"]);
    Ok(())
}

/// Each prefix, with the first key of a service under it.
async fn assert_joined<const N: usize>(
    client: &Client,
    format: impl Format + Clone,
    prefixes: [(&str, &str); N],
) -> TestResult {
    let name = format.name();
    for (prefix, key) in prefixes {
        let of = format!("{name} under {prefix:?}");
        let builder = Directory::builder(client, "svc").format(format.clone());
        let directory = builder.prefix(prefix).watch().await?;
        let mut endpoints = directory.discover();
        let builder = Registrar::builder(client).format(format.clone());
        let registrar = builder.prefix(prefix).build()?;
        let instance = Instance::new("svc", "10.0.0.1:80").id("7");
        let registration = registrar.register(instance.clone()).await?;
        assert_eq!(registration.key(), key, "{of}");
        assert_eq!(all_keys(client).await?, [key], "{of}");
        let found = wait_for(&of, endpoints.next()).await;
        assert!(matches!(found, Some(Ok(Change::Insert(..)))), "{of}");
        registration.deregister().await?;
        wait_until(&of, async || directory.snapshot().is_empty()).await;
        // As another framework writes it.
        client.put(key, format.encode(&instance)?, None).await?;
        wait_until(&of, async || directory.snapshot().len() == 1).await;
        client.delete(key, None).await?;
    }
    Ok(())
}

/// The keys are those of the Go frameworks: etcd's naming and go-zero take what the user names, go-
/// micro joins paths, and the others format with `%s/%s/%s`.
#[tokio::test]
async fn prefixes_are_joined_as_by_the_frameworks() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let named = [
        ("", "svc/7"),
        ("/", "/svc/7"),
        ("x", "x/svc/7"),
        ("/x/", "/x/svc/7"),
        ("//", "//svc/7"),
    ];
    assert_joined(&client, EtcdNaming, named).await?;
    assert_joined(&client, GoZero, named).await?;
    let paths = [
        ("", "svc/7"),
        ("/", "/svc/7"),
        ("//", "/svc/7"),
        ("/x//", "/x/svc/7"),
    ];
    assert_joined(&client, GoMicro, paths).await?;
    let formatted = [("", "/svc/7"), ("/", "//svc/7"), ("/x/", "/x//svc/7")];
    assert_joined(&client, Kratos, formatted).await?;
    let by_address = [("", "/svc/10.0.0.1:80"), ("/", "//svc/10.0.0.1:80")];
    assert_joined(&client, Kitex, by_address).await?;
    assert_joined(&client, DubboGo, by_address).await?;
    Ok(())
}

#[tokio::test]
async fn format_change_keeps_the_endpoint() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let instance = Instance::new("greeter", "10.0.0.5:80");
    let directory = Directory::builder(&client, "greeter")
        .and_format(Kratos)
        .watch()
        .await?;
    let mut discovery = directory.discover();
    let kratos = Registrar::builder(&client).format(Kratos).build()?;
    let both = Registrar::builder(&client)
        .format(Kratos)
        .and_format(EtcdNaming)
        .build()?;
    let default = Registrar::new(&client);

    let old = kratos.register(instance.clone()).await?;
    assert!(matches!(
        discovery.next().await,
        Some(Ok(Change::Insert(..)))
    ));
    let between = both.register(instance.clone()).await?;
    old.deregister().await?;
    let new = default.register(instance.clone()).await?;
    between.deregister().await?;
    assert_eq!(all_keys(&client).await?, [new.key()]);
    // Once this instance is shown, all earlier changes have arrived in both formats.
    let _mark = both
        .register(Instance::new("greeter", "10.0.0.6:80").id("mark"))
        .await?;
    wait_until("the mark is shown", async || {
        let snapshot = directory.snapshot();
        let own = everything(&client).await.unwrap();
        snapshot.len() == 2
            && own
                .iter()
                .all(|kv| kv.mod_revision() <= snapshot.revision())
    })
    .await;
    match discovery.next().await {
        Some(Ok(Change::Insert(key, _))) => assert_eq!(key.as_str(), "10.0.0.6:80"),
        other => panic!("the endpoint changed: {other:?}"),
    }
    assert!(discovery.next().now_or_never().is_none());
    Ok(())
}

#[tokio::test]
async fn forbidden_format_does_not_stop_the_other() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut auth = etcd.client().await?;
    auth.user_add("root", "secret", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.role_add("default").await?;
    auth.role_add("kratos").await?;
    for (role, prefix) in [("default", "services/"), ("kratos", "/microservices/")] {
        let permission = Permission::new(PermissionType::Readwrite, prefix).with_prefix();
        auth.role_grant_permission(role, permission).await?;
        auth.user_grant_role("app", role).await?;
    }
    auth.put("services/greeter/1", r#"{"Addr":"h:1"}"#, None)
        .await?;
    let kratos = r#"{"id":"2","name":"greeter","endpoints":["grpc://h:2"]}"#;
    auth.put("/microservices/greeter/2", kratos, None).await?;
    auth.auth_enable().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let login = async |user: &str, password: &str, endpoint: String| {
        let config = Config::builder().endpoints([endpoint]);
        let config = config
            .username(user)
            .password(password)
            .dial_timeout(PATIENCE);
        Client::new(user, config.build()?).await
    };
    let root = login("root", "secret", etcd.endpoint()).await?;
    let app = login("app", "hunter2", proxy.endpoint()).await?;
    let directory = Directory::builder(&app, "greeter")
        .and_format(Kratos)
        .watch()
        .await?;
    assert_eq!(listing(&directory.snapshot()), ["1=h:1", "2=h:2"]);
    assert!(directory.snapshot().freshness().is_live());

    let registrar = Registrar::builder(&app).and_format(Layout::new(Kratos).prefix("/other"));
    let refused = registrar
        .build()?
        .register(Instance::new("greeter", "h:4"))
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "put \"services/greeter/h:4\" and \"/other/greeter/h:4\" failed: \
         etcdserver: permission denied (PermissionDenied)"
    );

    let mut admin = root.client();
    admin.user_revoke_role("app", "kratos").await?;
    proxy.disconnect().await?;
    let reason = || match directory.snapshot().freshness() {
        goo_etcd::Freshness::Stale { reason, .. } => reason.to_string(),
        _ => String::new(),
    };
    root.put("services/greeter/3", r#"{"Addr":"h:3"}"#, None)
        .await?;
    wait_until("the permitted format goes on", async || {
        listing(&directory.snapshot()) == ["1=h:1", "2=h:2", "3=h:3"]
    })
    .await;
    wait_until("the other format is stale", async || {
        reason().starts_with("/microservices/greeter/: ")
    })
    .await;

    root.delete("/microservices/greeter/2", None).await?;
    admin.user_grant_role("app", "kratos").await?;
    wait_until("it is shown again", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;
    assert_eq!(listing(&directory.snapshot()), ["1=h:1", "3=h:3"]);
    Ok(())
}

/// A custom format: the value is the address in brackets.
#[derive(Debug, Clone)]
struct Bracketed;

impl Format for Bracketed {
    fn name(&self) -> &'static str {
        "bracketed"
    }

    fn default_prefix(&self) -> &'static str {
        "own"
    }

    fn default_ttl(&self) -> Duration {
        Duration::from_secs(5)
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        format!("{prefix}/{}/{}", instance.service, instance.id)
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(format!("{prefix}/{service}/"))
    }

    fn encode(&self, instance: &Instance) -> goo_etcd::Result<Vec<u8>> {
        Ok(format!("<{}>", instance.address).into_bytes())
    }

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let text = std::str::from_utf8(value).map_err(|_| DecodeError::new("not UTF-8"))?;
        // A value may hold several addresses.
        text.split_whitespace()
            .map(|one| one.strip_prefix('<').and_then(|one| one.strip_suffix('>')))
            .map(|one| one.map(|address| Instance::new(context.service, address)))
            .collect::<Option<_>>()
            .ok_or_else(|| DecodeError::new("not in brackets"))
    }
}

#[tokio::test]
async fn custom_format_works_alone_and_with_others() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .format(Bracketed)
        .and_format(GoZero)
        .build()?;
    let _one = registrar.register(Instance::new("greeter", "h:1")).await?;
    client.put("own/greeter/more", "<h:2> <h:3>", None).await?;
    let alone = Directory::builder(&client, "greeter")
        .format(Bracketed)
        .watch()
        .await?;
    let keys: Vec<String> = alone
        .snapshot()
        .iter()
        .map(|(key, _)| key.to_string())
        .collect();
    assert_eq!(
        keys,
        [
            "own/greeter/h:1",
            "own/greeter/more#h:2",
            "own/greeter/more#h:3"
        ]
    );
    let beside = Directory::builder(&client, "greeter")
        .format(GoZero)
        .and_format(Bracketed)
        .watch()
        .await?;
    assert_eq!(
        listing(&beside.snapshot()),
        ["h:1=h:1", "h:2=h:2", "h:3=h:3"]
    );
    Ok(())
}

/// The program that prints the address that [`Instance::advertise`] finds for `LISTEN`.
pub const PROGRAM: &str = "advertise";
const LISTEN: &str = "LISTEN";
const ADVERTISED: &str = "ADVERTISED=";

pub fn print_advertised() {
    let listen = std::env::var(LISTEN).unwrap();
    match Instance::advertise("greeter", &listen) {
        Ok(instance) => println!("{ADVERTISED}{}", instance.address),
        Err(error) => println!("{ADVERTISED}{error}"),
    }
}

/// The advertised address, found in a process with this `POD_IP`; an empty one counts as not set.
async fn advertise(listen: &str, pod_ip: &str) -> String {
    let variables = [(LISTEN, listen), ("POD_IP", pod_ip)];
    let mut process = ChildProcess::start(PROGRAM, &variables);
    process.read_after(ADVERTISED).await
}

#[tokio::test]
async fn pod_ip_is_advertised() {
    assert_eq!(advertise("0.0.0.0:80", "10.1.2.3").await, "10.1.2.3:80");
    assert_eq!(advertise("[::]:80", "fd00::3").await, "[fd00::3]:80");
    assert_eq!(advertise("127.0.0.1:80", "10.1.2.3").await, "127.0.0.1:80");
    let error = advertise("0.0.0.0:80", "me").await;
    assert!(error.contains("invalid POD_IP \"me\""), "{error}");
    // Without a pod it depends on the machine: an address that can be registered, or a reason.
    let own = advertise("0.0.0.0:80", "").await;
    assert!(
        !own.starts_with("0.0.0.0") && !own.starts_with("127."),
        "{own}"
    );
    assert!(own.ends_with(":80") || own.contains("set POD_IP"), "{own}");
}
