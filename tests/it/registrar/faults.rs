//! Registrations recover from outages, changes by other clients, and pauses of the process.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::support::backup::Backup;
use crate::support::balanced::{Load, wait_until_ready};
use crate::support::history::history;
use crate::support::registered_process::RegisteredProcess;
use crate::support::{
    PATIENCE, TestResult, call_count, connect, key, lease_of, leases, stored_value, wait_for,
    wait_until,
};
use futures::StreamExt;
use futures::future::try_join_all;
use goo_etcd::etcd_client::{EventType, WatchOptions};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{
    BalancedChannel, Client, Config, Error, Instance, PutOptions, Registrar, Registration,
    RegistrationState,
};
use nix::sys::signal::Signal;
use tonic::Code;

/// Above etcd's minimum, so that no lease expires on a busy machine.
const TTL: Duration = Duration::from_secs(3);

/// Longer than any test, so that a recovery cannot come from the next renewal.
const LONG_TTL: Duration = Duration::from_secs(600);

/// The time in which a change by another client must be undone, on a busy machine. Usually it takes
/// far less than a second; found only by the next renewal, it would take minutes ([`LONG_TTL`]).
const UNDONE_WITHIN: Duration = Duration::from_secs(10);

/// The time in which a registration must be back after etcd responds again. The promise is 2 s; the
/// rest is for busy machines. A pause that kept growing during the outage would last longer.
const BACK_WITHIN: Duration = Duration::from_secs(6);

/// The window in which registrations recover that lost their leases at the same time.
const SPREAD: Duration = Duration::from_millis(500);

fn instance(id: &str) -> Instance {
    Instance::new("greeter", "10.0.0.1:80").id(id)
}

fn registrar(client: &Client, ttl: Duration) -> Registrar {
    Registrar::builder(client).ttl(ttl).build().unwrap()
}

fn is_registered(registration: &Registration) -> bool {
    registration.state() == RegistrationState::Registered
}

/// Registrars with a connection each, as if of several processes; some have several instances.
async fn fleet(endpoint: &str, processes: usize, ttl: Duration) -> TestResult<Vec<Registration>> {
    let mut fleet = Vec::new();
    for n in 0..processes {
        let client = connect(endpoint).await;
        let registrar = registrar(&client, ttl);
        for of in 0..1 + n % 3 {
            fleet.push(registrar.register(instance(&format!("{n}-{of}"))).await?);
        }
    }
    Ok(fleet)
}

/// The times from `started` until the first instance of each process is written, counting changes
/// since a revision.
async fn recovery_times(
    started: Instant,
    etcd: &Etcd,
    from_revision: i64,
    processes: usize,
) -> TestResult<Vec<Duration>> {
    let options = WatchOptions::new()
        .with_prefix()
        .with_start_revision(from_revision);
    let mut client = etcd.client().await?;
    let mut changes = client.watch("services/greeter/", Some(options)).await?;
    let mut back = BTreeMap::new();
    while back.len() < processes {
        let message = wait_for("a registration is written", changes.message()).await?;
        for event in message.ok_or("the watch has ended")?.events() {
            let Some(kv) = event.kv() else { continue };
            let key = kv.key_str()?;
            if event.event_type() == EventType::Put && key.ends_with("-0") {
                back.entry(key.to_owned()).or_insert(started.elapsed());
            }
        }
    }
    Ok(back.into_values().collect())
}

/// Whether the times are spread at random over a window of the length `over`. Then a fifth of the
/// window has about a fifth of them, or a half if the machine paused. Without jitter it has
/// practically all.
fn is_spread(took: &[Duration], over: Duration) -> bool {
    let part = over / 5;
    let within = |from: &Duration| {
        let part = *from..*from + part;
        took.iter().filter(|took| part.contains(*took)).count()
    };
    let most = took.iter().map(within).max().unwrap_or_default();
    println!("{most} of {} within {part:?}: {took:?}", took.len());
    most <= took.len() * 4 / 5
}

