//! The last known instances on disk: a client that starts while etcd is away.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use goo_etcd::testing::Etcd;
use goo_etcd::{BalancedChannel, Client, Config, Directory, Freshness, Registrar};
use support::balanced::{call, until_ready};
use support::echo::EchoServer;
use support::{TestResult, eventually, key, shown, value};
use tempfile::TempDir;

/// A client that waits for nobody, in a process of its own as far as its directories are concerned.
async fn lazy(etcd: &Etcd) -> goo_etcd::Result<Client> {
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        .request_timeout(Duration::from_secs(2))
        .build()?;
    Client::connect_lazy("main", config)
}

async fn cached(client: &Client, folder: &Path) -> goo_etcd::Result<Directory> {
    let builder = Directory::builder(client, "greeter");
    builder.cache_dir(folder).watch().await
}

/// All that is in the folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The only file in the folder, once it has been written with this in it, and nothing is being written.
async fn written(folder: &Path, with: &str) -> PathBuf {
    let mut only = PathBuf::new();
    eventually("it is written, and alone", async || {
        match &files(folder)[..] {
            [file] => {
                only.clone_from(file);
                fs::read_to_string(file).is_ok_and(|text| text.contains(with))
            }
            _ => false,
        }
    })
    .await;
    only
}

#[tokio::test]
async fn given_a_cache_when_a_client_starts_without_etcd_then_it_serves_at_once_and_is_live_when_etcd_is_back()
-> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let servers = [EchoServer::start(), EchoServer::start()];
    {
        let client = lazy(&etcd).await?;
        let directory = cached(&client, folder.path()).await?;
        for server in &servers {
            let address = server.address();
            client.put(key(address), value(address), None).await?;
        }
        written(folder.path(), servers[0].address()).await;
        written(folder.path(), servers[1].address()).await;
        drop(directory);
        client.close().await?;
    }
    etcd.kill().await?;

    let begun = Instant::now();
    let client = lazy(&etcd).await?;
    let directory = cached(&client, folder.path()).await?;
    let snapshot = directory.snapshot();
    assert_eq!(snapshot.len(), 2);
    let channel = BalancedChannel::builder(&directory).build()?;
    call(&channel).await?;
    // Without the cache it is not before etcd is back.
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(10), "it took {took:?}");
    let Freshness::Stale { reason, .. } = snapshot.freshness() else {
        panic!("it is said to be live");
    };
    let file = files(folder.path())[0].display().to_string();
    assert!(reason.contains(&file), "{reason}");
    assert!(snapshot.freshness().age() > Duration::ZERO);
    assert!(snapshot.revision() > 0);

    let revision = snapshot.revision();
    etcd.start_again().await?;
    eventually("it is live", async || {
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
    eventually("it is written", put).await;
    until_ready(&channel, 3).await;
    // What stayed in the set all the time stayed connected.
    for server in &servers {
        assert_eq!(server.counts().accepted(), 1);
    }
    Ok(())
}

#[tokio::test]
async fn given_a_cache_of_an_etcd_that_was_wiped_then_the_new_history_replaces_it() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let client = lazy(&etcd).await?;
    for n in 0..10 {
        client
            .put(key("old"), value(&format!("h:{}", n + 1)), None)
            .await?;
    }
    let directory = cached(&client, folder.path()).await?;
    written(folder.path(), "h:10").await;
    drop(directory);
    client.close().await?;
    etcd.wipe_and_restart().await?;
    etcd.kill().await?;

    let client = lazy(&etcd).await?;
    let directory = cached(&client, folder.path()).await?;
    assert_eq!(shown(&directory.snapshot()), ["old=h:10"]);
    etcd.start_again().await?;
    eventually("what is gone is gone", async || {
        let snapshot = directory.snapshot();
        snapshot.freshness().is_live() && snapshot.is_empty()
    })
    .await;
    // And is not back with the next client.
    let is_empty = |file: &PathBuf| !fs::read_to_string(file).unwrap().contains("h:10");
    eventually("it is forgotten", async || {
        files(folder.path()).iter().all(is_empty)
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn given_a_damaged_cache_then_it_is_ignored_and_written_anew() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let client = lazy(&etcd).await?;
    client.put(key("a"), value("h:1234"), None).await?;
    let directory = cached(&client, folder.path()).await?;
    let file = written(folder.path(), "h:1234").await;
    drop(directory);
    client.close().await?;
    let good = fs::read(&file)?;
    let text = String::from_utf8(good.clone())?;
    etcd.kill().await?;
    // Elsewhere, for what was noticed before the end may be written a second later.
    let folder = TempDir::new()?;
    let file = folder.path().join(file.file_name().ok_or("a name")?);
    fs::write(&file, &good)?;

    // It is good for something, as it is.
    let client = lazy(&etcd).await?;
    let known = cached(&client, folder.path()).await?.snapshot();
    assert_eq!(shown(&known), ["a=h:1234"]);

    let half = good[..good.len() / 2].to_vec();
    let other_port = text.replace("h:1234", "h:1235").into_bytes();
    let other_version = text.replace("instances 1", "instances 2").into_bytes();
    let damages: [&[u8]; 6] = [b"", b"\n", b"{}", &half, &other_port, &other_version];
    for damaged in damages {
        fs::write(&file, damaged)?;
        let client = lazy(&etcd).await?;
        let error = cached(&client, folder.path()).await.err();
        // As without one.
        let text = format!("{error:?}");
        assert!(text.contains("list") || text.contains("get"), "{text}");
    }
    // A folder where the file should be.
    fs::remove_file(&file)?;
    fs::create_dir(&file)?;
    let client = lazy(&etcd).await?;
    assert!(cached(&client, folder.path()).await.is_err());
    fs::remove_dir(&file)?;

    fs::write(&file, &half)?;
    etcd.start_again().await?;
    let client = lazy(&etcd).await?;
    let directory = cached(&client, folder.path()).await?;
    assert_eq!(shown(&directory.snapshot()), ["a=h:1234"]);
    assert!(directory.snapshot().freshness().is_live());
    written(folder.path(), "h:1234").await;
    Ok(())
}

#[tokio::test]
async fn given_changes_all_the_time_then_whoever_reads_the_file_sees_a_whole_one() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let client = lazy(&etcd).await?;
    let directory = cached(&client, folder.path()).await?;
    let begun = Instant::now();
    let (mut seen, mut last) = (std::collections::BTreeSet::new(), 0);
    while begun.elapsed() < Duration::from_secs(4) {
        last += 1;
        let put = client.put(key("a"), value(&format!("h:{last}")), None);
        put.await?;
        for path in files(folder.path()) {
            // Beside it another may be in the making.
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                let text = fs::read_to_string(&path)?;
                let (_, body) = text.split_once('\n').ok_or("it has no first line")?;
                let _: serde_json::Value = serde_json::from_str(body)?;
                seen.insert(text);
            }
        }
    }
    // About one a second, however many changes.
    assert!((2..=8).contains(&seen.len()), "{} were seen", seen.len());
    // The last change is not left out, though the directory is gone.
    eventually("it is shown", async || {
        shown(&directory.snapshot()) == [format!("a=h:{last}")]
    })
    .await;
    drop(directory);
    written(folder.path(), &format!("\"h:{last}\"")).await;
    Ok(())
}

