//! A registration lives as long as its process and leaves nothing behind.

use std::time::{Duration, Instant};

use crate::support::history::history;
use crate::support::{
    PATIENCE, SnapshotRecorder, TestResult, connect, key, lease_of, leases, registered_keys,
    stored_value, value, wait_for, wait_until,
};
use futures::StreamExt;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{
    Client, Config, Directory, Error, Instance, PutOptions, Registrar, Registration,
    RegistrationState,
};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tower::discover::Change;

/// Short, because tests wait for its end; above etcd's minimum, so that no lease expires on a busy
/// machine.
const TTL: Duration = Duration::from_secs(3);

/// Longer than any test, so that a key that disappears was deleted and did not expire.
const LONG_TTL: Duration = Duration::from_secs(600);

/// The time in which a registration must be back after etcd responds again. The promise is 2 s; the
/// rest is for busy machines. A pause that kept growing during the outage would last longer.
const BACK_WITHIN: Duration = Duration::from_secs(6);

const ADDRESS: &str = "10.0.0.1:80";

fn registrar(client: &Client, ttl: Duration) -> Registrar {
    Registrar::builder(client).ttl(ttl).build().unwrap()
}

fn instance(id: &str) -> Instance {
    Instance::new("greeter", ADDRESS).id(id)
}

/// Records the states of a registration in the background; `Recovering` without time and reason.
struct StateRecorder {
    seen: std::sync::Arc<std::sync::Mutex<Vec<&'static str>>>,
    collector: AbortOnDropHandle<()>,
}

impl StateRecorder {
    fn new(registration: &Registration) -> Self {
        let seen = std::sync::Arc::default();
        let into: std::sync::Arc<std::sync::Mutex<Vec<_>>> = std::sync::Arc::clone(&seen);
        let mut states = registration.states();
        let collector = tokio::spawn(async move {
            while let Some(state) = states.next().await {
                let mut seen: std::sync::MutexGuard<'_, Vec<_>> = into.lock().unwrap();
                // The same kind again means that only the reason has changed.
                if seen.last() != Some(&kind(&state)) {
                    seen.push(kind(&state));
                }
            }
        });
        Self {
            seen,
            collector: AbortOnDropHandle::new(collector),
        }
    }

    fn seen_states(&self) -> Vec<&'static str> {
        self.seen.lock().unwrap().clone()
    }

    /// All states, once the stream has ended.
    async fn finish(self) -> Vec<&'static str> {
        wait_for("the states end", self.collector).await.unwrap();
        std::sync::Arc::try_unwrap(self.seen)
            .unwrap()
            .into_inner()
            .unwrap()
    }
}

fn kind(state: &RegistrationState) -> &'static str {
    match state {
        RegistrationState::Registering { .. } => "registering",
        RegistrationState::Registered => "registered",
        RegistrationState::Recovering { .. } => "recovering",
        RegistrationState::Draining => "draining",
        RegistrationState::Deregistered => "deregistered",
        RegistrationState::Superseded { .. } => "superseded",
        RegistrationState::Unready { .. } => "unready",
        other => panic!("unknown state {other:?}"),
    }
}

/// Whether the state is `Registered` and the key is in etcd under a live lease.
async fn is_stored(etcd: &Etcd, registration: &Registration) -> bool {
    registration.state() == RegistrationState::Registered
        && match lease_of(etcd, registration.key()).await {
            Ok(Some(lease)) => leases(etcd)
                .await
                .is_ok_and(|leases| leases.contains(&lease)),
            _ => false,
        }
}