/// Waits until all registrations are registered and have keys under live leases.
async fn wait_until_registered(etcd: &Etcd, fleet: &[Registration]) -> TestResult {
    let mut client = etcd.client().await?;
    let started = Instant::now();
    loop {
        let prefix = goo_etcd::GetOptions::new().with_prefix();
        let found = client.get("services/greeter/", Some(prefix)).await?;
        let live: BTreeSet<i64> = leases(etcd).await?.into_iter().collect();
        let back = found.kvs().iter().filter(|kv| live.contains(&kv.lease()));
        let back = back.count();
        if back == fleet.len() && fleet.iter().all(is_registered) {
            return Ok(());
        }
        assert!(started.elapsed() < PATIENCE, "{back} of {}", fleet.len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn fleet_returns_after_an_outage_of_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let fleet = fleet(&etcd.endpoint(), 20, TTL).await?;
    etcd.kill().await?;
    tokio::time::sleep(TTL * 3).await;
    etcd.start_again().await?;
    let available = Instant::now();
    wait_until_registered(&etcd, &fleet).await?;
    let took = available.elapsed();
    assert!(took <= BACK_WITHIN, "it took {took:?}");
    Ok(())
}

/// Counts the connections when they arrive, not when etcd serves them: etcd would serve all
/// connections together that arrived while it was starting. The proxy therefore opens only when
/// etcd responds.
#[tokio::test]
async fn fleet_reconnects_at_random_times() -> TestResult {
    const PROCESSES: usize = 60;
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let fleet = fleet(&proxy.endpoint(), PROCESSES, TTL).await?;
    proxy.cut().await;
    etcd.kill().await?;
    tokio::time::sleep(TTL * 3).await;
    etcd.start_again().await?;
    // Several rounds, because a pause of the machine may bring those of one round together.
    let mut all = Vec::new();
    for _ in 0..3 {
        let before = proxy.accepted();
        proxy.restore().await?;
        let reached = Instant::now();
        let came = async {
            let mut came = Vec::new();
            while came.len() < PROCESSES {
                let count = usize::try_from(proxy.accepted() - before).unwrap();
                came.resize(count, reached.elapsed());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            came
        };
        let came = wait_for("a connection", came).await;
        assert!(came.iter().max() <= Some(&BACK_WITHIN), "{came:?}");
        wait_until_registered(&etcd, &fleet).await?;
        all.extend(came);
        proxy.cut().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    // The jitter is a part of the pause between two attempts to connect.
    assert!(is_spread(&all, Duration::from_millis(250)), "{all:?}");
    Ok(())
}

#[tokio::test]
async fn fleet_returns_to_a_wiped_etcd_at_random_times() -> TestResult {
    let etcd = Etcd::start().await?;
    let fleet = fleet(&etcd.endpoint(), 20, TTL).await?;
    etcd.wipe_and_restart().await?;
    let available = Instant::now();
    let back = recovery_times(available, &etcd, 1, 20).await?;
    wait_until_registered(&etcd, &fleet).await?;
    let took = available.elapsed();
    assert!(took <= BACK_WITHIN, "it took {took:?}");
    // At least half of the window, even if the machine paused meanwhile.
    let (first, last) = (back.iter().min(), back.iter().max());
    let over = last.zip(first).map(|(last, first)| *last - *first);
    println!("spread over {over:?}");
    assert!(over > Some(SPREAD / 2), "{back:?}");
    Ok(())
}

/// All leases end together while etcd is available, so that only the registrars' own jitter spreads
/// the recovery.
#[tokio::test]
async fn fleet_recovers_revoked_leases_at_random_times() -> TestResult {
    const PROCESSES: usize = 20;
    const ROUNDS: usize = 5;
    let etcd = Etcd::start().await?;
    let fleet = fleet(&etcd.endpoint(), PROCESSES, LONG_TTL).await?;
    wait_until("all registrars watch their keys", async || {
        crate::support::watcher_count(&etcd).await.unwrap() >= PROCESSES as u64
    })
    .await;
    let client = etcd.client().await?;
    let mut all = Vec::new();
    for _ in 0..ROUNDS {
        let revision = client.kv_client().get("now", None).await?;
        let revision = revision.header().ok_or("a header")?.revision();
        let leases = leases(&etcd).await?;
        assert_eq!(leases.len(), PROCESSES);
        let revoked = leases.into_iter().map(|lease| {
            let mut leases = client.lease_client();
            async move { leases.revoke(lease).await }
        });
        let started = Instant::now();
        let revoked = async { Ok(try_join_all(revoked).await?) };
        let back = recovery_times(started, &etcd, revision + 1, PROCESSES);
        let (_, took) = tokio::try_join!(revoked, back)?;
        assert!(took.iter().max() <= Some(&UNDONE_WITHIN), "{took:?}");
        all.extend(took);
        wait_until_registered(&etcd, &fleet).await?;
    }
    assert!(is_spread(&all, SPREAD), "{all:?}");
    Ok(())
}

/// Changes the key of the only registration three times, and waits each time until the change is
/// undone.
async fn assert_undone(change: impl AsyncFn(&Etcd, &str) -> TestResult) -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registration = registrar(&client, LONG_TTL).register(instance("a")).await?;
    let key = registration.key();
    // Waits for the watch, because changes before it are found by a read.
    wait_until("the key is watched", async || {
        let page = crate::support::metrics_page(&etcd).await.unwrap();
        page.contains("etcd_debugging_mvcc_watcher_total 1")
    })
    .await;
    let value = stored_value(&etcd, key).await?;
    for _ in 0..3 {
        change(&etcd, key).await?;
        let started = Instant::now();
        wait_until("the key is restored", async || {
            let lease = lease_of(&etcd, key).await.unwrap();
            is_registered(&registration)
                && lease.is_some_and(|lease| lease != 0)
                && stored_value(&etcd, key).await.unwrap() == value
                && leases(&etcd).await.unwrap() == [lease.unwrap()]
        })
        .await;
        let took = started.elapsed();
        assert!(took <= UNDONE_WITHIN, "it took {took:?}");
    }
    Ok(())
}

#[tokio::test]
async fn revoked_lease_is_replaced() -> TestResult {
    assert_undone(async |etcd, key| {
        let lease = lease_of(etcd, key).await?.ok_or("no key")?;
        etcd.client().await?.lease_client().revoke(lease).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn deleted_key_is_restored() -> TestResult {
    assert_undone(async |etcd, key| {
        etcd.client().await?.delete(key, None).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn overwritten_key_is_restored() -> TestResult {
    assert_undone(async |etcd, key| {
        etcd.client().await?.put(key, "by hand", None).await?;
        Ok(())
    })
    .await
}

/// Without a lease the key would look right, but outlive its process.
#[tokio::test]
async fn same_value_without_lease_is_put_under_the_lease() -> TestResult {
    assert_undone(async |etcd, key| {
        let value = stored_value(etcd, key).await?.ok_or("no key")?;
        etcd.client().await?.put(key, value, None).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn value_overwritten_under_our_lease_is_restored() -> TestResult {
    assert_undone(async |etcd, key| {
        let lease = lease_of(etcd, key).await?.ok_or("no key")?;
        let options = PutOptions::new().with_lease(lease);
        etcd.client()
            .await?
            .put(key, "by hand", Some(options))
            .await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn paused_process_returns_after_resuming() -> TestResult {
    let etcd = Etcd::start().await?;
    let server = RegisteredProcess::start(&etcd, TTL).await;
    let key = key(server.address());
    server.pause().await;
    tokio::time::sleep(TTL * 2).await;
    wait_until("the key has expired", async || {
        stored_value(&etcd, &key).await.unwrap().is_none()
    })
    .await;
    server.signal(Signal::SIGCONT);
    let resumed = Instant::now();
    wait_until("the key is restored", async || {
        stored_value(&etcd, &key).await.unwrap().is_some()
    })
    .await;
    let took = resumed.elapsed();
    assert!(took <= UNDONE_WITHIN, "it took {took:?}");
    Ok(())
}

fn is_superseded(registration: &Registration) -> bool {
    matches!(registration.state(), RegistrationState::Superseded { .. })
}

/// A probe would grant a lease with the same id; a process that died then would leave its keys
/// behind under it.
#[tokio::test]
async fn missing_lease_is_replaced_without_a_probe() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registration = registrar(&client, TTL).register(instance("a")).await?;
    let lease = lease_of(&etcd, registration.key()).await?.ok_or("no key")?;
    // The key is under another lease, so that no event of the key reports the end of ours.
    let theirs = etcd.client().await?.lease_grant(600, None).await?.id();
    let with_theirs = PutOptions::new().with_lease(theirs);
    etcd.client()
        .await?
        .put(registration.key(), "theirs", Some(with_theirs))
        .await?;
    wait_until("it is superseded", async || is_superseded(&registration)).await;
    let granted = call_count(&etcd, "LeaseGrant").await?;
    etcd.client().await?.lease_revoke(lease).await?;
    wait_until("another lease is granted", async || {
        let leases = leases(&etcd).await.unwrap();
        leases.iter().any(|id| ![lease, theirs].contains(id))
    })
    .await;
    assert_eq!(call_count(&etcd, "LeaseGrant").await? - granted, 1);
    Ok(())
}

#[tokio::test]
async fn later_registration_wins_and_the_earlier_returns() -> TestResult {
    let etcd = Etcd::start().await?;
    let (a, b) = (
        connect(etcd.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let earlier = registrar(&a, TTL)
        .register(instance("same").version("1"))
        .await?;
    let later = registrar(&b, TTL)
        .register(instance("same").version("2"))
        .await?;
    let has = async |version: &str| {
        let value = stored_value(&etcd, earlier.key())
            .await
            .unwrap()
            .unwrap_or_default();
        value.contains(&format!(r#""version":"{version}""#))
    };
    wait_until("the earlier is superseded", async || {
        is_superseded(&earlier)
    })
    .await;
    // The later keeps the key during several renewals and while the earlier is updated.
    let mut client = etcd.client().await?;
    let before = client.get(earlier.key(), None).await?.kvs()[0].mod_revision();
    let refused = earlier
        .update(|instance| instance.weight = 7)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, Error::Superseded { key, .. } if key == earlier.key()),
        "{refused}"
    );
    tokio::time::sleep(TTL * 2).await;
    assert!(is_superseded(&earlier) && is_registered(&later) && has("2").await);
    let after = client.get(earlier.key(), None).await?.kvs()[0].mod_revision();
    assert_eq!(before, after, "the key was written again");

    later.deregister().await?;
    wait_until("the earlier is back, as changed", async || {
        is_registered(&earlier) && has("1").await
    })
    .await;
    assert!(
        stored_value(&etcd, earlier.key())
            .await?
            .unwrap()
            .contains(r#""weight":7"#)
    );

    // The same if the later disappears without deregistering.
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let cut_off = connect(proxy.endpoint()).await;
    let later = registrar(&cut_off, TTL)
        .register(instance("same").version("3"))
        .await?;
    wait_until("the earlier is superseded", async || {
        is_superseded(&earlier)
    })
    .await;
    assert!(has("3").await);
    proxy.cut().await;
    wait_until("the earlier is back", async || is_registered(&earlier)).await;
    assert!(has("1").await);
    // When the later reconnects, it is superseded.
    proxy.restore().await?;
    wait_until("the later is superseded", async || is_superseded(&later)).await;
    assert!(has("1").await && is_registered(&earlier));
    Ok(())
}

/// Both lose their leases when etcd is wiped; then one has the key, and the other leaves it alone.
#[tokio::test]
async fn two_that_recover_together_do_not_fight() -> TestResult {
    let etcd = Etcd::start().await?;
    let (a, b) = (
        connect(etcd.endpoint()).await,
        connect(etcd.endpoint()).await,
    );
    let one = registrar(&a, TTL)
        .register(instance("same").version("1"))
        .await?;
    let two = registrar(&b, TTL)
        .register(instance("same").version("2"))
        .await?;
    wait_until("the earlier is superseded", async || is_superseded(&one)).await;
    let value_of_two = stored_value(&etcd, two.key()).await?;
    assert!(value_of_two.is_some());
    etcd.wipe_and_restart().await?;
    // The earlier one may write the key first; then the later one takes it once.
    wait_until("the later one has the key", async || {
        let value = stored_value(&etcd, two.key()).await.unwrap();
        value == value_of_two && is_registered(&two) && is_superseded(&one)
    })
    .await;
    let mut client = etcd.client().await?;
    let before = client.get(one.key(), None).await?.kvs()[0].mod_revision();
    tokio::time::sleep(TTL).await;
    let after = client.get(one.key(), None).await?.kvs()[0].mod_revision();
    assert_eq!(before, after, "the key was written again");
    Ok(())
}

/// The other process ended after the snapshot. Its key and its lease are back in the restored etcd,
/// and the lease counts from zero.
#[tokio::test]
async fn older_key_of_a_restored_etcd_does_not_supersede() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, TTL);
    let _stays = registrar.register(instance("stays")).await?;
    let gone = registrar.register(instance("gone")).await?;
    let theirs = etcd.client().await?.lease_grant(600, None).await?.id();
    let key = key("same");
    let with_theirs = PutOptions::new().with_lease(theirs);
    etcd.client()
        .await?
        .put(key.as_str(), "theirs", Some(with_theirs))
        .await?;
    let backup = Backup::take(&etcd).await?;

    gone.deregister().await?;
    let registration = registrar.register(instance("same")).await?;
    etcd.client().await?.lease_revoke(theirs).await?;
    backup.restore(&etcd).await?;
    wait_until("it is back", async || {
        let lease = lease_of(&etcd, &key).await.unwrap();
        lease.is_some_and(|lease| lease != theirs) && is_registered(&registration)
    })
    .await;
    // Its key was under the lease of the instance that stays.
    wait_until("the deregistered instance is gone again", async || {
        stored_value(&etcd, gone.key()).await.unwrap().is_none()
    })
    .await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_fails_no_call() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut servers = Vec::new();
    let proxy = Proxy::start(etcd.endpoint()).await?;
    servers.push(RegisteredProcess::start_through(proxy.endpoint(), &etcd, TTL).await);
    for _ in 0..2 {
        servers.push(RegisteredProcess::start(&etcd, TTL).await);
    }
    // Delays the requests that the first server sends without waiting for them.
    proxy.delay(Duration::from_millis(50));
    let channel = BalancedChannel::connect(&client, "greeter").await?;
    wait_until_ready(&channel, 3).await;
    let load = Load::start(&channel, 16);
    for server in &servers {
        load.wait_until_called(server.address()).await;
    }
    let mut leaving = servers.remove(0);
    leaving.signal(Signal::SIGTERM);
    let key = key(leaving.address());
    // The server itself reports that the key was gone while it still listened. The test could not
    // tell, because less time lies between the two than an event of etcd takes.
    let left = leaving.read_leaving().await;
    assert!(!left.has_key && left.is_listening, "{left:?}");
    let changes = history(&etcd).await?;
    let gone = changes.iter().find(|c| c.key == key && c.value.is_none());
    let gone = gone.ok_or("the key was not deleted")?.revision;
    assert!(gone <= left.revision, "deleted at {gone}, after {left:?}");
    wait_until("the listener is closed", async || {
        tokio::net::TcpStream::connect(leaving.address())
            .await
            .is_err()
    })
    .await;
    assert_eq!(stored_value(&etcd, &key).await?, None);
    leaving.wait().await;
    load.wait_for_calls(500).await;
    load.finish().await.assert_no_failure();
    Ok(())
}

#[tokio::test]
async fn leases_hold_at_most_100_instances() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = registrar(&client, LONG_TTL);
    let ids: Vec<String> = (0..150).map(|n| format!("{n:03}")).collect();
    let registering = ids.iter().map(|id| registrar.register(instance(id)));
    let mut registered = try_join_all(registering).await?;
    let mut counts = Vec::new();
    for lease in leases(&etcd).await? {
        let options = goo_etcd::etcd_client::LeaseTimeToLiveOptions::new().with_keys();
        let answer = etcd
            .client()
            .await?
            .lease_time_to_live(lease, Some(options))
            .await?;
        counts.push(answer.keys().len());
    }
    counts.sort_unstable();
    assert_eq!(counts, [50, 100]);
    // An instance of either lease is known and restored.
    for id in ["000", "149"] {
        let again = registrar.register(instance(id)).await.unwrap_err();
        assert!(
            matches!(again, Error::InstanceAlreadyRegistered { .. }),
            "{again}"
        );
        etcd.client().await?.delete(key(id), None).await?;
        wait_until("the key is restored", async || {
            stored_value(&etcd, &key(id)).await.unwrap().is_some()
        })
        .await;
    }
    let last = registered.pop().ok_or("no registration")?;
    last.deregister().await?;
    registrar
        .register(instance("149"))
        .await?
        .deregister()
        .await?;
    drop((registered, registrar));
    wait_until("all leases are revoked", async || {
        leases(&etcd).await.unwrap().is_empty()
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn lost_permissions_are_reported_and_recovered() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut auth = etcd.client().await?.auth_client();
    let rights =
        || goo_etcd::etcd_client::Permission::read_write("services/greeter/").with_prefix();
    auth.user_add("root", "root's", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.role_add("app").await?;
    auth.role_grant_permission("app", rights()).await?;
    auth.user_grant_role("app", "app").await?;
    auth.auth_enable().await?;
    let user = |name: &str, password: &str| {
        let mut config = Config::default();
        config.endpoints = vec![etcd.endpoint()];
        config.username = Some(name.to_owned());
        config.password = Some(password.to_owned());
        config.dial_timeout = PATIENCE;
        Client::new("test", config)
    };
    let (root, app) = (user("root", "root's").await?, user("app", "hunter2").await?);
    let registrar = registrar(&app, LONG_TTL);
    let registered = registrar.register(instance("a")).await?;
    let elsewhere = registrar.register(Instance::new("secret", "10.0.0.1:80"));
    let refused = wait_for("the error", elsewhere).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");

    let mut admin = root.client().auth_client();
    let options = goo_etcd::etcd_client::RoleRevokePermissionOptions::new().with_prefix();
    admin
        .role_revoke_permission("app", "services/greeter/", Some(options))
        .await?;
    root.delete(registered.key(), None).await?;
    wait_until("it is recovering", async || {
        matches!(registered.state(), RegistrationState::Recovering { .. })
    })
    .await;
    admin.role_grant_permission("app", rights()).await?;
    wait_until("the key is restored", async || is_registered(&registered)).await;
    assert_eq!(root.get(registered.key(), None).await?.count(), 1);
    Ok(())
}

#[tokio::test]
async fn registered_while_own_health_is_serving() -> TestResult {
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;

    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (health, service) = tonic_health::server::health_reporter();
    health
        .set_service_status("", tonic_health::ServingStatus::NotServing)
        .await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let server = tonic::transport::Server::builder().add_service(service);
    let _server = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
        server.serve_with_incoming(incoming),
    ));

    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}"))?;
    let mut health_client = HealthClient::new(endpoint.connect().await?);
    let statuses = health_client
        .watch(HealthCheckRequest::default())
        .await?
        .into_inner();
    let ready =
        statuses.map(|status| status.is_ok_and(|status| status.status() == ServingStatus::Serving));
    let registrar = registrar(&client, LONG_TTL);
    let registration = registrar.register_while_ready(Instance::new("greeter", &address), ready)?;
    let is_stored = async || {
        stored_value(&etcd, registration.key())
            .await
            .unwrap()
            .is_some()
    };
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(matches!(
            registration.state(),
            RegistrationState::Unready { .. }
        ));
        assert!(!is_stored().await);
        health
            .set_service_status("", tonic_health::ServingStatus::Serving)
            .await;
        wait_until("it is registered", async || {
            is_registered(&registration) && is_stored().await
        })
        .await;
        health
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        wait_until("it is not registered", async || {
            matches!(registration.state(), RegistrationState::Unready { .. }) && !is_stored().await
        })
        .await;
    }
    registration.deregister().await?;
    assert_eq!(registration.state(), RegistrationState::Deregistered);
    Ok(())
}

#[tokio::test]
async fn registered_once_a_future_resolves() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (resolve, resolved) = tokio::sync::oneshot::channel::<()>();
    let ready = futures::stream::once(async { resolved.await.is_ok() });
    let registrar = registrar(&client, LONG_TTL);
    let registration = registrar.register_while_ready(instance("a"), ready)?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(stored_value(&etcd, registration.key()).await?, None);
    resolve.send(()).map_err(|()| "dropped")?;
    wait_until("it is registered", async || is_registered(&registration)).await;
    assert!(stored_value(&etcd, registration.key()).await?.is_some());
    Ok(())
}
