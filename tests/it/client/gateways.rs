//! Gateways and proxies before etcd that respond in its place, with pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Config, Error, Instance, Registrar, RegistrationState};
use tonic::Code;

use crate::support::raw::RawServer;
use crate::support::{TestResult, wait_for, wait_until};

/// A gateway whose etcd is unavailable, and which responds with an HTML page.
async fn start_gateway() -> RawServer {
    RawServer::start(async |_, mut respond| {
        let head = http::Response::builder()
            .status(503)
            .header("content-type", "text/html");
        if let Ok(mut page) = respond.send_response(head.body(()).unwrap(), false) {
            let text = "<html><body>Service Unavailable</body></html>";
            page.send_data(text.into(), true).ok();
        }
    })
    .await
}

#[tokio::test]
async fn gateway_without_etcd_is_avoided() -> TestResult {
    let (etcd, gateway) = (Etcd::start().await?, start_gateway().await);
    let lease = crate::support::connect(etcd.endpoint())
        .await
        .grant(600)
        .await?
        .id();
    let endpoints = [gateway.address().to_owned(), etcd.endpoint()];
    for _ in 0..4 {
        let config = Config::builder().endpoints(endpoints.clone()).build()?;
        let client = Client::new("main", config).await?;
        for _ in 0..20 {
            client.get("key", None).await?;
            drop(client.watch("key", None).await?);
            client.keep_alive_once(lease).await?;
        }
    }
    // With the gateway alone, etcd is unreachable.
    let config = Config::builder()
        .endpoints([gateway.address()])
        .dial_timeout(Duration::from_secs(1))
        .build()?;
    let error = Client::new("main", config).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("HTTP 503"), "{error}");
    Ok(())
}

/// The text of an error that names the members with their HTTP status, and nothing else.
fn assert_names_pages(error: &Error, operation: &str, gateways: &[RawServer]) {
    let text = error.to_string();
    assert!(text.contains(operation), "{text}");
    for gateway in gateways {
        let member = format!(
            "{}: expected a gRPC response, got HTTP 503",
            gateway.address()
        );
        assert_eq!(text.matches(&member).count(), 1, "{text}");
    }
}

/// etcd is down, and each gateway says so. Each operation ends with its time, and names the members
/// that were tried.
#[tokio::test]
async fn timeouts_name_the_gateways_and_their_pages() -> TestResult {
    let gateways = [start_gateway().await, start_gateway().await];
    let endpoints = gateways
        .each_ref()
        .map(|gateway| gateway.address().to_owned());
    let config = Config::builder()
        .endpoints(endpoints.clone())
        .request_timeout(Duration::from_secs(1))
        .dial_timeout(Duration::from_secs(1));
    let client = Client::connect_lazy("main", config.clone().build()?)?;
    let (get, watch, renewal, status, ping) = tokio::join!(
        client.get("key", None),
        client.watch("key", None),
        client.keep_alive_once(7),
        client.status(&endpoints[0]),
        client.ping(),
    );
    assert_names_pages(&get.unwrap_err(), "get \"key\"", &gateways);
    assert_names_pages(&watch.unwrap_err(), "watch \"key\"", &gateways);
    assert_names_pages(&renewal.unwrap_err(), "keep lease 7 alive", &gateways);
    assert_names_pages(&status.unwrap_err(), "status of", &gateways[..1]);
    assert_names_pages(&ping.unwrap_err(), "ping", &gateways);

    // All calls wait for one authentication.
    let with_user = config.username("user").password("hunter2").build()?;
    let lazy = Client::connect_lazy("main", with_user.clone())?;
    let (first, second) = tokio::join!(lazy.get("a", None), lazy.get("b", None));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        assert_names_pages(&error, "get", &gateways);
    }
    let error = Client::new("main", with_user).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_names_pages(&error, "no etcd member responded", &gateways);
    assert!(!format!("{error} {error:?}").contains("hunter2"));
    Ok(())
}

/// A registration that the gateways prevent says which pages they respond with.
#[tokio::test]
async fn registration_names_the_gateways() -> TestResult {
    let gateways = [start_gateway().await];
    let config = Config::builder()
        .endpoints([gateways[0].address()])
        .request_timeout(Duration::from_secs(1));
    let client = Client::connect_lazy("main", config.build()?)?;
    let registrar = Registrar::builder(&client)
        .ttl(Duration::from_secs(10))
        .build()?;
    let error = registrar
        .register(Instance::new("greeter", "10.0.0.5:50051"))
        .await
        .unwrap_err();
    assert_names_pages(&error, "lease", &gateways);
    Ok(())
}