#[tokio::test]
async fn registration_and_directory_recover_after_an_outage() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = SnapshotRecorder::new(&directory);
    let mut discovery = directory.discover();
    let inserted = wait_for("the instance", discovery.next()).await;
    assert!(
        matches!(&inserted, Some(Ok(Change::Insert(key, _))) if key.as_str() == registered.key())
    );
    let states = StateRecorder::new(&registered);

    etcd.kill().await?;
    // The state changes only after a whole TTL without a response.
    wait_until("it is recovering", async || {
        kind(&registered.state()) == "recovering"
    })
    .await;
    // The outage is so long that a pause that keeps growing would exceed the bound by far.
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert!(!directory.snapshot().freshness().is_live());
    // Returns when etcd has responded for the first time.
    etcd.start_again().await?;
    let available = Instant::now();
    wait_until("both have recovered", async || {
        directory.snapshot().freshness().is_live() && is_stored(&etcd, &registered).await
    })
    .await;
    let took = available.elapsed();

    assert!(took <= BACK_WITHIN, "it took {took:?}");
    assert_eq!(
        states.seen_states(),
        ["registered", "recovering", "registered"]
    );
    for snapshot in seen.all() {
        assert_eq!(snapshot.len(), 1, "the instance is missing in {snapshot:?}");
    }
    // The discovery yields no change, no error and no end.
    let more = tokio::time::timeout(Duration::from_millis(300), discovery.next()).await;
    assert!(more.is_err(), "{more:?}");
    Ok(())
}

#[tokio::test]
async fn registration_recovers_after_a_network_cut() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let observer = connect(etcd.endpoint()).await;
    let directory = Directory::watch(&observer, "greeter").await?;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let first = lease_of(&etcd, registered.key()).await?;
    wait_until("the directory shows it", async || {
        directory.snapshot().len() == 1
    })
    .await;
    proxy.cut().await;
    wait_until("the lease has expired", async || {
        directory.snapshot().is_empty()
    })
    .await;
    assert!(leases(&etcd).await?.is_empty());

    proxy.restore().await?;
    let reachable = Instant::now();
    wait_until("it is registered", async || {
        directory.snapshot().len() == 1 && is_stored(&etcd, &registered).await
    })
    .await;
    let took = reachable.elapsed();

    assert!(took <= BACK_WITHIN, "it took {took:?}");
    assert_ne!(lease_of(&etcd, registered.key()).await?, first);
    Ok(())
}

