//! A fleet moves from kratos' format to the default one under load, without downtime.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::greeter::{GreeterServer, call_greeter};
use crate::support::{TestResult, connect, wait_until};
use goo_etcd::format::{EtcdNaming, Kratos};
use goo_etcd::testing::Etcd;
use goo_etcd::{BalancedChannel, Client, Directory, GetOptions, Instance, Registrar, Registration};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const FLEET: usize = 3;
/// Concurrent calls of each client.
const TASKS: usize = 4;

/// The formats that a server writes, deploy by deploy.
#[derive(Debug, Clone, Copy)]
enum Deploy {
    Kratos,
    Both,
    Default,
}

/// A running server and its registration.
struct Running {
    server: GreeterServer,
    registration: Registration,
}

impl Running {
    async fn start(etcd: &Etcd, deploy: Deploy) -> TestResult<Self> {
        let client = connect(etcd.endpoint()).await;
        let builder = Registrar::builder(&client);
        let registrar = match deploy {
            Deploy::Kratos => builder.format(Kratos),
            Deploy::Both => builder.format(Kratos).and_format(EtcdNaming),
            Deploy::Default => builder,
        }
        .build()?;
        let server = GreeterServer::start().await;
        let instance = Instance::new("greeter", server.address()).version(format!("{deploy:?}"));
        let registration = registrar.register(instance).await?;
        Ok(Self {
            server,
            registration,
        })
    }

    /// Leaves and stops, as a server does on SIGTERM.
    async fn leave(self) {
        let (signal, signalled) = oneshot::channel::<()>();
        signal.send(()).ok();
        self.registration.leave_on(signalled).await;
        self.server.stop().await;
    }
}

/// A client that makes calls until [`end`](Self::end).
struct Load {
    name: &'static str,
    directory: Directory,
    over: Arc<AtomicBool>,
    calls: Vec<JoinHandle<Calls>>,
}

#[derive(Debug, Default)]
struct Calls {
    ok: usize,
    failed: Vec<String>,
    servers: BTreeSet<String>,
}

impl Load {
    fn start(name: &'static str, directory: Directory) -> Self {
        let channel = BalancedChannel::builder(&directory).build().unwrap();
        let over = Arc::new(AtomicBool::new(false));
        let call = |_| {
            let (channel, over) = (channel.clone(), Arc::clone(&over));
            tokio::spawn(async move {
                let mut calls = Calls::default();
                while !over.load(Ordering::Relaxed) {
                    match call_greeter(&channel).await {
                        Ok(server) => {
                            calls.ok += 1;
                            calls.servers.insert(server);
                        }
                        Err(status) => calls.failed.push(status.to_string()),
                    }
                    // Leaves the machine time for everything else.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                calls
            })
        };
        Self {
            name,
            calls: (0..TASKS).map(call).collect(),
            directory,
            over,
        }
    }

    /// Stops the calls and returns the servers that were called.
    ///
    /// # Panics
    ///
    /// If any call has failed.
    async fn end(self) -> BTreeSet<String> {
        self.over.store(true, Ordering::Relaxed);
        let mut all = Calls::default();
        for calls in self.calls {
            let calls = calls.await.unwrap();
            all.ok += calls.ok;
            all.failed.extend(calls.failed);
            all.servers.extend(calls.servers);
        }
        println!(
            "{}: {} calls, {} failed",
            self.name,
            all.ok,
            all.failed.len()
        );
        assert!(all.failed.is_empty(), "{}: {:?}", self.name, all.failed);
        assert!(all.ok > 0, "{}", self.name);
        all.servers
    }
}

/// Replaces the servers one by one; each new server starts before the old one leaves.
async fn roll(etcd: &Etcd, fleet: &mut Vec<Running>, deploy: Deploy) -> TestResult {
    for _ in 0..FLEET {
        fleet.push(Running::start(etcd, deploy).await?);
        fleet.remove(0).leave().await;
    }
    Ok(())
}

fn addresses(fleet: &[Running]) -> BTreeSet<String> {
    let address = |running: &Running| running.server.address().to_owned();
    fleet.iter().map(address).collect()
}

async fn registered_keys(client: &Client, prefix: &str) -> TestResult<usize> {
    let options = GetOptions::new().with_prefix();
    Ok(client.get(prefix, options).await?.kvs().len())
}

#[tokio::test]
async fn format_migration_under_load_fails_no_call() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut fleet = Vec::new();
    for _ in 0..FLEET {
        fleet.push(Running::start(&etcd, Deploy::Kratos).await?);
    }
    let mut everyone = addresses(&fleet);

    // An old client reads kratos' format, an updated client both.
    let of_kratos = Directory::builder(&client, "greeter").format(Kratos);
    let old = Load::start("kratos' format alone", of_kratos.watch().await?);
    let of_both = Directory::builder(&client, "greeter").and_format(Kratos);
    let both = Load::start("both formats", of_both.watch().await?);

    roll(&etcd, &mut fleet, Deploy::Both).await?;
    everyone.extend(addresses(&fleet));
    assert_eq!(
        registered_keys(&client, "/microservices/greeter/").await?,
        FLEET
    );
    assert_eq!(registered_keys(&client, "services/greeter/").await?, FLEET);
    wait_until(
        "the client of both formats sees each server once",
        async || both.directory.snapshot().len() == FLEET,
    )
    .await;

    // All servers write both formats, so old clients end and new ones start.
    let first_half = old.end().await;
    assert!(first_half.is_superset(&addresses(&fleet)));
    let new = Load::start(
        "the default format alone",
        Directory::watch(&client, "greeter").await?,
    );

    roll(&etcd, &mut fleet, Deploy::Default).await?;
    everyone.extend(addresses(&fleet));
    assert_eq!(
        registered_keys(&client, "/microservices/greeter/").await?,
        0
    );
    assert_eq!(registered_keys(&client, "services/greeter/").await?, FLEET);
    let versions = async || {
        let shown = both.directory.snapshot();
        let versions = shown
            .instances()
            .filter_map(|instance| instance.version.clone());
        versions.collect::<Vec<_>>()
    };
    wait_until("only the last deploy is left", async || {
        versions().await == ["Default", "Default", "Default"]
    })
    .await;

    assert!(new.end().await.is_superset(&addresses(&fleet)));
    assert_eq!(both.end().await, everyone, "a server was not called");
    Ok(())
}
