//! What others do to a registration, and what becomes of its process: it comes back.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::future::try_join_all;
use goo_etcd::etcd_client::{EventType, WatchOptions};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{
    BalancedChannel, Client, Config, Error, Instance, PutOptions, Registrar, Registration,
    RegistrationState,
};
use nix::sys::signal::Signal;
use support::balanced::{Load, until_ready};
use support::history::history;
use support::registered::{RegisteredProcess, serve_registered};
use support::{
    PATIENCE, TestResult, calls, connect, eventually, key, lease_of, leases, soon, stored,
};
use tonic::Code;

/// Not the minimum, so that a busy machine does not lose leases that it should keep.
const TTL: Duration = Duration::from_secs(3);

/// With it, what comes back was noticed, and not found by the next renewal.
const LONG_TTL: Duration = Duration::from_secs(600);

/// How soon what was done by hand is undone.
const UNDONE_WITHIN: Duration = Duration::from_secs(1);

/// G8: how long after etcd answers again a registration may take to be back.
const BACK_WITHIN: Duration = Duration::from_secs(2);

/// The time within which those come back that have lost their leases together.
const SPREAD: Duration = Duration::from_millis(500);

#[test]
fn registered_server_process() {
    serve_registered();
}

fn instance(id: &str) -> Instance {
    Instance::new("greeter", "10.0.0.1:80").id(id)
}

fn registrar(client: &Client, ttl: Duration) -> Registrar {
    Registrar::builder(client).ttl(ttl).build().unwrap()
}

fn is_registered(registration: &Registration) -> bool {
    registration.state() == RegistrationState::Registered
}

/// Processes' worth of registrars, each with a connection of its own, some with several instances.
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

/// How long after `begun` the first instance of each process is written, from a revision on.
async fn back_after(
    begun: Instant,
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
        let message = soon("they come back", changes.message()).await?;
        for event in message.ok_or("the watch has ended")?.events() {
            let Some(kv) = event.kv() else { continue };
            let key = kv.key_str()?;
            if event.event_type() == EventType::Put && key.ends_with("-0") {
                back.entry(key.to_owned()).or_insert(begun.elapsed());
            }
        }
    }
    Ok(back.into_values().collect())
}

/// Whether they have come at random moments of a time that is as long as `over`, rather than as fast as they
/// could: a fifth of it has a fifth of them, and of sixty practically never half.
fn is_spread(took: &[Duration], over: Duration) -> bool {
    let part = over / 5;
    let within = |from: &Duration| {
        let part = *from..*from + part;
        took.iter().filter(|took| part.contains(took)).count()
    };
    let most = took.iter().map(within).max().unwrap_or_default();
    println!("{most} of {} within {part:?}: {took:?}", took.len());
    most <= took.len() / 2
}

