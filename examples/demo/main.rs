//! The demo: servers join, leave and crash, etcd restarts, and a client calls all the time.
//!
//! ```text
//! cargo build --examples && cargo run --example demo
//! ```
//!
//! The demo starts an etcd (`goo_etcd::testing`) and greeter servers in their own processes, and
//! calls the servers at a steady rate. Each act is checked against the real outcome. The last line
//! is a summary, and the exit status is 0 if every act succeeded.

mod load;
mod screen;
mod server;

use std::collections::BTreeSet;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Directory, GetOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, sleep_until};

use load::{Load, RATE};
use screen::play_act;
use server::Server;

/// The service's name.
const SERVICE: &str = "greeter";

/// The time to live of a registration: etcd's minimum, to keep the demo short.
const TTL: Duration = Duration::from_secs(2);

/// The time for which etcd is down: longer than the TTL.
const ETCD_DOWN: Duration = Duration::from_millis(3_500);

/// The time limit, on a busy machine, for effects that are usually immediate.
const PATIENCE: Duration = Duration::from_secs(10);

/// The time for which a started call may still use the previous snapshot.
const SETTLE: Duration = Duration::from_millis(300);

/// The time for which an act is observed after its event. It exceeds the deadline of a call, so
/// that every call that the event made fail has failed by the end.
const WATCHED: Duration = Duration::from_millis(2_500);

/// The ids of the servers.
const SERVERS: [&str; 4] = ["a", "b", "c", "d"];

#[tokio::main]
async fn main() -> ExitCode {
    // After a signal the story is dropped, which ends its processes.
    tokio::select! {
        outcome = story() => match outcome {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("demo: {error}");
                ExitCode::FAILURE
            }
        },
        _ = stop_signal() => {
            screen::draw("");
            println!("demo: interrupted");
            // 128 + SIGINT, the status that shells report after Ctrl-C.
            ExitCode::from(130)
        }
    }
}

/// Plays all acts, and returns whether all succeeded.
async fn story() -> Result<bool, Box<dyn std::error::Error>> {
    screen::draw("starting an etcd and three servers ...");
    let etcd = Etcd::start().await?;
    let endpoint = etcd.endpoint();
    let config = Config::builder().endpoints([&endpoint]).build()?;
    let client = Client::connect("demo", config).await?;
    let directory = Directory::watch(&client, SERVICE).await?;
    let start = |id| Server::start(id, &endpoint);
    let (mut a, mut b, mut c) = (start("a")?, start("b")?, start("c")?);
    for server in [&mut a, &mut b, &mut c] {
        wait_until_registered(server, &directory).await?;
    }
    let load = Load::start(&directory)?;
    let stage = Stage {
        etcd,
        client,
        directory,
        load,
    };
    let load = &stage.load;

    screen::draw("");
    println!("etcd at {endpoint}, {RATE} calls per second, registrations with a TTL of {TTL:?}");
    println!();

    screen::print_header(&SERVERS);
    let up = play_act(
        "three servers",
        &SERVERS,
        load,
        stage.servers_respond(&["a", "b", "c"]),
    )
    .await;
    let mut d = start("d")?;
    let joined = play_act("d joins", &SERVERS, load, stage.server_joins(&mut d)).await;
    let left = play_act(
        "a leaves (SIGTERM)",
        &SERVERS,
        load,
        stage.server_leaves(&mut a),
    )
    .await;
    let others = ["c", "d"];
    let killed = play_act(
        "b is killed (SIGKILL)",
        &SERVERS,
        load,
        stage.server_is_killed(&mut b, &others),
    )
    .await;
    let remain = [c.key(), d.key()].into();
    let etcd_restart = play_act(
        "etcd stops and starts",
        &SERVERS,
        load,
        stage.etcd_restarts(remain),
    )
    .await;

    let total = stage.load.finish().await;
    let word = |ok| if ok { "ok" } else { "failed" };
    println!();
    println!(
        "demo: requests={} failed={} joined={} left={} killed={} etcd_restart={}",
        total.requests(),
        total.failed,
        word(joined),
        word(left),
        word(killed),
        word(etcd_restart)
    );
    Ok(up && joined && left && killed && etcd_restart)
}

/// The things that all acts use.
struct Stage {
    etcd: Etcd,
    client: Client,
    directory: Directory,
    load: Load,
}

/// A note for the act's line, or the reason of the failure.
type Outcome = Result<String, String>;

impl Stage {
    /// All of `servers` respond, and no call fails.
    async fn servers_respond(&self, servers: &[&str]) -> Outcome {
        let failed = self.load.tally().failed;
        let responds = |id: &&str| self.load.tally().responses_of(id) > 0;
        wait_until("all servers respond", PATIENCE, async || {
            Ok(servers.iter().all(responds))
        })
        .await?;
        sleep(WATCHED).await;
        self.check_failures(failed)?;
        Ok(String::new())
    }

    /// A new server gets calls.
    async fn server_joins(&self, server: &mut Server) -> Outcome {
        let failed = self.load.tally().failed;
        wait_until_registered(server, &self.directory).await?;
        let responds = || self.load.tally().responses_of(server.id) > 0;
        let what = "the server responds to a call";
        let after = wait_until(what, PATIENCE, async || Ok(responds())).await?;
        sleep(WATCHED).await;
        self.check_failures(failed)?;
        Ok(format!("first response after {} ms", after.as_millis()))
    }