#[tokio::test]
async fn given_a_folder_that_cannot_be_then_the_error_names_it() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = TempDir::new()?;
    let file = folder.path().join("file");
    fs::write(&file, "")?;
    let client = lazy(&etcd).await?;
    let error = cached(&client, &file.join("below")).await.unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("invalid cache_dir"), "{text}");
    assert!(text.contains("file/below"), "{text}");
    Ok(())
}

/// A server that starts before etcd does.
#[tokio::test]
async fn given_a_server_that_starts_without_etcd_then_it_is_registered_once_etcd_is_there()
-> TestResult {
    let etcd = Etcd::start().await?;
    etcd.kill().await?;
    let client = lazy(&etcd).await?;
    let server = EchoServer::start();
    let instance = goo_etcd::Instance::new("greeter", server.address());
    let registration = Registrar::new(&client).register_eventually(instance)?;
    // Longer than a request may take.
    tokio::time::sleep(Duration::from_secs(3)).await;
    etcd.start_again().await?;
    let channel = BalancedChannel::connect(&client, "greeter").await?;
    call_until_it_works(&channel).await;
    assert_eq!(
        registration.state(),
        goo_etcd::RegistrationState::Registered
    );
    Ok(())
}

async fn call_until_it_works(channel: &BalancedChannel) {
    eventually("it is called", async || call(channel).await.is_ok()).await;
}
