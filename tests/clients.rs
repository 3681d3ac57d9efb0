//! The named clients of a process. One test: the registry is one for the process.

use std::time::Duration;

use goo_etcd::testing::Etcd;
use goo_etcd::{Config, Error};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn given_named_clients_then_each_is_found_by_its_name_until_closed()
-> Result<(), Box<dyn std::error::Error>> {
    let (one, two) = (Etcd::start().await?, Etcd::start().await?);
    let config = |etcd: &Etcd| {
        let mut config = Config::default();
        config.endpoints = vec![etcd.endpoint()];
        config
    };

    // With nothing registered the errors say what to do.
    let text = goo_etcd::default().unwrap_err().to_string();
    assert!(text.contains("register_default"), "{text}");
    let text = goo_etcd::get_client("one").unwrap_err().to_string();
    assert!(text.contains("\"one\"") && text.contains("none"), "{text}");
    assert!(matches!(
        goo_etcd::ping().await,
        Err(Error::NoDefaultClient { .. })
    ));
    assert!(matches!(
        goo_etcd::register("", config(&one)).await,
        Err(Error::Invalid { field: "name", .. })
    ));
    goo_etcd::close_all().await?;

    // Two clusters by name.
    goo_etcd::register("two", config(&two)).await?;
    goo_etcd::register("one", config(&one)).await?;
    goo_etcd::get_client("one")?
        .put("where", "one", None)
        .await?;
    goo_etcd::get_client("two")?
        .put("where", "two", None)
        .await?;
    let at_one = goo_etcd::get_client("one")?.get("where", None).await?;
    assert_eq!(at_one.kvs()[0].value(), b"one");
    match goo_etcd::get_client("three").unwrap_err() {
        Error::UnknownClient { name, known } => {
            assert_eq!(
                (name.as_str(), known),
                ("three", vec!["one".into(), "two".into()])
            );
        }
        other => panic!("{other:?}"),
    }

    // A name twice: the first stays.
    let error = goo_etcd::register("one", config(&two)).await.unwrap_err();
    assert!(
        matches!(&error, Error::ClientAlreadyRegistered { name } if name == "one"),
        "{error}"
    );
    let at_one = goo_etcd::get_client("one")?.get("where", None).await?;
    assert_eq!(at_one.kvs()[0].value(), b"one");

    // The default.
    assert!(matches!(
        goo_etcd::default(),
        Err(Error::NoDefaultClient { known }) if known.len() == 2
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

    // Unregistering closes, for all who hold it, and the default goes with it.
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
    goo_etcd::register_default(config(&two)).await?;
    assert_eq!(goo_etcd::default()?.name(), "default");
    goo_etcd::unregister_default().await?;
    assert!(matches!(
        goo_etcd::unregister_default().await,
        Err(Error::NoDefaultClient { .. })
    ));

    // Many at once: of those that race for a name one wins, and nobody waits for ever.
    let racers = (0..32).map(|n| {
        let config = config(&one);
        tokio::spawn(async move { goo_etcd::register(format!("race-{}", n % 4), config).await })
    });
    let outcomes = timeout(SOON, futures::future::try_join_all(racers)).await??;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 4);
    for outcome in outcomes {
        if let Err(error) = outcome {
            assert!(
                matches!(error, Error::ClientAlreadyRegistered { .. }),
                "{error}"
            );
        }
    }

    // All closed and forgotten; names are free again.
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
        Err(Error::NoDefaultClient { known }) if known.is_empty()
    ));
    goo_etcd::register("one", config(&one)).await?;
    goo_etcd::close_all().await?;
    Ok(())
}