    /// A server that leaves first stops getting calls, then its key is deleted, then its process
    /// exits. No call fails.
    async fn server_leaves(&self, server: &mut Server) -> Outcome {
        let (id, key, failed) = (server.id, server.key(), self.load.tally().failed);
        let drained = async {
            let is_called = || {
                let snapshot = self.directory.snapshot();
                snapshot.instances().any(|i| i.id == id && i.is_eligible())
            };
            let what = "the server is marked as draining";
            wait_until(what, PATIENCE, async || Ok(!is_called())).await?;
            Ok::<_, String>(Instant::now())
        };
        let (status, drained) = tokio::try_join!(server.terminate(), drained)?;
        if !status.success() {
            return Err(format!("the server exited with {status}"));
        }
        if self.keys().await?.contains(&key) {
            return Err(format!("the server has exited, but {key} is still in etcd"));
        }
        sleep(WATCHED).await;
        if self.load.tally().has_responded_since(id, drained + SETTLE) {
            return Err("the server was called after it was marked as draining".to_owned());
        }
        self.check_failures(failed)?;
        Ok(format!("drained, key deleted, {status}"))
    }

    /// A killed server gets no more calls at once, long before its lease expires, and no call
    /// fails.
    async fn server_is_killed(&self, server: &mut Server, others: &[&str]) -> Outcome {
        let (id, key, failed) = (server.id, server.key(), self.load.tally().failed);
        server.kill()?;
        let killed = Instant::now();
        let limit = TTL + PATIENCE;
        let expired = async || Ok(!self.keys().await?.contains(&key));
        let after = wait_until("its key expires", limit, expired).await?;
        let unknown = || self.directory.snapshot().instances().all(|i| i.id != id);
        wait_until("the directory removes it", PATIENCE, async || Ok(unknown())).await?;
        sleep(WATCHED).await;
        self.check_failures(failed)?;
        let tally = self.load.tally();
        if tally.has_responded_since(id, killed + SETTLE) {
            return Err("the server still responds".to_owned());
        }
        if let Some(silent) = others
            .iter()
            .find(|id| !tally.has_responded_since(id, killed))
        {
            return Err(format!("{silent} does not respond either"));
        }
        Ok(format!(
            "no calls at once, out of etcd after {:.1} s",
            after.as_secs_f64()
        ))
    }

    /// Calls go on while etcd is down. All registrations are restored when it is up again.
    async fn etcd_restarts(&self, registrations: BTreeSet<String>) -> Outcome {
        let describe = |error: goo_etcd::testing::TestingError| error.to_string();
        let failed = self.load.tally().failed;
        self.etcd.stop().await.map_err(describe)?;
        let down = Instant::now();
        let live = || self.directory.snapshot().freshness().is_live();
        wait_until("the snapshot turns stale", PATIENCE, async || Ok(!live())).await?;
        let before = self.load.tally().requests();
        let counted = Instant::now();
        sleep_until(down + ETCD_DOWN).await;
        let calls = self.load.tally().requests() - before;
        if (calls as f64) < counted.elapsed().as_secs_f64() * f64::from(RATE) / 2.0 {
            return Err(format!("only {calls} calls while etcd was down"));
        }
        self.check_failures(failed)?;

        self.etcd.start_again().await.map_err(describe)?;
        let back = Instant::now();
        wait_until("the snapshot is live again", PATIENCE, async || Ok(live())).await?;
        // Ignores errors, because etcd may be slow to respond at first.
        let complete = async || Ok(self.keys().await.is_ok_and(|keys| keys == registrations));
        wait_until("all registrations are restored", PATIENCE, complete).await?;
        let after = back.elapsed();
        // The keys must stay when the old leases expire.
        sleep(TTL + Duration::from_millis(500)).await;
        let keys = self.keys().await?;
        if keys != registrations {
            return Err(format!("the registered keys are now {keys:?}"));
        }
        self.check_failures(failed)?;
        Ok(format!(
            "{calls} calls without etcd, all back in {} ms",
            after.as_millis()
        ))
    }

    /// Fails if more than `failed` calls have failed.
    fn check_failures(&self, failed: u64) -> Result<(), String> {
        let tally = self.load.tally();
        match tally.last_failure() {
            Some(reason) if tally.failed > failed => Err(format!("a call failed: {reason}")),
            _ => Ok(()),
        }
    }

    /// The service's keys in etcd, read without the directory.
    async fn keys(&self) -> Result<BTreeSet<String>, String> {
        let options = GetOptions::new().with_prefix().with_keys_only();
        let range = format!("services/{SERVICE}/");
        let response = self.client.get(range, Some(options)).await;
        let response = response.map_err(|error| error.to_string())?;
        let keys = response
            .kvs()
            .iter()
            .map(|kv| kv.key_str().map(str::to_owned));
        keys.collect::<Result<_, _>>()
            .map_err(|error| error.to_string())
    }
}

/// Waits until a started server is in the directory.
async fn wait_until_registered(server: &mut Server, directory: &Directory) -> Result<(), String> {
    wait_until(
        "the server is registered",
        PATIENCE,
        async || match server.exit_status() {
            Some(status) => Err(format!("server {} exited with {status}", server.id)),
            None => Ok(directory.snapshot().instances().any(|i| i.id == server.id)),
        },
    )
    .await
    .map(drop)
}

/// Waits until `holds` returns true, and returns how long that took.
async fn wait_until(
    what: &str,
    limit: Duration,
    mut holds: impl AsyncFnMut() -> Result<bool, String>,
) -> Result<Duration, String> {
    let started = Instant::now();
    while !holds().await? {
        if started.elapsed() > limit {
            return Err(format!("not within {limit:?}: {what}"));
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(started.elapsed())
}

/// Resolves on Ctrl-C and SIGTERM.
async fn stop_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result,
    }
}