/// A gateway takes the place of etcd after a lease and an instance are in etcd.
#[tokio::test]
async fn lost_renewals_name_the_gateway() -> TestResult {
    let (etcd, gateway) = (Etcd::start().await?, start_gateway().await);
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = crate::support::connect(proxy.endpoint()).await;
    let lease = client.grant(5).await?.id();
    let mut kept = client.keep_alive(lease).await?;
    let registrar = Registrar::builder(&client)
        .ttl(Duration::from_secs(5))
        .build()?;
    let registration = registrar
        .register(Instance::new("greeter", "10.0.0.5:50051"))
        .await?;
    proxy.set_target(gateway.address());
    proxy.disconnect().await?;

    let page = format!(
        "{}: expected a gRPC response, got HTTP 503",
        proxy.endpoint()
    );
    let lost = wait_for("the loss", async {
        loop {
            match kept.next().await {
                Some(Ok(_)) => {}
                other => return other,
            }
        }
    });
    match lost.await {
        Some(Err(Error::LeaseUnconfirmed { reason, .. })) => {
            assert!(reason.contains(&page), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    wait_until(
        "the registration says why it is not renewed",
        async || match registration.state() {
            RegistrationState::Recovering { reason, .. } => reason.contains(&page),
            _ => false,
        },
    )
    .await;
    Ok(())
}

/// A member that hangs is named with the time for which it did not respond.
#[tokio::test]
async fn silent_member_is_named_in_a_timeout() -> TestResult {
    let silent = RawServer::start(async |_, respond| {
        std::future::pending::<()>().await;
        drop(respond);
    })
    .await;
    let gateway = start_gateway().await;
    let config = Config::builder()
        .endpoints([silent.address(), gateway.address()])
        .request_timeout(Duration::from_secs(2));
    let client = Client::connect_lazy("main", config.build()?)?;
    let (get, put, watch) = tokio::join!(
        client.get("key", None),
        async {
            // A write is not repeated, so some of these end with the page.
            loop {
                match client.put("key", "value", None).await {
                    Err(Error::Timeout { reason, .. }) => return reason,
                    other => assert_eq!(other.unwrap_err().code(), Some(Code::Unavailable)),
                }
            }
        },
        client.watch("key", None),
    );
    assert_names_pages(
        &get.as_ref().unwrap_err().clone(),
        "get",
        std::slice::from_ref(&gateway),
    );
    for text in [
        get.unwrap_err().to_string(),
        put,
        watch.unwrap_err().to_string(),
    ] {
        let member = format!("{}: no response for ", silent.address());
        assert!(text.contains(&member), "{text}");
    }
    Ok(())
}

/// A proxy may respond with a page and HTTP status 200.
#[tokio::test]
async fn page_with_status_200_is_avoided() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = RawServer::start(async |_, mut respond| {
        let head = http::Response::builder().header("content-type", "text/html");
        respond.send_response(head.body(()).unwrap(), true).ok();
    })
    .await;
    let endpoints = [proxy.address().to_owned(), etcd.endpoint()];
    let config = Config::builder().endpoints(endpoints).build()?;
    let client = Client::new("main", config).await?;
    for _ in 0..20 {
        client.get("key", None).await?;
    }
    Ok(())
}

/// A gateway may respond in place of a member that has applied the write.
#[tokio::test]
async fn page_in_response_to_a_write_is_final() -> TestResult {
    for (http, code) in [
        (200, Code::Unknown),
        (302, Code::Unknown),
        (431, Code::Unknown),
        (500, Code::Unknown),
        (429, Code::Unavailable),
        (502, Code::Unavailable),
        (503, Code::Unavailable),
        (504, Code::Unavailable),
    ] {
        let requests = Arc::<AtomicUsize>::default();
        let mut endpoints = Vec::new();
        for _ in 0..2 {
            let requests = Arc::clone(&requests);
            let gateway = RawServer::start(move |_, mut respond| {
                requests.fetch_add(1, Ordering::SeqCst);
                async move {
                    let head = http::Response::builder()
                        .status(http)
                        .header("content-type", "text/html");
                    respond.send_response(head.body(()).unwrap(), true).ok();
                }
            });
            endpoints.push(gateway.await);
        }
        let addresses = endpoints.iter().map(|gateway| gateway.address().to_owned());
        let config = Config::builder().endpoints(addresses).build()?;
        let client = Client::connect_lazy("main", config)?;
        let error = client.put("key", "value", None).await.unwrap_err();
        assert_eq!(error.code(), Some(code), "{error}");
        assert!(error.is_retryable(), "{error}");
        assert_eq!(requests.load(Ordering::SeqCst), 1, "HTTP {http}");
    }
    Ok(())
}
