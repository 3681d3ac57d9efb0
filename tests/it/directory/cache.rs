//! The cache of last known instances on disk, for clients that start while etcd is unavailable.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::balanced::{call, wait_until_ready};
use crate::support::echo::EchoServer;
use crate::support::{TestResult, key, listing, value, wait_until};
use goo_etcd::testing::Etcd;
use goo_etcd::{BalancedChannel, Client, Config, Directory, Freshness, Registrar};
use tempfile::TempDir;

/// A lazily connected client. Directories are shared per client, so a new client opens a new one,
/// as a new process would.
async fn connect_lazy(etcd: &Etcd) -> goo_etcd::Result<Client> {
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        .request_timeout(Duration::from_secs(2))
        .build()?;
    Client::connect_lazy("main", config)
}

async fn open_cached(client: &Client, folder: &Path) -> goo_etcd::Result<Directory> {
    let builder = Directory::builder(client, "greeter");
    builder.cache_dir(folder).watch().await
}

/// The files in the folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Waits until the only file in the folder contains `with`, and no temporary file is left. At the
/// first write a temporary file is the only one for a moment.
async fn wait_for_cache(folder: &Path, with: &str) -> PathBuf {
    let mut only = PathBuf::new();
    wait_until("the cache is written", async || match &files(folder)[..] {
        [file]
            if file
                .extension()
                .is_some_and(|extension| extension == "json") =>
        {
            only.clone_from(file);
            fs::read_to_string(file).is_ok_and(|text| text.contains(with))
        }
        _ => false,
    })
    .await;
    only
}

