//! Limits on the size of messages, and compression.

use std::time::Duration;

use crate::support::{Feature, TestResult, config, connect, wait_for};
use futures::StreamExt;
use goo_etcd::client::LeaseTimeToLiveOptions;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Config, Error, GetOptions, PutOptions, Result, TxnOp, WatchOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const MIB: usize = 1024 * 1024;

fn assert_names_limit<T: std::fmt::Debug>(result: Result<T>, field: &str, limit: usize) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Some(tonic::Code::OutOfRange), "{error}");
    let text = error.to_string();
    for part in [field, &limit.to_string()] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn request_over_the_limit_is_refused() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut config = config([etcd.endpoint()]);
    config.max_call_send_msg_size = 1000;
    let client = Client::new("main", config).await?;
    let large = vec![7; 1001];
    let put = TxnOp::put("key", large.clone(), None);
    let field = "max_call_send_msg_size";
    assert_names_limit(client.put("key", large.clone(), None).await, field, 1000);
    assert_names_limit(client.get(large.clone(), None).await, field, 1000);
    assert_names_limit(client.txn().and_then([put]).commit().await, field, 1000);
    assert_names_limit(client.watch(large.clone(), None).await, field, 1000);
    let urls = ["http://a".repeat(200)];
    assert_names_limit(client.member_add(urls).await, field, 1000);
    assert_names_limit(
        client
            .campaign("e", large.clone(), Duration::from_secs(60))
            .await,
        field,
        1000,
    );
    // The limit holds for etcd-client's own calls as well.
    let raw = client.client().lock(large, None).await.unwrap_err();
    assert!(raw.to_string().contains(field), "{raw}");

    client.put("key", vec![7; 900], None).await?;
    assert_eq!(client.get("key", None).await?.kvs()[0].value().len(), 900);
    Ok(())
}

#[tokio::test]
async fn response_over_the_limit_is_refused() -> TestResult {
    let etcd = Etcd::start().await?;
    let writer = connect(etcd.endpoint()).await;
    let mut config = config([etcd.endpoint()]);
    config.max_call_recv_msg_size = 10_000;
    let client = Client::new("main", config).await?;
    let mut watch = client.watch("large", None).await?;
    writer.put("large", vec![7; 10_001], None).await?;
    for n in 1..=400 {
        let lease = writer.grant_with_id(i64::MAX - n, 60);
        lease.await?;
    }
    let field = "max_call_recv_msg_size";
    assert_names_limit(client.get("large", None).await, field, 10_000);
    let previous = PutOptions::new().with_prev_key();
    assert_names_limit(client.put("large", "", previous).await, field, 10_000);
    assert_names_limit(
        wait_for("the end", watch.next()).await.unwrap(),
        field,
        10_000,
    );
    assert!(watch.next().await.is_none());
    let mut tight = config_of(&client);
    tight.max_call_recv_msg_size = 1000;
    let tight = Client::new("tight", tight).await?;
    assert_names_limit(tight.leases().await, field, 1000);

    assert_eq!(client.leases().await?.leases().len(), 400);
    let mut watch = client.watch("small", None).await?;
    client.put("small", "1", None).await?;
    wait_for("an event", watch.next()).await.unwrap()?;
    Ok(())
}

fn config_of(client: &Client) -> Config {
    let text = format!("{client:?}");
    let start = text.find("127.0.0.1:").unwrap();
    let endpoint = text[start..].split('"').next().unwrap();
    config([endpoint.to_owned()])
}

#[tokio::test]
async fn limit_may_exceed_4_mib() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut config = config([etcd.endpoint()]);
    config.max_call_recv_msg_size = 8 * MIB;
    let client = Client::new("main", config).await?;
    for n in 0..6 {
        client.put(format!("large/{n}"), vec![7; MIB], None).await?;
    }
    let all = client
        .get("large/", GetOptions::new().with_prefix())
        .await?;
    assert_eq!(
        all.kvs().iter().map(|kv| kv.value().len()).sum::<usize>(),
        6 * MIB
    );
    // etcd-client limits all other responses to 4 MiB.
    let lease = client.grant(600).await?.id();
    for n in 0..5 {
        let mut key = format!("{n}/").into_bytes();
        key.resize(MIB, b'k');
        let on_lease = PutOptions::new().with_lease(lease);
        client.put(key, "", on_lease).await?;
    }
    let with_keys = || LeaseTimeToLiveOptions::new().with_keys();
    let field = "max_call_recv_msg_size";
    let refused = client.lease_time_to_live(lease, with_keys()).await;
    assert_names_limit(refused, field, 4 * MIB);
    assert!(client.lease_time_to_live(lease, None).await?.ttl() > 0);
    Ok(())
}

