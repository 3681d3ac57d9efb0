//! A registration holds for as long as its process lives, and leaves nothing behind.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::{Duration, Instant};

use futures::StreamExt;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{
    Client, Config, Directory, Error, Instance, PutOptions, Registrar, Registration,
    RegistrationState,
};
use support::history::history;
use support::{
    PATIENCE, Seen, TestResult, connect, eventually, key, keys, lease_of, leases, soon, stored,
    value,
};
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tower::discover::Change;

/// Short, so that waiting for it does not take long; not the minimum, so that a busy machine does
/// not lose leases that it should keep.
const TTL: Duration = Duration::from_secs(3);

/// Longer than any test: with it, what disappears was taken away and did not expire.
const LONG_TTL: Duration = Duration::from_secs(600);

/// G8: how long after etcd answers again a registration may take to be back.
const BACK_WITHIN: Duration = Duration::from_secs(2);

const ADDRESS: &str = "10.0.0.1:80";

fn registrar(client: &Client, ttl: Duration) -> Registrar {
    Registrar::builder(client).ttl(ttl).build().unwrap()
}

fn instance(id: &str) -> Instance {
    Instance::new("greeter", ADDRESS).id(id)
}

/// The kinds of states as they came, in the background: `Recovering` without when and why.
struct States {
    seen: std::sync::Arc<std::sync::Mutex<Vec<&'static str>>>,
    collector: AbortOnDropHandle<()>,
}

impl States {
    fn of(registration: &Registration) -> Self {
        let seen = std::sync::Arc::default();
        let into: std::sync::Arc<std::sync::Mutex<Vec<_>>> = std::sync::Arc::clone(&seen);
        let mut states = registration.states();
        let collector = tokio::spawn(async move {
            while let Some(state) = states.next().await {
                let mut seen: std::sync::MutexGuard<'_, Vec<_>> = into.lock().unwrap();
                // Of one kind one after the other: the reason has changed.
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

    fn seen(&self) -> Vec<&'static str> {
        self.seen.lock().unwrap().clone()
    }

    /// All of them, when the stream has ended.
    async fn until_their_end(self) -> Vec<&'static str> {
        soon("the states end", self.collector).await.unwrap();
        std::sync::Arc::try_unwrap(self.seen)
            .unwrap()
            .into_inner()
            .unwrap()
    }
}

fn kind(state: &RegistrationState) -> &'static str {
    match state {
        RegistrationState::Registering => "registering",
        RegistrationState::Registered => "registered",
        RegistrationState::Recovering { .. } => "recovering",
        RegistrationState::Draining => "draining",
        RegistrationState::Deregistered => "deregistered",
        RegistrationState::Superseded { .. } => "superseded",
        RegistrationState::Unready => "unready",
        other => panic!("unknown state {other:?}"),
    }
}

/// Whether it says that it is registered, and is: in etcd, under a lease that etcd knows.
async fn is_back(etcd: &Etcd, registration: &Registration) -> bool {
    registration.state() == RegistrationState::Registered
        && match lease_of(etcd, registration.key()).await {
            Ok(Some(lease)) => leases(etcd)
                .await
                .is_ok_and(|leases| leases.contains(&lease)),
            _ => false,
        }
}

#[tokio::test]
async fn given_etcd_was_down_for_longer_than_the_ttl_when_it_answers_then_registration_and_directory_are_back_within_2_s()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = Seen::by(&directory);
    let mut discovery = directory.discover();
    let inserted = soon("it is discovered", discovery.next()).await;
    assert!(
        matches!(&inserted, Some(Ok(Change::Insert(key, _))) if key.as_str() == registered.key())
    );
    let states = States::of(&registered);

    etcd.kill().await?;
    // The state says so only after the whole time to live without an answer.
    eventually("the time to live has passed", async || {
        kind(&registered.state()) == "recovering"
    })
    .await;
    // And it stays away, for so long that waits which keep growing would be far over the bound.
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert!(!directory.snapshot().freshness().is_live());
    // Resolves when etcd has answered for the first time.
    etcd.start_again().await?;
    let answered = Instant::now();
    eventually("both are back", async || {
        directory.snapshot().freshness().is_live() && is_back(&etcd, &registered).await
    })
    .await;
    let took = answered.elapsed();