#[tokio::test]
async fn cache_serves_while_etcd_is_away() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let servers = [EchoServer::start(), EchoServer::start()];
    {
        let client = connect_lazy(&etcd).await?;
        let directory = open_cached(&client, folder.path()).await?;
        for server in &servers {
            let address = server.address();
            client.put(key(address), value(address), None).await?;
        }
        wait_for_cache(folder.path(), servers[0].address()).await;
        wait_for_cache(folder.path(), servers[1].address()).await;
        drop(directory);
        client.close().await?;
    }
    etcd.kill().await?;

    let started = Instant::now();
    let client = connect_lazy(&etcd).await?;
    let directory = open_cached(&client, folder.path()).await?;
    let snapshot = directory.snapshot();
    assert_eq!(snapshot.len(), 2);
    let channel = BalancedChannel::builder(&directory).build()?;
    call(&channel).await?;
    // Without the cache the directory could not open before etcd returns.
    let took = started.elapsed();
    assert!(took < Duration::from_secs(20), "it took {took:?}");
    let Freshness::Stale { reason, .. } = snapshot.freshness() else {
        panic!("the directory is live");
    };
    let file = files(folder.path())[0].display().to_string();
    assert!(reason.contains(&file), "{reason}");
    assert!(snapshot.freshness().age() > Duration::ZERO);
    assert!(snapshot.revision() > 0);

    let revision = snapshot.revision();
    etcd.start_again().await?;
    wait_until("the directory is live", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;
    assert!(directory.snapshot().revision() >= revision);
    assert_eq!(directory.snapshot().len(), 2);
    let third = EchoServer::start();
    let put = async || {
        let put = client.put(key(third.address()), value(third.address()), None);
        put.await.is_ok()
    };
    wait_until("the third server is put", put).await;
    wait_until_ready(&channel, 3).await;
    // Endpoints that stayed in the set stayed connected.
    for server in &servers {
        assert_eq!(server.counts().accepted(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn wiped_etcd_replaces_the_cache() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let client = connect_lazy(&etcd).await?;
    for n in 0..10 {
        client
            .put(key("old"), value(&format!("h:{}", n + 1)), None)
            .await?;
    }
    let directory = open_cached(&client, folder.path()).await?;
    wait_for_cache(folder.path(), "h:10").await;
    drop(directory);
    client.close().await?;
    etcd.wipe_and_restart().await?;
    etcd.kill().await?;

    let client = connect_lazy(&etcd).await?;
    let directory = open_cached(&client, folder.path()).await?;
    assert_eq!(listing(&directory.snapshot()), ["old=h:10"]);
    etcd.start_again().await?;
    wait_until("the new history is shown", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && snapshot.is_empty()
    })
    .await;
    // The cache no longer has the old instance.
    let is_empty = |file: &PathBuf| !fs::read_to_string(file).unwrap().contains("h:10");
    wait_until("the cache is replaced", async || {
        files(folder.path()).iter().all(is_empty)
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn damaged_cache_is_ignored_and_rewritten() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let client = connect_lazy(&etcd).await?;
    client.put(key("a"), value("h:1234"), None).await?;
    let directory = open_cached(&client, folder.path()).await?;
    let file = wait_for_cache(folder.path(), "h:1234").await;
    drop(directory);
    client.close().await?;
    let good = fs::read(&file)?;
    let text = String::from_utf8(good.clone())?;
    etcd.kill().await?;
    // Copied elsewhere, because a write of the dropped directory may follow up to a second later.
    let folder = TempDir::new()?;
    let file = folder.path().join(file.file_name().ok_or("a name")?);
    fs::write(&file, &good)?;

    // The intact file works.
    let client = connect_lazy(&etcd).await?;
    let known = open_cached(&client, folder.path()).await?.snapshot();
    assert_eq!(listing(&known), ["a=h:1234"]);

    let half = good[..good.len() / 2].to_vec();
    let other_port = text.replace("h:1234", "h:1235").into_bytes();
    let other_version = text.replace("instances 2", "instances 1");
    assert_ne!(other_version, text);
    let other_version = other_version.into_bytes();
    let damages: [&[u8]; 6] = [b"", b"\n", b"{}", &half, &other_port, &other_version];
    for damaged in damages {
        fs::write(&file, damaged)?;
        let client = connect_lazy(&etcd).await?;
        let error = open_cached(&client, folder.path()).await.err();
        // The same error as without a cache.
        let text = format!("{error:?}");
        assert!(text.contains("list") || text.contains("get"), "{text}");
    }
    // A folder in place of the file.
    fs::remove_file(&file)?;
    fs::create_dir(&file)?;
    let client = connect_lazy(&etcd).await?;
    assert!(open_cached(&client, folder.path()).await.is_err());
    fs::remove_dir(&file)?;

    fs::write(&file, &half)?;
    etcd.start_again().await?;
    let client = connect_lazy(&etcd).await?;
    let directory = open_cached(&client, folder.path()).await?;
    assert_eq!(listing(&directory.snapshot()), ["a=h:1234"]);
    assert!(directory.snapshot().freshness().is_live());
    wait_for_cache(folder.path(), "h:1234").await;
    Ok(())
}

#[tokio::test]
async fn cache_file_is_replaced_atomically() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let client = connect_lazy(&etcd).await?;
    let directory = open_cached(&client, folder.path()).await?;
    let started = Instant::now();
    let (mut seen, mut last) = (std::collections::BTreeSet::new(), 0);
    while started.elapsed() < Duration::from_secs(4) {
        last += 1;
        let put = client.put(key("a"), value(&format!("h:{last}")), None);
        put.await?;
        for path in files(folder.path()) {
            // A temporary file may exist beside it.
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                let text = fs::read_to_string(&path)?;
                let (_, body) = text.split_once('\n').ok_or("no header")?;
                let _: serde_json::Value = serde_json::from_str(body)?;
                seen.insert(text);
            }
        }
    }
    // The file is written about once a second, regardless of the number of changes.
    assert!((2..=8).contains(&seen.len()), "{} were seen", seen.len());
    // The last change is written even though the directory is dropped.
    wait_until("the last change is shown", async || {
        listing(&directory.snapshot()) == [format!("a=h:{last}")]
    })
    .await;
    drop(directory);
    wait_for_cache(folder.path(), &format!("\"h:{last}\"")).await;
    Ok(())
}

#[tokio::test]
async fn impossible_cache_folder_is_named() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let file = folder.path().join("file");
    fs::write(&file, "")?;
    let client = connect_lazy(&etcd).await?;
    let error = open_cached(&client, &file.join("below")).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("invalid cache_dir"), "{text}");
    assert!(text.contains("file/below"), "{text}");
    Ok(())
}

#[tokio::test]
async fn server_started_before_etcd_is_registered() -> TestResult {
    let etcd = Etcd::start().await?;
    etcd.kill().await?;
    let client = connect_lazy(&etcd).await?;
    let server = EchoServer::start();
    let instance = goo_etcd::Instance::new("greeter", server.address());
    let registration = Registrar::new(&client).register_eventually(instance)?;
    // Longer than the request timeout.
    tokio::time::sleep(Duration::from_secs(3)).await;
    etcd.start_again().await?;
    let channel = BalancedChannel::connect(&client, "greeter").await?;
    wait_until("a call succeeds", async || call(&channel).await.is_ok()).await;
    assert_eq!(
        registration.state(),
        goo_etcd::RegistrationState::Registered
    );
    Ok(())
}
