//! Gateways and proxies before etcd that respond in its place, with pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Error};
use tonic::Code;

use crate::support::TestResult;
use crate::support::raw::RawServer;

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
