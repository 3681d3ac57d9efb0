//! Addresses that no client can call, as servers register by mistake: issues 26 and 27 of
//! kitex-contrib/registry-etcd.

use std::fs;

use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::{TestResult, connect, key, listing, value, wait_until};
use goo_etcd::format::{DubboGo, EtcdNaming, Format, GoMicro, GoZero, Kitex, Kratos};
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Directory, Instance, Registrar};
use tempfile::TempDir;

const UNCALLABLE: [&str; 8] = [
    "0.0.0.0:1",
    "[::]:1",
    "[::ffff:0.0.0.0]:1",
    "0:1",
    "255.255.255.255:1",
    "224.0.0.1:1",
    "[ff02::1]:1",
    ":1",
];

#[tokio::test]
async fn registration_is_refused() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let registrar = Registrar::builder(&client).build()?;
    for address in UNCALLABLE {
        let error = registrar
            .register(Instance::new("greeter", address))
            .await
            .err()
            .ok_or(address)?
            .to_string();
        assert!(error.contains("`Instance::advertise`"), "{error}");
        assert!(error.contains(&format!("{address:?}")), "{error}");
    }
    let written = client.get("services/", None).await?;
    assert!(written.kvs().is_empty());
    Ok(())
}

#[tokio::test]
async fn every_format_skips_counts_and_keeps_the_last_good_value() -> TestResult {
    async fn assert_skips(client: &Client, format: impl Format + Clone) -> TestResult {
        let name = format.name();
        let instance = |address: &str| Instance::new("a", address).id("7");
        let key_of = |address: &str| format.key(format.default_prefix(), &instance(address));
        let (key, new_key) = (
            key_of("10.0.0.1:80"),
            key_of("10.0.0.2:80").replace('7', "8"),
        );
        for address in UNCALLABLE {
            let (good, bad) = (instance("10.0.0.1:80"), instance(address));
            let of = format!("{name}: {address}");
            client.put(&*key, format.encode(&good)?, None).await?;
            let builder = Directory::builder(client, "a").format(format.clone());
            let directory = builder.watch().await?;
            client.put(&*key, format.encode(&bad)?, None).await?;
            // Without a last good value.
            client.put(&*new_key, format.encode(&bad)?, None).await?;
            wait_until("both are counted", async || {
                directory.snapshot().undecodable() == 2
            })
            .await;
            let addresses = |directory: &Directory| -> Vec<String> {
                let snapshot = directory.snapshot();
                let addresses = snapshot.instances().map(|i| i.address.clone());
                addresses.collect()
            };
            assert_eq!(addresses(&directory), ["10.0.0.1:80"], "{of}");
            drop(directory);

            // A new directory has only the list, with the bad values.
            let builder = Directory::builder(client, "a").format(format.clone());
            let listed = builder.watch().await?;
            assert_eq!(listed.snapshot().undecodable(), 2, "{of}");
            assert!(addresses(&listed).is_empty(), "{of}");
            client.delete(&*key, None).await?;
            client.delete(&*new_key, None).await?;
        }
        Ok(())
    }
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    assert_skips(&client, EtcdNaming).await?;
    assert_skips(&client, GoZero).await?;
    assert_skips(&client, Kratos).await?;
    assert_skips(&client, Kitex).await?;
    assert_skips(&client, GoMicro).await?;
    assert_skips(&client, DubboGo).await?;
    Ok(())
}

