//! The end of a registrar by `Registrar::close`.

use std::time::Duration;

use futures::StreamExt;
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Error, Instance, Registrar, RegistrationState};

use crate::support::{
    PATIENCE, TestResult, connect, key, leases, registered_keys, wait_for, wait_until,
};

/// Longer than any test, so that a key that disappears was deleted and did not expire.
const LONG_TTL: Duration = Duration::from_secs(600);

fn registrar(client: &Client) -> Registrar {
    let builder = Registrar::builder(client).ttl(LONG_TTL);
    builder
        .leave_grace(Duration::from_millis(300))
        .build()
        .unwrap()
}

fn instance(id: &str) -> Instance {
    Instance::new("greeter", "10.0.0.1:80").id(id)
}

fn registration_keys(registrar: &Registrar) -> Vec<String> {
    let registrations = registrar.registrations();
    let keys = registrations.iter().map(|held| held.key().to_owned());
    keys.collect()
}

#[tokio::test]
async fn drains_every_registration_and_revokes_the_lease() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client);
    let a = registrar.register(instance("a")).await?;
    let b = registrar.register(instance("b")).await?;
    drop(registrar.register(instance("dropped")).await?);
    assert_eq!(registration_keys(&registrar), [key("a"), key("b")]);
    let states = tokio::spawn(a.states().collect::<Vec<_>>());

    wait_for("the registrar is closed", registrar.close()).await?;

    assert!(registered_keys(&client).await?.is_empty());
    assert!(leases(&etcd).await?.is_empty());
    let expected = [
        RegistrationState::Registered,
        RegistrationState::Draining,
        RegistrationState::Deregistered,
    ];
    assert_eq!(wait_for("the states end", states).await?, expected);
    assert_eq!(b.state(), RegistrationState::Deregistered);
    Ok(())
}

#[tokio::test]
async fn closed_registrar_accepts_no_registration() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client);
    let a = registrar.register(instance("a")).await?;
    let clone = registrar.clone();
    clone.close().await?;

    let again = registrar.register(instance("b")).await;
    assert!(matches!(again, Err(Error::RegistrarClosed)), "{again:?}");
    let again = registrar.register_eventually(instance("b"));
    assert!(matches!(again, Err(Error::RegistrarClosed)), "{again:?}");
    let again = registrar.register_while_ready(instance("b"), futures::stream::pending());
    assert!(matches!(again, Err(Error::RegistrarClosed)), "{again:?}");
    let update = a.update(|instance| instance.weight = 7).await;
    assert!(
        matches!(update, Err(Error::Deregistered { .. })),
        "{update:?}"
    );
    assert!(registration_keys(&registrar).is_empty());
    // Another call has nothing to wait for, even without etcd. The client stays open.
    client.put("key", "value", None).await?;
    etcd.kill().await?;
    registrar.close().await?;
    Ok(())
}

#[tokio::test]
async fn dropped_call_can_be_repeated() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client);
    let a = registrar.register(instance("a")).await?;
    {
        let mut close = std::pin::pin!(registrar.close());
        let draining = wait_until("the instance is draining", async || {
            a.state() == RegistrationState::Draining
        });
        tokio::select! {
            result = &mut close => panic!("closed too early: {result:?}"),
            () = draining => {}
        }
    }
    assert_eq!(registration_keys(&registrar), [key("a")]);
    assert_eq!(a.state(), RegistrationState::Draining);
    let again = registrar.register(instance("b")).await;
    assert!(matches!(again, Err(Error::RegistrarClosed)), "{again:?}");

    registrar.close().await?;

    assert!(registered_keys(&client).await?.is_empty());
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn fails_without_etcd_and_succeeds_once_it_is_back() -> TestResult {
    let etcd = Etcd::start().await?;
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        .dial_timeout(PATIENCE)
        .request_timeout(Duration::from_secs(1));
    let client = Client::connect("test", config.build()?).await?;
    let registrar = registrar(&client);
    let a = registrar.register(instance("a")).await?;
    etcd.kill().await?;

    let failed = wait_for("the registrar gives up", registrar.close()).await;

    assert!(failed.is_err(), "{failed:?}");
    assert_ne!(a.state(), RegistrationState::Deregistered);
    assert_eq!(registration_keys(&registrar), [key("a")]);
    etcd.start_again().await?;
    wait_until("the registrar is closed", async || {
        registrar.close().await.is_ok()
    })
    .await;
    assert_eq!(a.state(), RegistrationState::Deregistered);
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}