/// Waits until all are in etcd, under leases that it knows, and say so.
async fn until_all_are_back(etcd: &Etcd, fleet: &[Registration]) -> TestResult {
    let mut client = etcd.client().await?;
    let begun = Instant::now();
    loop {
        let prefix = goo_etcd::GetOptions::new().with_prefix();
        let found = client.get("services/greeter/", Some(prefix)).await?;
        let known: BTreeSet<i64> = leases(etcd).await?.into_iter().collect();
        let back = found.kvs().iter().filter(|kv| known.contains(&kv.lease()));
        let back = back.count();
        if back == fleet.len() && fleet.iter().all(is_registered) {
            return Ok(());
        }
        assert!(begun.elapsed() < PATIENCE, "{back} of {}", fleet.len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn given_etcd_down_for_three_ttls_then_all_are_back_within_2_s_of_its_first_answer()
-> TestResult {
    let etcd = Etcd::start().await?;
    let fleet = fleet(&etcd.endpoint(), 20, TTL).await?;
    etcd.kill().await?;
    tokio::time::sleep(TTL * 3).await;
    etcd.start_again().await?;
    let answered = Instant::now();
    until_all_are_back(&etcd, &fleet).await?;
    let took = answered.elapsed();
    assert!(took <= BACK_WITHIN, "it took {took:?}");
    Ok(())
}

/// What counts is when each comes, not when it is served: connections that are made while etcd listens and
/// does not answer yet wait in its queue, and are answered together. Here there are none before it answers.
#[tokio::test]
async fn given_etcd_down_for_three_ttls_when_it_can_be_reached_then_they_come_back_within_2_s_and_not_at_once()
-> TestResult {
    const PROCESSES: usize = 60;
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let fleet = fleet(&proxy.endpoint(), PROCESSES, TTL).await?;
    proxy.cut().await;
    etcd.kill().await?;
    tokio::time::sleep(TTL * 3).await;
    etcd.start_again().await?;
    // The times of several returns together: a pause of the machine may let those of one come together.
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
        let came = soon("they come", came).await;
        assert!(came.iter().max() <= Some(&BACK_WITHIN), "{came:?}");
        until_all_are_back(&etcd, &fleet).await?;
        all.extend(came);
        proxy.cut().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    // The time from one attempt to connect to the next.
    assert!(is_spread(&all, Duration::from_millis(250)), "{all:?}");
    Ok(())
}

#[tokio::test]
async fn given_a_wiped_etcd_then_all_are_back_within_2_s_of_its_first_answer_and_not_at_once()
-> TestResult {
    let etcd = Etcd::start().await?;
    let fleet = fleet(&etcd.endpoint(), 20, TTL).await?;
    etcd.wipe_and_restart().await?;
    let answered = Instant::now();
    let back = back_after(answered, &etcd, 1, 20).await?;
    until_all_are_back(&etcd, &fleet).await?;
    let took = answered.elapsed();
    assert!(took <= BACK_WITHIN, "it took {took:?}");
    // Half of the time within which they come, also if the machine paused meanwhile.
    let (first, last) = (back.iter().min(), back.iter().max());
    let over = last.zip(first).map(|(last, first)| *last - *first);
    println!("spread over {over:?}");
    assert!(over > Some(SPREAD / 2), "{back:?}");
    Ok(())
}

/// The leases of all end together while etcd is there, so that nothing but their own patience keeps them
/// from coming back together.
#[tokio::test]
async fn given_the_leases_of_all_are_revoked_at_once_then_all_are_back_within_1_s_and_not_at_once()
-> TestResult {
    const PROCESSES: usize = 20;
    const ROUNDS: usize = 5;
    let etcd = Etcd::start().await?;
    let fleet = fleet(&etcd.endpoint(), PROCESSES, LONG_TTL).await?;
    eventually("all are watched", async || {
        support::watchers(&etcd).await.unwrap() >= PROCESSES as u64
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
        let begun = Instant::now();
        let revoked = async { Ok(try_join_all(revoked).await?) };
        let back = back_after(begun, &etcd, revision + 1, PROCESSES);
        let (_, took) = tokio::try_join!(revoked, back)?;
        assert!(took.iter().max() <= Some(&UNDONE_WITHIN), "{took:?}");
        all.extend(took);
        until_all_are_back(&etcd, &fleet).await?;
    }
    assert!(is_spread(&all, SPREAD), "{all:?}");
    Ok(())
}

/// Does something to the only registration's key, three times, and waits each time until it is as it was.
async fn undone(done: impl AsyncFn(&Etcd, &str) -> TestResult) -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registration = registrar(&client, LONG_TTL).register(instance("a")).await?;
    let key = registration.key();
    // Once its watch is there too: what was before is found by looking.
    eventually("it is watched", async || {
        let page = support::metrics(&etcd).await.unwrap();
        page.contains("etcd_debugging_mvcc_watcher_total 1")
    })
    .await;
    let value = stored(&etcd, key).await?;
    for _ in 0..3 {
        done(&etcd, key).await?;
        let begun = Instant::now();
        eventually("it is back", async || {
            let lease = lease_of(&etcd, key).await.unwrap();
            is_registered(&registration)
                && lease.is_some_and(|lease| lease != 0)
                && stored(&etcd, key).await.unwrap() == value
                && leases(&etcd).await.unwrap() == [lease.unwrap()]
        })
        .await;
        let took = begun.elapsed();
        assert!(took <= UNDONE_WITHIN, "it took {took:?}");
    }
    Ok(())
}

#[tokio::test]
async fn given_a_lease_revoked_by_hand_then_it_is_back_within_1_s() -> TestResult {
    undone(async |etcd, key| {
        let lease = lease_of(etcd, key).await?.ok_or("it is there")?;
        etcd.client().await?.lease_client().revoke(lease).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn given_a_key_deleted_by_hand_then_it_is_back_within_1_s() -> TestResult {
    undone(async |etcd, key| {
        etcd.client().await?.delete(key, None).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn given_a_key_overwritten_by_hand_then_it_is_back_within_1_s() -> TestResult {
    undone(async |etcd, key| {
        etcd.client().await?.put(key, "by hand", None).await?;
        Ok(())
    })
    .await
}

/// It would look right, and stay when its process is gone.
#[tokio::test]
async fn given_the_same_bytes_put_by_hand_without_a_lease_then_it_is_under_its_lease_within_1_s()
-> TestResult {
    undone(async |etcd, key| {
        let value = stored(etcd, key).await?.ok_or("it is there")?;
        etcd.client().await?.put(key, value, None).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn given_a_value_overwritten_by_hand_under_its_own_lease_then_it_is_back_within_1_s()
-> TestResult {
    undone(async |etcd, key| {
        let lease = lease_of(etcd, key).await?.ok_or("it is there")?;
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
async fn given_its_process_paused_for_two_ttls_then_it_is_back_within_1_s_of_resuming() -> TestResult
{
    let etcd = Etcd::start().await?;
    let server = RegisteredProcess::start(&etcd, TTL).await;
    let key = key(server.address());
    server.pause().await;
    tokio::time::sleep(TTL * 2).await;
    eventually("it has expired", async || {
        stored(&etcd, &key).await.unwrap().is_none()
    })
    .await;
    server.signal(Signal::SIGCONT);
    let resumed = Instant::now();
    eventually("it is back", async || {
        stored(&etcd, &key).await.unwrap().is_some()
    })
    .await;
    let took = resumed.elapsed();
    assert!(took <= UNDONE_WITHIN, "it took {took:?}");
    Ok(())
}

fn is_superseded(registration: &Registration) -> bool {
    matches!(registration.state(), RegistrationState::Superseded { .. })
}

/// To ask whether it is really gone would make one of its id, and whoever dies then leaves it, with what was put
/// under it.
#[tokio::test]
async fn given_a_lease_that_its_renewal_finds_gone_then_another_is_granted_and_no_other()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registration = registrar(&client, TTL).register(instance("a")).await?;
    let lease = lease_of(&etcd, registration.key())
        .await?
        .ok_or("it is there")?;
    // Another has the key, so that nothing that hangs on it tells of its end.
    let theirs = etcd.client().await?.lease_grant(600, None).await?.id();
    let of_theirs = PutOptions::new().with_lease(theirs);
    etcd.client()
        .await?
        .put(registration.key(), "theirs", Some(of_theirs))
        .await?;
    eventually("it is superseded", async || is_superseded(&registration)).await;
    let granted = calls(&etcd, "LeaseGrant").await?;
    etcd.client().await?.lease_revoke(lease).await?;
    eventually("it has another", async || {
        let leases = leases(&etcd).await.unwrap();
        leases.iter().any(|id| ![lease, theirs].contains(id))
    })
    .await;
    assert_eq!(calls(&etcd, "LeaseGrant").await? - granted, 1);
    Ok(())
}

#[tokio::test]
async fn given_two_that_register_one_id_then_the_later_wins_and_the_earlier_is_back_when_it_is_gone()
-> TestResult {
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
        let value = stored(&etcd, earlier.key())
            .await
            .unwrap()
            .unwrap_or_default();
        value.contains(&format!(r#""version":"{version}""#))
    };
    eventually("the earlier knows", async || is_superseded(&earlier)).await;
    // For some renewals, and while the earlier is changed, nobody takes it from the other.
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
    assert_eq!(before, after, "they fought");

    later.deregister().await?;
    eventually("the earlier is back, as changed", async || {
        is_registered(&earlier) && has("1").await
    })
    .await;
    assert!(
        stored(&etcd, earlier.key())
            .await?
            .unwrap()
            .contains(r#""weight":7"#)
    );

    // Also when the later one is gone without a word.
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let cut_off = connect(proxy.endpoint()).await;
    let later = registrar(&cut_off, TTL)
        .register(instance("same").version("3"))
        .await?;
    eventually("the earlier knows", async || is_superseded(&earlier)).await;
    assert!(has("3").await);
    proxy.cut().await;
    eventually("the earlier is back", async || is_registered(&earlier)).await;
    assert!(has("1").await);
    // And when that one is there again, it is the one that waits.
    proxy.restore().await?;
    eventually("it waits", async || is_superseded(&later)).await;
    assert!(has("1").await && is_registered(&earlier));
    Ok(())
}

/// Both have lost their leases when etcd was wiped: one has the key, and they do not fight.
#[tokio::test]
async fn given_two_of_one_id_that_recover_together_then_one_has_it_and_the_other_waits()
-> TestResult {
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
    eventually("the later has it", async || is_superseded(&one)).await;
    etcd.wipe_and_restart().await?;
    eventually("one has it", async || {
        let settled = (is_registered(&one) && is_superseded(&two))
            || (is_registered(&two) && is_superseded(&one));
        settled && stored(&etcd, one.key()).await.unwrap().is_some()
    })
    .await;
    let mut client = etcd.client().await?;
    let before = client.get(one.key(), None).await?.kvs()[0].mod_revision();
    tokio::time::sleep(TTL).await;
    let after = client.get(one.key(), None).await?.kvs()[0].mod_revision();
    assert_eq!(before, after, "they fought");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn given_sigterm_under_load_then_no_call_fails_and_the_key_is_gone_before_the_listener()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut servers = Vec::new();
    let proxy = Proxy::start(etcd.endpoint()).await?;
    servers.push(RegisteredProcess::start_through(proxy.endpoint(), &etcd, TTL).await);
    for _ in 0..2 {
        servers.push(RegisteredProcess::start(&etcd, TTL).await);
    }
    // What it sends and does not wait for is late.
    proxy.delay(Duration::from_millis(50));
    let channel = BalancedChannel::connect(&client, "greeter").await?;
    until_ready(&channel, 3).await;
    let load = Load::start(&channel, 16);
    for server in &servers {
        load.reaches(server.address()).await;
    }
    let mut leaves = servers.remove(0);
    leaves.signal(Signal::SIGTERM);
    let key = key(leaves.address());
    // In the moment from which on tonic may close the listener: the key is gone, and it still listens. From
    // outside the two could not be told apart, for there is less between them than an event of etcd takes.
    let left = leaves.left().await;
    assert!(!left.has_key && left.is_listening, "{left:?}");
    let changes = history(&etcd).await?;
    let gone = changes.iter().find(|c| c.key == key && c.value.is_none());
    let gone = gone.ok_or("its key was deleted")?.revision;
    assert!(gone <= left.revision, "{gone} comes after {left:?}");
    eventually("it has closed its listener", async || {
        tokio::net::TcpStream::connect(leaves.address())
            .await
            .is_err()
    })
    .await;
    assert_eq!(stored(&etcd, &key).await?, None);
    leaves.ended().await;
    load.goes_on_for(500).await;
    load.finish().await.assert_no_failure();
    Ok(())
}

#[tokio::test]
async fn given_150_instances_then_no_lease_has_more_than_100_and_each_comes_back() -> TestResult {
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
    // The same through whichever lease.
    for id in ["000", "149"] {
        let again = registrar.register(instance(id)).await.unwrap_err();
        assert!(
            matches!(again, Error::InstanceAlreadyRegistered { .. }),
            "{again}"
        );
        etcd.client().await?.delete(key(id), None).await?;
        eventually("it is back", async || {
            stored(&etcd, &key(id)).await.unwrap().is_some()
        })
        .await;
    }
    let last = registered.pop().ok_or("there are 150")?;
    last.deregister().await?;
    registrar
        .register(instance("149"))
        .await?
        .deregister()
        .await?;
    drop((registered, registrar));
    eventually("all are gone", async || {
        leases(&etcd).await.unwrap().is_empty()
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_rights_that_are_taken_away_then_register_says_so_and_the_rest_recovers_when_they_are_back()
-> TestResult {
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
    let refused = soon("it is refused", elsewhere).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");

    let mut admin = root.client().auth_client();
    let options = goo_etcd::etcd_client::RoleRevokePermissionOptions::new().with_prefix();
    admin
        .role_revoke_permission("app", "services/greeter/", Some(options))
        .await?;
    root.delete(registered.key(), None).await?;
    eventually("it knows", async || {
        matches!(registered.state(), RegistrationState::Recovering { .. })
    })
    .await;
    admin.role_grant_permission("app", rights()).await?;
    eventually("it is back", async || is_registered(&registered)).await;
    assert_eq!(root.get(registered.key(), None).await?.count(), 1);
    Ok(())
}

#[tokio::test]
async fn given_a_server_s_own_health_then_it_is_registered_while_that_says_serving() -> TestResult {
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
    let mut asks = HealthClient::new(endpoint.connect().await?);
    let answers = asks
        .watch(HealthCheckRequest::default())
        .await?
        .into_inner();
    let ready =
        answers.map(|answer| answer.is_ok_and(|answer| answer.status() == ServingStatus::Serving));
    let registrar = registrar(&client, LONG_TTL);
    let registration = registrar.register_while_ready(Instance::new("greeter", &address), ready)?;
    let is_in = async || stored(&etcd, registration.key()).await.unwrap().is_some();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(registration.state(), RegistrationState::Unready);
        assert!(!is_in().await);
        health
            .set_service_status("", tonic_health::ServingStatus::Serving)
            .await;
        eventually("it is in", async || {
            is_registered(&registration) && is_in().await
        })
        .await;
        health
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        eventually("it is out", async || {
            registration.state() == RegistrationState::Unready && !is_in().await
        })
        .await;
    }
    registration.deregister().await?;
    assert_eq!(registration.state(), RegistrationState::Deregistered);
    Ok(())
}

#[tokio::test]
async fn given_a_future_to_wait_for_then_it_is_registered_once_that_has_ended() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let (tell, told) = tokio::sync::oneshot::channel::<()>();
    let ready = futures::stream::once(async { told.await.is_ok() });
    let registrar = registrar(&client, LONG_TTL);
    let registration = registrar.register_while_ready(instance("a"), ready)?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(stored(&etcd, registration.key()).await?, None);
    tell.send(()).map_err(|()| "it waits")?;
    eventually("it is in", async || is_registered(&registration)).await;
    assert!(stored(&etcd, registration.key()).await?.is_some());
    Ok(())
}
