//! Invalid arguments are errors that name the field and the value; no request is sent.

use std::time::Duration;

use crate::support::{TestResult, connect};
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Directory, Error, Instance, Registrar};

#[track_caller]
fn assert_names<T: std::fmt::Debug>(result: Result<T, Error>, field: &str, value: &str) {
    let error = result.expect_err("it must be refused");
    let Error::Invalid {
        field: named,
        value: given,
        ..
    } = &error
    else {
        panic!("{error:?}");
    };
    assert_eq!((*named, given.as_str()), (field, value));
    let message = error.to_string();
    let both = format!("invalid {field} {value:?}: ");
    assert!(message.starts_with(&both), "{message}");
    assert!(message.len() > both.len(), "{message} gives no reason");
}

async fn revision(client: &Client) -> TestResult<i64> {
    let answer = client.get("any", None).await?;
    Ok(answer.header().map_or(0, |header| header.revision()))
}

#[tokio::test]
async fn missing_endpoints_are_named() {
    assert_names(
        Config::builder().endpoints([""; 0]).build(),
        "endpoints",
        "[]",
    );
    let mut config = Config::default();
    config.endpoints.clear();
    assert_names(Client::new("test", config).await, "endpoints", "[]");
}

#[tokio::test]
async fn invalid_instance_is_not_registered() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::new(&client);
    let before = revision(&client).await?;
    let good = "10.0.0.1:80";
    for (instance, field, value) in [
        (Instance::new("", good), "service", ""),
        (Instance::new("a/b", good), "service", "a/b"),
        (Instance::new("/", good), "service", "/"),
        (Instance::new("greeter", "10.0.0.1"), "address", "10.0.0.1"),
        (
            Instance::new("greeter", "10.0.0.1:"),
            "address",
            "10.0.0.1:",
        ),
        (
            Instance::new("greeter", "10.0.0.1:0"),
            "address",
            "10.0.0.1:0",
        ),
        (Instance::new("greeter", ""), "address", ""),
        (Instance::new("greeter", good).id(""), "id", ""),
    ] {
        assert_names(registrar.register(instance.clone()).await, field, value);
        assert_names(registrar.register_eventually(instance), field, value);
    }
    assert_eq!(revision(&client).await?, before);
    assert!(crate::support::leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn invalid_service_name_opens_no_directory() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for service in ["", "a/b", "/", "greeter/", "a\n"] {
        assert_names(Directory::watch(&client, service).await, "service", service);
    }
    Ok(())
}

#[tokio::test]
async fn impossible_ttl_is_named() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for (ttl, shown) in [
        (Duration::ZERO, "0ns"),
        (Duration::from_secs(1), "1s"),
        (Duration::from_millis(1_999), "1.999s"),
        (Duration::from_millis(2_500), "2.5s"),
        (Duration::from_secs(9_000_000_001), "9000000001s"),
    ] {
        assert_names(Registrar::builder(&client).ttl(ttl).build(), "ttl", shown);
    }
    // The smallest allowed TTL is granted unchanged.
    let registrar = Registrar::builder(&client)
        .ttl(Duration::from_secs(2))
        .build()?;
    let _registered = registrar
        .register(Instance::new("greeter", "10.0.0.1:80"))
        .await?;
    let lease = crate::support::leases(&etcd).await?[0];
    let mut raw = etcd.client().await?;
    let granted = raw.lease_time_to_live(lease, None).await?.granted_ttl();
    assert_eq!(granted, 2);
    let below = raw.lease_grant(1, None).await?;
    assert_eq!(
        below.ttl(),
        2,
        "etcd grants more than asked for below its minimum"
    );
    Ok(())
}
