//! The addresses that a channel takes.

use std::time::Duration;

use crate::support::TestResult;
use crate::support::balanced::{call, instance, wait_until_ready};
use crate::support::echo::EchoServer;
use crate::support::process::isolate;
use goo_etcd::BalancedChannel;
use goo_etcd::balance::Source;

/// The error of [`BalancedChannel::from_endpoints`] and of [`Source::addresses`].
fn refusal(address: &str) -> String {
    let error = BalancedChannel::from_endpoints([address]).err().unwrap();
    let of_source = Source::addresses([address]).err().unwrap();
    assert_eq!(error.to_string(), of_source.to_string());
    error.to_string()
}

#[tokio::test]
async fn url_is_refused_with_the_form_to_use() {
    for address in [
        "http://host:1",
        "https://host:1",
        "http://host:1/",
        "https://[::1]:1",
        "dns:///host:1",
        "etcd:///services/greeter",
        "ipv4:10.0.0.5:80",
    ] {
        let text = refusal(address);
        assert!(
            text.contains("expected host:port without a scheme"),
            "{text}"
        );
        assert!(text.contains(&format!("{address:?}")), "{text}");
    }
    let text = refusal("host:1/path");
    assert!(text.contains("host:port without a path"), "{text}");
    let text = refusal("::1:50051");
    assert!(text.contains("must be in brackets"), "{text}");
}

#[tokio::test]
async fn addresses_are_checked() {
    for address in [
        "0.0.0.0:1",
        "[::]:1",
        "[::ffff:0.0.0.0]:1",
        "0:1",
        "224.0.0.1:1",
    ] {
        let text = refusal(address);
        assert!(text.contains("the server's own address"), "{text}");
    }
    assert!(refusal("host:0").contains("port 0"));
}

#[tokio::test]
async fn source_of_addresses_serves_with_settings() -> TestResult {
    let servers = [EchoServer::start(), EchoServer::start()];
    let source = Source::addresses(servers.iter().map(EchoServer::address))?;
    let channel = BalancedChannel::builder(source)
        .connections_per_endpoint(2)
        .build()?;
    wait_until_ready(&channel, 2).await;
    call(&channel).await?;
    Ok(())
}

#[tokio::test]
async fn list_may_repeat_an_address_and_may_be_empty() -> TestResult {
    let server = EchoServer::start();
    let twice = [server.address(), server.address()];
    let channel = BalancedChannel::from_endpoints(twice)?;
    wait_until_ready(&channel, 1).await;
    assert_eq!(channel.endpoints().len(), 1);
    let source = Source::addresses(Vec::<String>::new())?;
    let channel = BalancedChannel::builder(source)
        .ready_timeout(Duration::from_millis(100))
        .build()?;
    let status = call(&channel).await.unwrap_err();
    let text = status.message();
    assert!(text.contains("no instances under the fixed list"), "{text}");
    Ok(())
}

/// The instances of a source are checked before they are called, not when the source is made.
#[tokio::test]
async fn uncallable_instance_of_a_source_is_unusable() -> TestResult {
    let server = EchoServer::start();
    let bad = ["0.0.0.0:1", "[::]:1", "255.255.255.255:1"].map(instance);
    let streams = futures::stream::iter([bad.to_vec()]);
    for source in [Source::fixed(bad.clone()), Source::new("mine", streams)] {
        let channel = BalancedChannel::builder(source)
            .ready_timeout(Duration::from_millis(100))
            .build()?;
        let status = call(&channel).await.unwrap_err();
        let text = status.message();
        assert!(text.contains("names no server"), "{text}");
        assert!(channel.endpoints().is_empty());
    }
    let one_good = bad.into_iter().chain([instance(server.address())]);
    let channel = BalancedChannel::builder(Source::fixed(one_good)).build()?;
    wait_until_ready(&channel, 1).await;
    call(&channel).await?;
    Ok(())
}

/// The threads of this process.
#[cfg(target_os = "linux")]
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Each look-up of tokio and hyper takes one of the runtime's 512 blocking threads, behind which
/// file operations wait.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn names_that_do_not_resolve_take_few_threads() -> TestResult {
    if !isolate("balance::addresses::names_that_do_not_resolve_take_few_threads").await {
        return Ok(());
    }
    let before = threads();
    let names = (0..1_000).map(|n| format!("name-{n}.invalid:1"));
    let channel = BalancedChannel::from_endpoints(names)?;
    let mut most = before;
    for _ in 0..500 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        most = most.max(threads());
    }
    // At most 16 look-ups, and a few threads that are just ending.
    assert!(most <= before + 24, "{before} threads became {most}");
    drop(channel);
    Ok(())
}
