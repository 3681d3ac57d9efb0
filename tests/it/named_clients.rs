//! The named clients of a process. These tests run one after another, because a process has only
//! one registry. No other test uses it.

use std::time::Duration;

use crate::support::{PATIENCE, TestResult, config};
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Error};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn errors_without_clients_say_what_to_do() -> TestResult {
    let _turn = TURN.lock().await;
    let endpoints = ["127.0.0.1:1".to_owned()];
    let text = goo_etcd::default().unwrap_err().to_string();
    assert!(text.contains("register_default"), "{text}");
    let text = goo_etcd::get_client("one").unwrap_err().to_string();
    assert!(text.contains("\"one\"") && text.contains("none"), "{text}");
    assert!(matches!(
        goo_etcd::ping().await,
        Err(Error::NoDefaultClient { .. })
    ));
    assert!(matches!(
        goo_etcd::register("", config(endpoints)).await,
        Err(Error::Invalid { field: "name", .. })
    ));
    goo_etcd::close_all().await?;
    Ok(())
}

#[tokio::test]
async fn clients_are_found_by_name_until_closed() -> TestResult {
    let _turn = TURN.lock().await;
    let (one, two) = (Etcd::start().await?, Etcd::start().await?);

    // Two clusters by name.
    goo_etcd::register("two", config([two.endpoint()])).await?;
    goo_etcd::register("one", config([one.endpoint()])).await?;
    goo_etcd::get_client("one")?
        .put("where", "one", None)
        .await?;
    goo_etcd::get_client("two")?
        .put("where", "two", None)
        .await?;
    let at_one = goo_etcd::get_client("one")?.get("where", None).await?;
    assert_eq!(at_one.kvs()[0].value(), b"one");
    match goo_etcd::get_client("three").unwrap_err() {
        Error::UnknownClient { name, known, .. } => {
            assert_eq!(
                (name.as_str(), known),
                ("three", vec!["one".into(), "two".into()])
            );
        }
        other => panic!("{other:?}"),
    }

    // A name twice: the first stays.
    let error = goo_etcd::register("one", config([two.endpoint()]))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::ClientAlreadyRegistered { name, .. } if name == "one"),
        "{error}"
    );
    let at_one = goo_etcd::get_client("one")?.get("where", None).await?;
    assert_eq!(at_one.kvs()[0].value(), b"one");

    // The default.
    assert!(matches!(
        goo_etcd::default(),
        Err(Error::NoDefaultClient { known, .. }) if known.len() == 2
    ));
    goo_etcd::set_default("two")?;
    assert_eq!(goo_etcd::default()?.name(), "two");
    assert!(goo_etcd::set_default("three").is_err());
    assert_eq!(goo_etcd::default()?.name(), "two");
    goo_etcd::ping().await?;
    goo_etcd::get_default_client()?
        .put("raw", "1", None)
        .await?;
    assert_eq!(goo_etcd::default()?.get("raw", None).await?.count(), 1);

    // Unregistering closes the client for all holders, and ends its role as default.
    let held = goo_etcd::get_client("two")?;
    goo_etcd::unregister("two").await?;
    assert!(matches!(held.ping().await, Err(Error::Closed { .. })));
    assert!(matches!(
        goo_etcd::default(),
        Err(Error::NoDefaultClient { .. })
    ));
    assert!(matches!(
        goo_etcd::unregister("two").await,
        Err(Error::UnknownClient { .. })
    ));
    goo_etcd::register_default(config([two.endpoint()])).await?;
    assert_eq!(goo_etcd::default()?.name(), "default");
    goo_etcd::unregister_default().await?;
    assert!(matches!(
        goo_etcd::unregister_default().await,
        Err(Error::NoDefaultClient { .. })
    ));

    goo_etcd::close_all().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_many_concurrent_registrations_succeeds() -> TestResult {
    let _turn = TURN.lock().await;
    let one = Etcd::start().await?;
    goo_etcd::register("one", config([one.endpoint()])).await?;
    let racers = (0..32).map(|n| {
        let config = config([one.endpoint()]);
        tokio::spawn(async move { goo_etcd::register(format!("race-{}", n % 4), config).await })
    });
    let outcomes = timeout(PATIENCE, futures::future::try_join_all(racers)).await??;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 4);
    for outcome in outcomes {
        if let Err(error) = outcome {
            assert!(
                matches!(error, Error::ClientAlreadyRegistered { .. }),
                "{error}"
            );
        }
    }

    // `close_all` closes and forgets all clients, so their names are free again.
    let held: Vec<_> = (0..4)
        .map(|n| goo_etcd::get_client(format!("race-{n}")))
        .collect::<Result<_, _>>()?;
    goo_etcd::set_default("one")?;
    goo_etcd::close_all().await?;
    for client in held {
        assert!(client.is_closed());
    }
    assert!(matches!(
        goo_etcd::default(),
        Err(Error::NoDefaultClient { known, .. }) if known.is_empty()
    ));
    goo_etcd::register("one", config([one.endpoint()])).await?;
    goo_etcd::close_all().await?;
    Ok(())
}