#[tokio::test]
async fn watch_catches_up_with_a_large_history() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for n in 0..6 {
        client.put("n", vec![n; MIB], None).await?;
    }
    let from_start = WatchOptions::new().with_start_revision(1);
    let mut watch = client.watch("n", from_start).await?;
    let mut seen = Vec::new();
    while seen.len() < 6 {
        for event in wait_for("events", watch.next()).await.unwrap()?.events() {
            seen.push(event.kv().unwrap().value()[0]);
        }
    }
    assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    Ok(())
}

#[tokio::test]
async fn compression_works_both_ways_and_on_watches() -> TestResult {
    if Feature::GZIP.is_missing() {
        return Ok(());
    }
    let etcd = Etcd::start().await?;
    let line = "a line that is much like the others, ";
    let value = line.repeat(MIB / line.len());
    let mut bytes = Vec::new();
    for compression in [false, true] {
        let proxy = Proxy::start(etcd.endpoint()).await?;
        let mut config = config([proxy.endpoint()]);
        config.enable_compression = compression;
        let client = Client::new("main", config).await?;
        let mut watch = client.watch("key", None).await?;
        client.put("key", value.as_str(), None).await?;
        assert_eq!(
            client.get("key", None).await?.kvs()[0].value(),
            value.as_bytes()
        );
        let response = wait_for("an event", watch.next()).await.unwrap()?;
        assert_eq!(response.events()[0].kv().unwrap().value(), value.as_bytes());
        // Small messages and errors work as well.
        client.put("small", "1", None).await?;
        assert!(matches!(
            client.revoke(7).await,
            Err(Error::LeaseNotFound { id: 7, .. })
        ));
        bytes.push((proxy.bytes_up(), proxy.bytes_down()));
    }
    let [(up, down), (packed_up, packed_down)] = bytes[..] else {
        unreachable!();
    };
    assert!(up > value.len() as u64 && packed_up * 10 < up, "{bytes:?}");
    assert!(
        down > 2 * value.len() as u64 && packed_down * 10 < down,
        "{bytes:?}"
    );
    Ok(())
}

fn assert_no_gzip(result: Result<Client>) {
    let error = result.unwrap_err();
    assert_eq!(error.code(), Some(tonic::Code::Unimplemented), "{error}");
    let text = error.to_string();
    for part in [
        "this etcd server does not support gzip",
        "enable_compression",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[tokio::test]
async fn compression_without_server_support_is_an_error() -> TestResult {
    // Any server without gzip, and etcd 3.4 if available.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = listener.local_addr()?.to_string();
    let service = tonic::service::Routes::default();
    let server = tonic::transport::Server::builder().add_routes(service);
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(server.serve_with_incoming(incoming));
    let mut compressed = config([endpoint]);
    compressed.enable_compression = true;
    assert_no_gzip(wait_for("the error", Client::new("main", compressed)).await);

    if let Some(program) = crate::support::find_etcd("ETCD_3_4", "etcd-3.4") {
        let etcd = Etcd::builder().program(program).start().await?;
        let mut compressed = config([etcd.endpoint()]);
        compressed.enable_compression = true;
        assert_no_gzip(wait_for("the error", Client::new("main", compressed)).await);
        // Without compression this etcd works.
        let plain = Client::new("main", config([etcd.endpoint()])).await?;
        plain.put("key", "1", None).await?;
        assert_eq!(plain.get("key", None).await?.count(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn server_without_http2_is_unreachable() -> TestResult {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = listener.local_addr()?.to_string();
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            let _ = peer.read(&mut [0; 1000]).await;
            let _ = peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let mut config = config([endpoint.clone()]);
    config.dial_timeout = Duration::from_secs(1);
    let error = Client::new("main", config).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains(&endpoint), "{error}");
    Ok(())
}