#[tokio::test]
async fn registration_recovers_under_another_lease() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, TTL);
    let (a, b) = (
        registrar.register(instance("a")).await?,
        registrar.register(instance("b")).await?,
    );
    let states = StateRecorder::new(&a);
    let first = lease_of(&etcd, a.key()).await?.unwrap();
    client.revoke(first).await?;
    assert!(registered_keys(&client).await?.is_empty());
    wait_until("both have recovered", async || {
        registered_keys(&client)
            .await
            .is_ok_and(|keys| keys == [key("a"), key("b")])
    })
    .await;
    let second = lease_of(&etcd, a.key()).await?.unwrap();
    assert_ne!(second, first);
    assert_eq!(lease_of(&etcd, b.key()).await?, Some(second));
    wait_until("the states are recorded", async || {
        states.seen_states() == ["registered", "recovering", "registered"]
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn registration_recovers_on_a_wiped_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    etcd.wipe_and_restart().await?;
    wait_until("it is registered, and the directory shows it", async || {
        let snapshot = directory.snapshot();
        is_stored(&etcd, &registered).await && snapshot.freshness().is_live() && snapshot.len() == 1
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn registration_is_held_for_several_ttls() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let states = StateRecorder::new(&registered);
    tokio::time::sleep(TTL * 5 / 2).await;
    let history = history(&etcd).await?;
    assert_eq!(history.len(), 1, "{history:?}");
    assert!(stored_value(&etcd, registered.key()).await?.is_some());
    assert_eq!(states.seen_states(), ["registered"]);
    Ok(())
}

#[tokio::test]
async fn deregister_deletes_the_key_and_revokes_the_lease() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    let registered = registrar.register(instance("a")).await?;
    assert_eq!(registered.state(), RegistrationState::Registered);
    assert_eq!(leases(&etcd).await?.len(), 1);
    let states = StateRecorder::new(&registered);
    wait_until("the first state is recorded", async || {
        !states.seen_states().is_empty()
    })
    .await;
    registered.deregister().await?;
    assert!(registered_keys(&client).await?.is_empty());
    assert!(leases(&etcd).await?.is_empty());
    assert_eq!(states.finish().await, ["registered", "deregistered"]);
    // Deregistering twice is no error, and the id is free again.
    registered.deregister().await?;
    let again = registrar.register(instance("a")).await?;
    drop(registered);
    again.update(|instance| instance.weight = 7).await?;
    assert!(
        stored_value(&etcd, again.key())
            .await?
            .is_some_and(|v| v.contains(r#""weight":7"#))
    );
    Ok(())
}

#[tokio::test]
async fn instances_share_a_lease() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    let (a, b) = tokio::try_join!(
        registrar.register(instance("a")),
        registrar.register(Instance::new("other", ADDRESS)),
    )?;
    let shared = leases(&etcd).await?;
    assert_eq!(shared.len(), 1);
    for registration in [&a, &b] {
        assert_eq!(lease_of(&etcd, registration.key()).await?, Some(shared[0]));
    }
    assert!(matches!(
        registrar.register(instance("a")).await,
        Err(Error::InstanceAlreadyRegistered { key, .. }) if key == a.key()
    ));
    a.deregister().await?;
    assert_eq!(registered_keys(&client).await?, [b.key()]);
    assert_eq!(leases(&etcd).await?, shared);
    b.deregister().await?;
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn dropping_the_last_clone_deregisters() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    let (a, b) = (
        registrar.register(instance("a")).await?,
        registrar.register(instance("b")).await?,
    );
    let clone = a.clone();
    drop(a);
    // If the drop had deregistered `a`, it would be gone after this later work of the registrar.
    registrar
        .register(instance("c"))
        .await?
        .deregister()
        .await?;
    assert_eq!(registered_keys(&client).await?, [key("a"), key("b")]);
    drop(clone);
    wait_until("a is gone", async || {
        registered_keys(&client)
            .await
            .is_ok_and(|keys| keys == [key("b")])
    })
    .await;
    // A registration keeps its registrar alive.
    drop(registrar);
    b.update(|instance| instance.weight = 1).await?;
    drop(b);
    wait_until("all keys and leases are gone", async || {
        registered_keys(&client)
            .await
            .is_ok_and(|keys| keys.is_empty())
            && leases(&etcd).await.is_ok_and(|leases| leases.is_empty())
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn deregister_leaves_the_key_of_another_process() -> TestResult {
    let etcd = Etcd::start().await?;
    let (ours, theirs) = (
        connect(etcd.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let our_registrar = registrar(&ours, LONG_TTL);
    let their_registrar = registrar(&theirs, LONG_TTL);
    // `a` leaves by a deletion, because another instance stays; `b` leaves by revoking the lease.
    for id in ["a", "b"] {
        let ours = our_registrar.register(instance(id)).await?;
        let _stays = match id {
            "a" => Some(our_registrar.register(instance("stays")).await?),
            _ => None,
        };
        let theirs = their_registrar.register(instance(id).weight(7)).await?;
        let their_lease = lease_of(&etcd, &key(id)).await?;
        ours.deregister().await?;
        assert_eq!(lease_of(&etcd, &key(id)).await?, their_lease);
        let value = stored_value(&etcd, &key(id)).await?;
        assert!(value.is_some_and(|value| value.contains(r#""weight":7"#)));
        drop((ours, theirs));
    }
    Ok(())
}

#[tokio::test]
async fn leave_on_drains_and_deletes_before_it_resolves() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .ttl(LONG_TTL)
        .leave_grace(Duration::from_secs(2))
        .build()?;
    let registered = registrar.register(instance("a")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = SnapshotRecorder::new(&directory);
    let states = StateRecorder::new(&registered);
    let (signal, signalled) = oneshot::channel::<()>();
    let leaving = registered.leave_on(signalled);
    drop(registered);
    let leaving = tokio::spawn(leaving);
    // Before the signal it stays registered, even though no other handle exists.
    wait_until("the state is recorded", async || {
        states.seen_states() == ["registered"]
    })
    .await;
    assert_eq!(registered_keys(&client).await?, [key("a")]);

    let signalled_at = Instant::now();
    signal.send(()).unwrap();
    wait_for("it has left", leaving).await?;
    assert!(
        signalled_at.elapsed() >= Duration::from_secs(2),
        "the grace period was not kept"
    );
    assert!(registered_keys(&client).await?.is_empty());
    assert!(leases(&etcd).await?.is_empty());

    // Clients see that it drains before it disappears, so they can stop calling it in time.
    wait_until("the directory is empty", async || {
        directory.snapshot().is_empty()
    })
    .await;
    let seen_by_clients: Vec<Vec<bool>> = seen
        .all()
        .iter()
        .map(|snapshot| {
            snapshot
                .instances()
                .map(|instance| instance.draining)
                .collect()
        })
        .collect();
    assert_eq!(seen_by_clients, [vec![false], vec![true], vec![]]);
    let values: Vec<_> = history(&etcd)
        .await?
        .into_iter()
        .map(|change| change.value)
        .collect();
    let [Some(first), Some(second), None] = &values[..] else {
        panic!("expected a put, a change and a deletion, got {values:?}");
    };
    assert!(
        !first.contains("draining") && second.contains("draining"),
        "{values:?}"
    );
    let expected = ["registered", "draining", "deregistered"];
    assert_eq!(states.finish().await, expected);
    Ok(())
}

#[tokio::test]
async fn leaving_does_not_wait_for_an_unavailable_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect_impatiently(&etcd).await?;
    let registrar = Registrar::builder(&client)
        .leave_grace(Duration::ZERO)
        .build()?;
    let registered = registrar.register(instance("a")).await?;
    etcd.kill().await?;
    let left = registered.leave_on(std::future::ready(()));
    wait_for("it has left", left).await;
    // The key is deleted as soon as etcd is available again.
    etcd.start_again().await?;
    wait_until("the key is gone", async || {
        registered_keys(&client)
            .await
            .is_ok_and(|keys| keys.is_empty())
    })
    .await;
    Ok(())
}

/// A client whose requests do not time out within a test.
async fn connect_patiently(endpoint: String) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints([endpoint])
        .dial_timeout(PATIENCE)
        .request_timeout(PATIENCE * 10)
        .build()?;
    Ok(Client::new("patient", config).await?)
}

#[tokio::test]
async fn update_while_unready_returns_and_applies_later() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect_patiently(etcd.endpoint()).await?;
    let (ready_tx, ready) = futures::channel::mpsc::unbounded();
    let registrar = registrar(&client, LONG_TTL);
    let registered = registrar.register_while_ready(instance("a"), ready)?;
    let change = |to: &'static str| registered.update(|instance| instance.zone = Some(to.into()));
    let zone = async || {
        let value = stored_value(&etcd, registered.key()).await.unwrap();
        value.and_then(|value| {
            ["east", "west"]
                .into_iter()
                .find(|zone| value.contains(zone))
        })
    };
    for to in ["east", "west"] {
        wait_for("the update returns", change(to)).await?;
        assert_eq!(zone().await, None);
        ready_tx.unbounded_send(true)?;
        wait_until("it is registered", async || zone().await == Some(to)).await;
        ready_tx.unbounded_send(false)?;
        wait_until("it is not registered", async || {
            matches!(registered.state(), RegistrationState::Unready { .. })
        })
        .await;
    }
    // Once the client is closed, updates fail.
    let other = registrar.register(instance("b")).await?;
    client.close().await?;
    let is_closed = |result| matches!(result, Err(Error::Closed { .. }));
    assert!(is_closed(other.deregister().await));
    assert!(is_closed(
        wait_for("the update returns", change("north")).await
    ));
    Ok(())
}

#[tokio::test]
async fn becoming_unready_does_not_stop_a_drain() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect_patiently(proxy.endpoint()).await?;
    let (ready_tx, ready) = futures::channel::mpsc::unbounded();
    let registered = registrar(&client, LONG_TTL).register_while_ready(instance("a"), ready)?;
    ready_tx.unbounded_send(true)?;
    wait_until("it is registered", async || {
        is_stored(&etcd, &registered).await
    })
    .await;
    proxy.delay(Duration::from_millis(300));
    let leaving = registered.clone();
    let leaving = tokio::spawn(async move { leaving.drain(Duration::ZERO).await });
    wait_until("it is draining", async || registered.instance().draining).await;
    ready_tx.unbounded_send(false)?;
    wait_for("it has left", leaving).await??;
    assert_eq!(stored_value(&etcd, registered.key()).await?, None);
    Ok(())
}

/// A client whose requests time out after a second.
async fn connect_impatiently(etcd: &Etcd) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        .dial_timeout(PATIENCE)
        .request_timeout(Duration::from_secs(1))
        .build()?;
    Ok(Client::new("impatient", config).await?)
}

#[tokio::test]
async fn register_without_etcd_fails_and_leaves_no_key() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let config = Config::builder()
        .endpoints([proxy.endpoint()])
        .dial_timeout(PATIENCE)
        .request_timeout(Duration::from_secs(1))
        .build()?;
    let client = Client::new("impatient", config).await?;
    let registrar = registrar(&client, LONG_TTL);

    proxy.cut().await;
    let begin = Instant::now();
    let refused = registrar.register(instance("refused")).await.unwrap_err();
    let after_refusal = begin.elapsed();
    let message = refused.to_string();
    assert!(
        message.contains("grant a lease") && message.contains("Unavailable"),
        "{message}"
    );
    proxy.restore().await?;
    wait_until("the client is connected again", async || {
        client.ping().await.is_ok()
    })
    .await;

    proxy.blackhole();
    let begin = Instant::now();
    let silent = registrar.register(instance("silent")).await.unwrap_err();
    let after_silence = begin.elapsed();
    assert!(matches!(silent, Error::Timeout { .. }), "{silent}");
    proxy.restore().await?;

    // The upper bound is for busy machines; without a timeout it would never return.
    for took in [after_refusal, after_silence] {
        assert!(
            took >= Duration::from_secs(1) && took < Duration::from_secs(10),
            "{took:?}"
        );
    }
    // A request that was sent may still arrive; its key is deleted again.
    let next = registrar.register(instance("next")).await?;
    wait_until("only the next key exists", async || {
        registered_keys(&client)
            .await
            .is_ok_and(|keys| keys == [key("next")])
    })
    .await;
    // All attempts are over, so no other key can appear.
    next.deregister().await?;
    assert!(registered_keys(&client).await?.is_empty());
    for change in history(&etcd).await? {
        assert_eq!(change.key, key("next"));
    }
    Ok(())
}

#[tokio::test]
async fn register_eventually_waits_for_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    etcd.kill().await?;
    let registration = registrar.register_eventually(instance("a"))?;
    let states = StateRecorder::new(&registration);
    assert!(matches!(
        registration.state(),
        RegistrationState::Registering { .. }
    ));
    // Longer than an attempt and than the request timeout.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(matches!(
        registration.state(),
        RegistrationState::Registering { .. }
    ));

    etcd.start_again().await?;
    let available = Instant::now();
    wait_until("it is registered", async || {
        is_stored(&etcd, &registration).await
    })
    .await;
    let took = available.elapsed();
    assert!(took <= BACK_WITHIN, "it took {took:?}");
    wait_until("the states are recorded", async || {
        states.seen_states() == ["registering", "registered"]
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn update_is_stored_when_it_returns() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let registered = registrar(&client, LONG_TTL).register(instance("a")).await?;
    let lease = lease_of(&etcd, registered.key()).await?;
    // Slow enough to notice an `update` that does not wait for etcd.
    proxy.delay(Duration::from_millis(100));
    registered
        .update(|instance| {
            instance.weight = 7;
            instance.address = "10.0.0.2:80".to_owned();
        })
        .await?;
    let stored = stored_value(&etcd, registered.key()).await?.unwrap();
    assert!(
        stored.contains(r#""weight":7"#) && stored.contains("10.0.0.2:80"),
        "{stored}"
    );
    assert_eq!(lease_of(&etcd, registered.key()).await?, lease);
    assert_eq!(registered.instance().weight, 7);

    let error = registered
        .update(|instance| instance.id = "b".to_owned())
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Invalid { field: "id", .. }),
        "{error}"
    );
    let error = registered
        .update(|instance| instance.address.clear())
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Invalid {
                field: "address",
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(registered.instance().id, "a");
    assert_eq!(
        stored_value(&etcd, registered.key()).await?.unwrap(),
        stored
    );

    registered.deregister().await?;
    let error = registered
        .update(|instance| instance.weight = 8)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Deregistered { key, .. } if key == registered.key()),
        "{error}"
    );
    assert!(registered_keys(&client).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn failed_update_is_applied_on_recovery() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect_impatiently(&etcd).await?;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    etcd.kill().await?;
    let error = registered
        .update(|instance| instance.weight = 7)
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(tonic::Code::Unavailable), "{error}");
    etcd.start_again().await?;
    wait_until("the new value is stored", async || {
        stored_value(&etcd, registered.key())
            .await
            .is_ok_and(|value| value.is_some_and(|value| value.contains(r#""weight":7"#)))
    })
    .await;
    Ok(())
}

#[test]
fn crashed_process_disappears_after_the_ttl() -> TestResult {
    let observer_runtime = tokio::runtime::Runtime::new()?;
    let etcd = observer_runtime.block_on(Etcd::start())?;
    let observer = observer_runtime.block_on(connect(etcd.endpoint()));
    let directory = observer_runtime.block_on(Directory::watch(&observer, "greeter"))?;
    // etcd sees the crash of a process: its connections end without any request.
    let crashing_runtime = tokio::runtime::Runtime::new()?;
    let registered = crashing_runtime.block_on(async {
        let client = connect(etcd.endpoint()).await;
        registrar(&client, TTL).register(instance("a")).await
    })?;
    observer_runtime.block_on(wait_until("the directory shows it", async || {
        directory.snapshot().len() == 1
    }));
    crashing_runtime.shutdown_background();
    let crashed = Instant::now();
    observer_runtime.block_on(wait_until("the key is gone", async || {
        directory.snapshot().is_empty()
    }));
    let took = crashed.elapsed();
    // Renewals are a third of the TTL apart.
    assert!(
        took > TTL / 4,
        "the key was deleted after {took:?}, before its lease expired"
    );
    assert!(observer_runtime.block_on(leases(&etcd))?.is_empty());
    drop(registered);
    Ok(())
}

#[tokio::test]
async fn register_takes_over_an_existing_key() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    // Left behind by a process that has just crashed: the lease is about to expire.
    let old = client.grant(2).await?.id();
    let options = PutOptions::new().with_lease(old);
    client.put(key("a"), value("10.0.0.9:80"), options).await?;
    let registered = registrar(&client, LONG_TTL).register(instance("a")).await?;
    wait_until("the old lease is gone", async || {
        leases(&etcd)
            .await
            .is_ok_and(|leases| !leases.contains(&old))
    })
    .await;
    assert!(is_stored(&etcd, &registered).await);
    Ok(())
}

/// Another handle deregisters the instance while a change waits for etcd.
#[tokio::test]
async fn wait_for_a_change_ends_with_the_deregistration() -> TestResult {
    let mut config = Config::default();
    config.endpoints = vec!["127.0.0.1:1".to_owned()];
    let client = Client::connect_lazy("main", config)?;
    let registrar = Registrar::new(&client);
    let registration = registrar.register_eventually(Instance::new("greeter", "h:1"))?;
    let (updated, _) = tokio::join!(
        registration.update(|instance| instance.weight = 7),
        registration.deregister(),
    );
    let error = updated.unwrap_err();
    assert!(matches!(error, Error::Deregistered { .. }), "{error}");
    Ok(())
}