#[tokio::test]
async fn close_all_stops_a_pending_registration() -> TestResult {
    let _turn = TURN.lock().await;
    let etcd = Etcd::start().await?;
    for as_default in [false, true] {
        etcd.pause().await?;
        let mut config = config([etcd.endpoint()]);
        config.dial_timeout = PATIENCE;
        let late = tokio::spawn(async move {
            match as_default {
                false => goo_etcd::register("late", config).await,
                true => goo_etcd::register_default(config).await,
            }
        });
        sleep(Duration::from_millis(300)).await;
        goo_etcd::close_all().await?;
        etcd.resume()?;
        let error = timeout(PATIENCE, late).await??.unwrap_err();
        let name = if as_default { "default" } else { "late" };
        assert!(
            matches!(&error, Error::Closed { name: closed, .. } if closed == name),
            "{error}"
        );
        assert!(goo_etcd::get_client(name).is_err());
        assert!(matches!(
            goo_etcd::default(),
            Err(Error::NoDefaultClient { known, .. }) if known.is_empty()
        ));
    }
    Ok(())
}

/// The clients that a racer got, and the number of its successful operations.
type RaceOutcome = (Vec<Client>, usize);

/// Performs all operations in a random order until `until`.
async fn race(racer: u64, config: Config, until: Instant) -> RaceOutcome {
    const NAMES: [&str; 3] = ["a", "b", "default"];
    let (mut seen, mut done) = (Vec::new(), 0);
    let mut random = numbers(racer);
    while Instant::now() < until {
        let name = NAMES[random() % 3];
        let outcome = match random() % 16 {
            0 => goo_etcd::register(name, config.clone()).await,
            1 => goo_etcd::register_default(config.clone()).await,
            2 => goo_etcd::unregister(name).await,
            3 => goo_etcd::unregister_default().await,
            4 => goo_etcd::close_all().await,
            5..8 => goo_etcd::set_default(name),
            8..12 => goo_etcd::get_client(name).map(|client| {
                assert_eq!(client.name(), name);
                seen.push(client);
            }),
            _ => goo_etcd::default().map(|client| {
                assert!(NAMES.contains(&client.name()));
                seen.push(client);
            }),
        };
        match outcome {
            Ok(()) => done += 1,
            Err(Error::UnknownClient {
                name: other, known, ..
            }) => {
                // A default that is not registered would be an inconsistent state.
                assert_eq!(other, name);
                assert!(!known.contains(&other), "{other} in {known:?}");
            }
            Err(Error::NoDefaultClient { known, .. }) => {
                assert!(known.is_sorted() && known.len() <= NAMES.len(), "{known:?}");
            }
            Err(Error::ClientAlreadyRegistered { name: other, .. }) => {
                assert!(other == name || other == "default", "{other}");
            }
            Err(Error::Closed { name: other, .. }) => {
                assert!(other == name || other == "default", "{other}");
            }
            Err(other) => panic!("{other:?}"),
        }
        // Lets the other racers of this thread run.
        tokio::task::yield_now().await;
    }
    (seen, done)
}

/// Pseudo-random numbers from a seed.
fn numbers(seed: u64) -> impl FnMut() -> usize {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn concurrent_use_is_consistent() -> TestResult {
    let _turn = TURN.lock().await;
    let etcd = Etcd::start().await?;
    let until = Instant::now() + Duration::from_secs(4);
    let racers = (0..16).map(|racer| tokio::spawn(race(racer, config([etcd.endpoint()]), until)));
    let outcomes = timeout(PATIENCE, futures::future::try_join_all(racers)).await??;
    let done: usize = outcomes.iter().map(|(_, done)| done).sum();
    assert!(done > 100, "{done}");

    // Every client that a racer got is closed.
    goo_etcd::close_all().await?;
    let mut seen = outcomes.iter().flat_map(|(seen, _)| seen).peekable();
    assert!(seen.peek().is_some());
    assert!(seen.all(Client::is_closed));
    Ok(())
}