    assert!(took <= BACK_WITHIN, "it took {took:?}");
    assert_eq!(states.seen(), ["registered", "recovering", "registered"]);
    for snapshot in seen.all() {
        assert_eq!(snapshot.len(), 1, "it was away in {snapshot:?}");
    }
    // No error, no end, and nothing to do for who has it.
    let more = tokio::time::timeout(Duration::from_millis(300), discovery.next()).await;
    assert!(more.is_err(), "{more:?}");
    Ok(())
}

#[tokio::test]
async fn given_the_lease_expired_while_the_network_was_cut_when_it_is_back_then_so_is_the_registration_within_2_s()
-> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let observer = connect(etcd.endpoint()).await;
    let directory = Directory::watch(&observer, "greeter").await?;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let first = lease_of(&etcd, registered.key()).await?;
    eventually("it is seen", async || directory.snapshot().len() == 1).await;
    proxy.cut().await;
    eventually("the lease has expired", async || {
        directory.snapshot().is_empty()
    })
    .await;
    assert!(leases(&etcd).await?.is_empty());

    proxy.restore().await?;
    let reachable = Instant::now();
    eventually("it is back", async || {
        directory.snapshot().len() == 1 && is_back(&etcd, &registered).await
    })
    .await;
    let took = reachable.elapsed();

    assert!(took <= BACK_WITHIN, "it took {took:?}");
    assert_ne!(lease_of(&etcd, registered.key()).await?, first);
    Ok(())
}