#[tokio::test]
async fn one_bad_node_of_a_value_takes_no_other_away() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let node = |id: &str, address: &str| format!(r#"{{"id":"{id}","address":"{address}"}}"#);
    let value = |nodes: &[String]| format!(r#"{{"name":"a","nodes":[{}]}}"#, nodes.join(","));
    let key = "/micro/registry/a/1";
    let (first, second) = (node("x", "10.0.0.1:80"), node("y", "10.0.0.2:80"));
    client.put(key, value(&[first, second]), None).await?;
    let directory = Directory::builder(&client, "a")
        .format(GoMicro)
        .watch()
        .await?;
    assert_eq!(
        listing(&directory.snapshot()),
        ["x=10.0.0.1:80", "y=10.0.0.2:80"]
    );
    // `x` moves while `y` is written wrongly: `x` is followed, and `y` keeps its last good address.
    let (first, second) = (node("x", "10.0.0.3:80"), node("y", "0.0.0.0:80"));
    client.put(key, value(&[first, second]), None).await?;
    wait_until("the value is counted", async || {
        directory.snapshot().undecodable() == 1
    })
    .await;
    assert_eq!(
        listing(&directory.snapshot()),
        ["y=10.0.0.2:80", "x=10.0.0.3:80"]
    );
    // `y` leaves.
    client
        .put(key, value(&[node("x", "10.0.0.3:80")]), None)
        .await?;
    wait_until("the value is good again", async || {
        directory.snapshot().undecodable() == 0
    })
    .await;
    assert_eq!(listing(&directory.snapshot()), ["x=10.0.0.3:80"]);
    Ok(())
}

#[tokio::test]
async fn skipped_address_is_logged_once() -> TestResult {
    if !isolate("directory::uncallable::skipped_address_is_logged_once").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::directory=warn");
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client.put(key("a"), value("10.0.0.1:80"), None).await?;
    let directory = Directory::watch(&client, "greeter").await?;
    client.put(key("a"), value("0.0.0.0:80"), None).await?;
    wait_until("the address is counted", async || {
        directory.snapshot().undecodable() == 1
    })
    .await;
    // The next list has the value again.
    etcd.restart().await?;
    wait_until("the directory is live again", async || {
        directory.snapshot().freshness().is_live()
            && client
                .put(key("b"), value("10.0.0.2:80"), None)
                .await
                .is_ok()
            && directory.snapshot().len() == 2
    })
    .await;
    assert_eq!(
        listing(&directory.snapshot()),
        ["a=10.0.0.1:80", "b=10.0.0.2:80"]
    );
    let line = log.last("ignoring a value in etcd that cannot be used");
    assert!(line.contains("every address of a machine"), "{line}");
    assert!(line.contains("kept_last_good=true"), "{line}");
    let text = log.text();
    assert_eq!(text.matches("ignoring a value").count(), 1, "{text}");
    Ok(())
}

/// A cache file that a version without the check has written.
#[tokio::test]
async fn cache_file_is_checked() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let open = async || -> goo_etcd::Result<(Client, Directory)> {
        let config = goo_etcd::Config::builder()
            .endpoints([etcd.endpoint()])
            .build()?;
        let client = Client::connect_lazy("main", config)?;
        let builder = Directory::builder(&client, "greeter");
        let directory = builder.cache_dir(folder.path()).watch().await?;
        Ok((client, directory))
    };
    let (client, directory) = open().await?;
    client.put(key("a"), value("10.0.0.1:80"), None).await?;
    client.put(key("b"), value("10.0.0.2:80"), None).await?;
    let mut file = None;
    wait_until("the cache is written", async || {
        let entries = fs::read_dir(folder.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let has_both = |path: &std::path::PathBuf| {
            path.extension()
                .is_some_and(|extension| extension == "json")
                && fs::read_to_string(path).is_ok_and(|text| text.contains("10.0.0.2:80"))
        };
        file = paths.into_iter().find(has_both);
        file.is_some()
    })
    .await;
    drop(directory);
    client.close().await?;
    etcd.kill().await?;

    let file = file.ok_or("no file")?;
    let text = fs::read_to_string(&file)?.replace("10.0.0.2:80", "0.0.0.0:80");
    let (_, body) = text.split_once('\n').ok_or("no header")?;
    let checksum = crc32fast::hash(body.as_bytes());
    fs::write(
        &file,
        format!("goo-etcd instances 2 {checksum:08x}\n{body}"),
    )?;
    let (_client, directory) = open().await?;
    assert_eq!(listing(&directory.snapshot()), ["a=10.0.0.1:80"]);
    assert_eq!(directory.snapshot().undecodable(), 1);
    Ok(())
}
