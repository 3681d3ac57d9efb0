//! Endpoints that cannot work: the errors and the log say why.

use std::time::Duration;

use goo_etcd::{Client, Config, Error};

use crate::support::TestResult;
use crate::support::log::Log;
use crate::support::process::isolate;

/// No connection to such an endpoint could be tried, so the configuration refuses each of them.
#[tokio::test]
async fn untriable_endpoints_are_refused() {
    for endpoint in [
        "a!b:1",
        "127.0.0.1:+2379",
        "[fe80::1%lo]:2379",
        "http://a:1#f",
        "http://h:2379//",
        "unix:///run/etcd.sock",
        "unix-abstract:etcd",
        "bücher.example:2379",
    ] {
        let config = Config::builder().endpoints([endpoint]).build();
        let error = config.unwrap_err();
        let Error::Invalid {
            field,
            value,
            reason,
            ..
        } = &error
        else {
            panic!("{error:?}");
        };
        assert_eq!((*field, value.as_str()), ("endpoints", endpoint));
        assert!(reason.len() > 10, "{error}");
        let client = Client::connect_lazy("main", Config::default()).unwrap();
        let status = client.status(endpoint).await.unwrap_err();
        assert_eq!(status.to_string(), error.to_string());
    }
}

#[tokio::test]
async fn uncallable_endpoints_show_why() -> TestResult {
    if !isolate("client::endpoints::uncallable_endpoints_show_why").await {
        return Ok(());
    }
    let (log, _guard) = Log::start("goo_etcd=warn");
    let endpoints = ["255.255.255.255:2379", "http://224.0.0.1:2379"];
    let mut config = Config::builder()
        .endpoints(endpoints)
        .dial_timeout(Duration::from_secs(1))
        .request_timeout(Duration::from_secs(1))
        .build()?;
    let mut texts = Vec::new();
    let error = Client::connect("main", config.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    texts.push(error.to_string());
    let client = Client::connect_lazy("main", config.clone())?;
    texts.push(client.get("key", None).await.unwrap_err().to_string());
    texts.push(client.watch("key", None).await.unwrap_err().to_string());
    // Beside one that can be tried.
    config.endpoints.push("127.0.0.1:1".to_owned());
    let error = Client::connect("main", config).await.unwrap_err();
    assert!(
        error.to_string().contains("127.0.0.1:1: cannot connect"),
        "{error}"
    );
    texts.push(error.to_string());
    texts.push(log.text());
    for text in texts {
        for address in ["255.255.255.255:2379", "224.0.0.1:2379"] {
            let (_, after) = text
                .split_once(&format!("{address:?}: "))
                .unwrap_or_else(|| {
                    panic!("no reason for {address} in {text}");
                });
            assert!(
                after.starts_with("a multicast or broadcast address"),
                "{text}"
            );
        }
    }
    Ok(())
}