#[tokio::test]
async fn given_its_lease_is_revoked_then_the_registration_comes_back_under_another() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, TTL);
    let (a, b) = (
        registrar.register(instance("a")).await?,
        registrar.register(instance("b")).await?,
    );
    let states = States::of(&a);
    let first = lease_of(&etcd, a.key()).await?.unwrap();
    client.revoke(first).await?;
    assert!(keys(&client).await?.is_empty());
    eventually("both are back", async || {
        keys(&client)
            .await
            .is_ok_and(|keys| keys == [key("a"), key("b")])
    })
    .await;
    let second = lease_of(&etcd, a.key()).await?.unwrap();
    assert_ne!(second, first);
    assert_eq!(lease_of(&etcd, b.key()).await?, Some(second));
    eventually("its states tell", async || {
        states.seen() == ["registered", "recovering", "registered"]
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_a_wiped_etcd_then_the_registration_comes_back() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    etcd.wipe_and_restart().await?;
    eventually("it is back, and seen", async || {
        let snapshot = directory.snapshot();
        is_back(&etcd, &registered).await && snapshot.freshness().is_live() && snapshot.len() == 1
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_it_is_held_for_several_ttls_then_it_is_never_away() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registered = registrar(&client, TTL).register(instance("a")).await?;
    let states = States::of(&registered);
    tokio::time::sleep(TTL * 5 / 2).await;
    let history = history(&etcd).await?;
    assert_eq!(history.len(), 1, "{history:?}");
    assert!(stored(&etcd, registered.key()).await?.is_some());
    assert_eq!(states.seen(), ["registered"]);
    Ok(())
}

#[tokio::test]
async fn given_deregister_then_the_key_is_deleted_the_lease_revoked_and_the_states_end()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    let registered = registrar.register(instance("a")).await?;
    assert_eq!(registered.state(), RegistrationState::Registered);
    assert_eq!(leases(&etcd).await?.len(), 1);
    let states = States::of(&registered);
    eventually("the first state is seen", async || {
        !states.seen().is_empty()
    })
    .await;
    registered.deregister().await?;
    assert!(keys(&client).await?.is_empty());
    assert!(leases(&etcd).await?.is_empty());
    assert_eq!(
        states.until_their_end().await,
        ["registered", "deregistered"]
    );
    // Once more is no error, and the id is free again.
    registered.deregister().await?;
    let again = registrar.register(instance("a")).await?;
    drop(registered);
    again.update(|instance| instance.weight = 7).await?;
    assert!(
        stored(&etcd, again.key())
            .await?
            .is_some_and(|v| v.contains(r#""weight":7"#))
    );
    Ok(())
}

#[tokio::test]
async fn given_two_instances_then_they_share_a_lease_and_one_that_leaves_takes_only_its_key()
-> TestResult {
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
        Err(Error::InstanceAlreadyRegistered { key }) if key == a.key()
    ));
    a.deregister().await?;
    assert_eq!(keys(&client).await?, [b.key()]);
    assert_eq!(leases(&etcd).await?, shared);
    b.deregister().await?;
    assert!(leases(&etcd).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn given_the_last_clone_is_dropped_then_it_is_withdrawn_long_before_its_ttl() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    let (a, b) = (
        registrar.register(instance("a")).await?,
        registrar.register(instance("b")).await?,
    );
    let clone = a.clone();
    drop(a);
    // Something later through the same registrar: had the drop withdrawn it, it would be gone.
    registrar
        .register(instance("c"))
        .await?
        .deregister()
        .await?;
    assert_eq!(keys(&client).await?, [key("a"), key("b")]);
    drop(clone);
    eventually("a is gone", async || {
        keys(&client).await.is_ok_and(|keys| keys == [key("b")])
    })
    .await;
    // The registrar lives through its registrations.
    drop(registrar);
    b.update(|instance| instance.weight = 1).await?;
    drop(b);
    eventually("all is gone", async || {
        keys(&client).await.is_ok_and(|keys| keys.is_empty())
            && leases(&etcd).await.is_ok_and(|leases| leases.is_empty())
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_another_process_took_the_key_over_when_we_leave_then_its_registration_stays()
-> TestResult {
    let etcd = Etcd::start().await?;
    let (ours, theirs) = (
        connect(etcd.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let our_registrar = registrar(&ours, LONG_TTL);
    let their_registrar = registrar(&theirs, LONG_TTL);
    // `a` leaves by deletion, since `b` stays; then `b` leaves with the lease.
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
        let value = stored(&etcd, &key(id)).await?;
        assert!(value.is_some_and(|value| value.contains(r#""weight":7"#)));
        drop((ours, theirs));
    }
    Ok(())
}

#[tokio::test]
async fn given_leave_on_when_the_signal_comes_then_it_drains_is_deleted_and_only_then_resolves()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .ttl(LONG_TTL)
        .leave_grace(Duration::from_secs(2))
        .build()?;
    let registered = registrar.register(instance("a")).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    let seen = Seen::by(&directory);
    let states = States::of(&registered);
    let (signal, signalled) = oneshot::channel::<()>();
    let leaving = registered.leave_on(signalled);
    drop(registered);
    let leaving = tokio::spawn(leaving);
    // Nothing happens before the signal, and it stays registered though no other handle is held.
    eventually("its state is seen", async || {
        states.seen() == ["registered"]
    })
    .await;
    assert_eq!(keys(&client).await?, [key("a")]);

    let signalled_at = Instant::now();
    signal.send(()).unwrap();
    soon("it has left", leaving).await?;
    assert!(
        signalled_at.elapsed() >= Duration::from_secs(2),
        "the grace is kept"
    );
    assert!(keys(&client).await?.is_empty());
    assert!(leases(&etcd).await?.is_empty());

    // Clients saw that it drains before they saw it go: they had time to turn away from it.
    eventually("clients see that it is gone", async || {
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
    assert_eq!(states.until_their_end().await, expected);
    Ok(())
}

#[tokio::test]
async fn given_etcd_is_away_when_leaving_then_the_server_may_stop_all_the_same() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect_impatiently(&etcd).await?;
    let registrar = Registrar::builder(&client)
        .leave_grace(Duration::ZERO)
        .build()?;
    let registered = registrar.register(instance("a")).await?;
    etcd.kill().await?;
    let left = registered.leave_on(std::future::ready(()));
    soon("it has left", left).await;
    // And it is withdrawn as soon as etcd is there again.
    etcd.start_again().await?;
    eventually("it is gone", async || {
        keys(&client).await.is_ok_and(|keys| keys.is_empty())
    })
    .await;
    Ok(())
}

/// With a request time-out that no test waits for: nothing ends because that is over.
async fn connect_patiently(endpoint: String) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints([endpoint])
        .dial_timeout(PATIENCE)
        .request_timeout(PATIENCE * 10)
        .build()?;
    Ok(Client::new("patient", config).await?)
}

#[tokio::test]
async fn given_an_instance_that_is_not_ready_when_it_is_changed_then_that_returns_and_is_put_once_it_is()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect_patiently(etcd.endpoint()).await?;
    let (tell, ready) = futures::channel::mpsc::unbounded();
    let registrar = registrar(&client, LONG_TTL);
    let registered = registrar.register_while_ready(instance("a"), ready)?;
    let change = |to: &'static str| registered.update(|instance| instance.zone = Some(to.into()));
    let zone = async || {
        let value = stored(&etcd, registered.key()).await.unwrap();
        value.and_then(|value| {
            ["east", "west"]
                .into_iter()
                .find(|zone| value.contains(zone))
        })
    };
    for to in ["east", "west"] {
        soon("it is changed", change(to)).await?;
        assert_eq!(zone().await, None);
        tell.unbounded_send(true)?;
        eventually("it is in", async || zone().await == Some(to)).await;
        tell.unbounded_send(false)?;
        eventually("it is out", async || {
            registered.state() == RegistrationState::Unready
        })
        .await;
    }
    // Nothing is to come any more once the client is closed.
    let other = registrar.register(instance("b")).await?;
    client.close().await?;
    let is_closed = |result| matches!(result, Err(Error::Closed { .. }));
    assert!(is_closed(other.deregister().await));
    assert!(is_closed(soon("it is changed", change("north")).await));
    Ok(())
}

#[tokio::test]
async fn given_an_instance_that_leaves_when_it_is_not_ready_before_it_is_marked_then_it_leaves_all_the_same()
-> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect_patiently(proxy.endpoint()).await?;
    let (tell, ready) = futures::channel::mpsc::unbounded();
    let registered = registrar(&client, LONG_TTL).register_while_ready(instance("a"), ready)?;
    tell.unbounded_send(true)?;
    eventually("it is in", async || is_back(&etcd, &registered).await).await;
    proxy.delay(Duration::from_millis(300));
    let leaving = registered.clone();
    let leaving = tokio::spawn(async move { leaving.drain(Duration::ZERO).await });
    eventually("it is to be marked", async || {
        registered.instance().draining
    })
    .await;
    tell.unbounded_send(false)?;
    soon("it has left", leaving).await??;
    assert_eq!(stored(&etcd, registered.key()).await?, None);
    Ok(())
}

async fn connect_impatiently(etcd: &Etcd) -> TestResult<Client> {
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        .dial_timeout(PATIENCE)
        .request_timeout(Duration::from_secs(1))
        .build()?;
    Ok(Client::new("impatient", config).await?)
}

#[tokio::test]
async fn given_etcd_is_unreachable_then_register_fails_in_time_says_why_and_leaves_nothing_behind()
-> TestResult {
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
    eventually("it is connected again", async || {
        client.ping().await.is_ok()
    })
    .await;

    proxy.blackhole();
    let begin = Instant::now();
    let silent = registrar.register(instance("silent")).await.unwrap_err();
    let after_silence = begin.elapsed();
    assert!(matches!(silent, Error::Timeout { .. }), "{silent}");
    proxy.restore().await?;

    // It tries for that long and no longer; the room above is for busy machines.
    for took in [after_refusal, after_silence] {
        assert!(
            took >= Duration::from_secs(1) && took < Duration::from_secs(10),
            "{took:?}"
        );
    }
    // What was on its way may arrive, and is taken away again.
    let next = registrar.register(instance("next")).await?;
    eventually("nothing but the next is there", async || {
        keys(&client).await.is_ok_and(|keys| keys == [key("next")])
    })
    .await;
    // Every attempt is over, so that it stays so.
    next.deregister().await?;
    assert!(keys(&client).await?.is_empty());
    for change in history(&etcd).await? {
        assert_eq!(change.key, key("next"));
    }
    Ok(())
}

#[tokio::test]
async fn given_etcd_is_down_then_register_eventually_gets_there_once_it_is_up() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    etcd.kill().await?;
    let registration = registrar.register_eventually(instance("a"))?;
    let states = States::of(&registration);
    assert_eq!(registration.state(), RegistrationState::Registering);
    // Longer than one attempt, and than a request may take.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(registration.state(), RegistrationState::Registering);

    etcd.start_again().await?;
    let answered = Instant::now();
    eventually("it is registered", async || {
        is_back(&etcd, &registration).await
    })
    .await;
    let took = answered.elapsed();
    assert!(took <= BACK_WITHIN, "it took {took:?}");
    eventually("its states tell", async || {
        states.seen() == ["registering", "registered"]
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_an_update_then_it_is_in_etcd_when_it_returns_and_the_key_cannot_change() -> TestResult
{
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let registered = registrar(&client, LONG_TTL).register(instance("a")).await?;
    let lease = lease_of(&etcd, registered.key()).await?;
    // Slow enough that one who does not wait for etcd would be noticed; each of several pieces is held back.
    proxy.delay(Duration::from_millis(100));
    registered
        .update(|instance| {
            instance.weight = 7;
            instance.address = "10.0.0.2:80".to_owned();
        })
        .await?;
    let stored_now = stored(&etcd, registered.key()).await?.unwrap();
    assert!(
        stored_now.contains(r#""weight":7"#) && stored_now.contains("10.0.0.2:80"),
        "{stored_now}"
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
    assert_eq!(stored(&etcd, registered.key()).await?.unwrap(), stored_now);

    registered.deregister().await?;
    let error = registered
        .update(|instance| instance.weight = 8)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Deregistered { key } if key == registered.key()),
        "{error}"
    );
    assert!(keys(&client).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn given_an_update_while_etcd_is_down_then_the_newest_value_is_what_comes_back() -> TestResult
{
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
    eventually("the new value is there", async || {
        stored(&etcd, registered.key())
            .await
            .is_ok_and(|value| value.is_some_and(|value| value.contains(r#""weight":7"#)))
    })
    .await;
    Ok(())
}

#[test]
fn given_its_process_ends_without_a_word_then_the_key_is_gone_after_the_ttl() -> TestResult {
    let observing = tokio::runtime::Runtime::new()?;
    let etcd = observing.block_on(Etcd::start())?;
    let observer = observing.block_on(connect(etcd.endpoint()));
    let directory = observing.block_on(Directory::watch(&observer, "greeter"))?;
    // The crash of a process, as etcd sees it: connections end, nothing is said.
    let crashing = tokio::runtime::Runtime::new()?;
    let registered = crashing.block_on(async {
        let client = connect(etcd.endpoint()).await;
        registrar(&client, TTL).register(instance("a")).await
    })?;
    observing.block_on(eventually("it is seen", async || {
        directory.snapshot().len() == 1
    }));
    crashing.shutdown_background();
    let crashed = Instant::now();
    observing.block_on(eventually("it is gone", async || {
        directory.snapshot().is_empty()
    }));
    let took = crashed.elapsed();
    // The last renewal was at most a third of the time to live before the crash.
    assert!(
        took > TTL / 2,
        "it was withdrawn after {took:?}, and not by its lease"
    );
    assert!(observing.block_on(leases(&etcd))?.is_empty());
    drop(registered);
    Ok(())
}

#[tokio::test]
async fn given_a_key_that_somebody_else_wrote_then_registering_takes_it_over() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    // Left behind by a process that crashed a moment ago: its lease is about to expire.
    let old = client.grant(2).await?.id();
    let options = PutOptions::new().with_lease(old);
    client.put(key("a"), value("10.0.0.9:80"), options).await?;
    let registered = registrar(&client, LONG_TTL).register(instance("a")).await?;
    eventually("the old lease is gone", async || {
        leases(&etcd)
            .await
            .is_ok_and(|leases| !leases.contains(&old))
    })
    .await;
    assert!(is_back(&etcd, &registered).await);
    Ok(())
}
