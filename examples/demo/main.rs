//! The demo: servers come and go, etcd goes and comes, and a client calls all the while.
//!
//! ```text
//! cargo build --examples && cargo run --example demo
//! ```
//!
//! It starts an etcd (`goo_etcd::testing`), greeter servers as processes of their own, and calls them
//! at a steady rate. Each act is judged by what really happened; the last line sums up, and the exit
//! status is 0 if every act did what it should.

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
use screen::act;
use server::Server;

/// The service's name.
const SERVICE: &str = "greeter";

/// How long a crashed server stays in etcd; the least that etcd grants, to keep the story short.
const TTL: Duration = Duration::from_secs(2);

/// How long etcd is away: longer than the TTL.
const ETCD_DOWN: Duration = Duration::from_millis(3_500);

/// How long what ought to happen at once may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a call that has begun may still go by what the directory said before.
const SETTLE: Duration = Duration::from_millis(300);

/// How long an act is watched after its event: longer than a call may take, so that those that the
/// event hurt have failed by then.
const WATCHED: Duration = Duration::from_millis(2_500);

/// The servers of the story.
const SERVERS: [&str; 4] = ["a", "b", "c", "d"];

#[tokio::main]
async fn main() -> ExitCode {
    // Whichever comes first: dropping the story ends its processes.
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
            screen::live("");
            println!("demo: interrupted");
            // As shells report a program that Ctrl-C ended.
            ExitCode::from(130)
        }
    }
}

/// Plays all acts; true if each did what it should.
async fn story() -> Result<bool, Box<dyn std::error::Error>> {
    screen::live("starting an etcd and three servers ...");
    let etcd = Etcd::start().await?;
    let endpoint = etcd.endpoint();
    let config = Config::builder().endpoints([&endpoint]).build()?;
    let client = Client::connect("demo", config).await?;
    let directory = Directory::watch(&client, SERVICE).await?;
    let start = |id| Server::start(id, &endpoint);
    let (mut a, mut b, mut c) = (start("a")?, start("b")?, start("c")?);
    for server in [&mut a, &mut b, &mut c] {
        registered(server, &directory).await?;
    }
    let load = Load::start(&directory)?;
    let stage = Stage {
        etcd,
        client,
        directory,
        load,
    };
    let load = &stage.load;

    screen::live("");
    println!("etcd at {endpoint}, {RATE} calls per second, registrations with a TTL of {TTL:?}");
    println!();

    screen::header(&SERVERS);
    let up = act("three servers", &SERVERS, load, stage.up(&["a", "b", "c"])).await;
    let mut d = start("d")?;
    let joined = act("d joins", &SERVERS, load, stage.joins(&mut d)).await;
    let left = act("a leaves (SIGTERM)", &SERVERS, load, stage.leaves(&mut a)).await;
    let others = ["c", "d"];
    let killed = act(
        "b is killed (SIGKILL)",
        &SERVERS,
        load,
        stage.is_killed(&mut b, &others),
    )
    .await;
    let remain = [c.key(), d.key()].into();
    let etcd_restart = act(
        "etcd stops and starts",
        &SERVERS,
        load,
        stage.restarts_etcd(remain),
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

/// What the acts are played on.
struct Stage {
    etcd: Etcd,
    client: Client,
    directory: Directory,
    load: Load,
}

/// A note for the act's line, or why it did not do what it should.
type Outcome = Result<String, String>;

impl Stage {
    /// All of `servers` answer, and no call fails.
    async fn up(&self, servers: &[&str]) -> Outcome {
        let failed = self.load.tally().failed;
        let answers = |id: &&str| self.load.tally().answered_by(id) > 0;
        until("all of them answer", PATIENCE, async || {
            Ok(servers.iter().all(answers))
        })
        .await?;
        sleep(WATCHED).await;
        self.no_failure_beyond(failed)?;
        Ok(String::new())
    }

    /// A server that is new is called.
    async fn joins(&self, server: &mut Server) -> Outcome {
        let failed = self.load.tally().failed;
        registered(server, &self.directory).await?;
        let answers = || self.load.tally().answered_by(server.id) > 0;
        let after = until("it answers a call", PATIENCE, async || Ok(answers())).await?;
        sleep(WATCHED).await;
        self.no_failure_beyond(failed)?;
        Ok(format!("first answer after {} ms", after.as_millis()))
    }

    /// A server that is asked to leave is called no more while it still could answer; then its key
    /// goes, then its process ends, and nobody notices.
    async fn leaves(&self, server: &mut Server) -> Outcome {
        let (id, key, failed) = (server.id, server.key(), self.load.tally().failed);
        let turned_away = async {
            let called = || {
                let snapshot = self.directory.snapshot();
                snapshot.instances().any(|i| i.id == id && i.is_eligible())
            };
            until("it is marked as draining", PATIENCE, async || Ok(!called())).await?;
            Ok::<_, String>(Instant::now())
        };
        let (status, turned_away) = tokio::try_join!(server.terminate(), turned_away)?;
        if !status.success() {
            return Err(format!("it ended with {status}"));
        }
        if self.keys().await?.contains(&key) {
            return Err(format!("it has ended, and {key} is still in etcd"));
        }
        sleep(WATCHED).await;
        if self.load.tally().answered_since(id, turned_away + SETTLE) {
            return Err("it was called after it was marked as draining".to_owned());
        }
        self.no_failure_beyond(failed)?;
        Ok(format!("drained, key deleted, {status}"))
    }

    /// A server that is killed is called no more from then on, long before it disappears with its
    /// lease, and no call fails.
    async fn is_killed(&self, server: &mut Server, others: &[&str]) -> Outcome {
        let (id, key, failed) = (server.id, server.key(), self.load.tally().failed);
        server.kill()?;
        let killed = Instant::now();
        let limit = TTL + PATIENCE;
        let expired = async || Ok(!self.keys().await?.contains(&key));
        let after = until("its key expires", limit, expired).await?;
        let unknown = || self.directory.snapshot().instances().all(|i| i.id != id);
        until("the client notices", PATIENCE, async || Ok(unknown())).await?;
        sleep(WATCHED).await;
        self.no_failure_beyond(failed)?;
        let tally = self.load.tally();
        if tally.answered_since(id, killed + SETTLE) {
            return Err("it still answers".to_owned());
        }
        if let Some(silent) = others.iter().find(|id| !tally.answered_since(id, killed)) {
            return Err(format!("{silent} answers no more either"));
        }
        Ok(format!(
            "called no more at once, out of etcd after {:.1} s",
            after.as_secs_f64()
        ))
    }

    /// Without etcd, calls go on with what was known; when it is back, so are all registrations.
    async fn restarts_etcd(&self, registrations: BTreeSet<String>) -> Outcome {
        let describe = |error: goo_etcd::testing::TestingError| error.to_string();
        let failed = self.load.tally().failed;
        self.etcd.stop().await.map_err(describe)?;
        let down = Instant::now();
        let live = || self.directory.snapshot().freshness().is_live();
        until("the snapshot turns stale", PATIENCE, async || Ok(!live())).await?;
        let before = self.load.tally().requests();
        let counted = Instant::now();
        sleep_until(down + ETCD_DOWN).await;
        let calls = self.load.tally().requests() - before;
        if (calls as f64) < counted.elapsed().as_secs_f64() * f64::from(RATE) / 2.0 {
            return Err(format!("only {calls} calls in the time without etcd"));
        }
        self.no_failure_beyond(failed)?;

        self.etcd.start_again().await.map_err(describe)?;
        let back = Instant::now();
        until("the snapshot is live again", PATIENCE, async || Ok(live())).await?;
        // etcd may be slow to answer at first.
        let complete = async || Ok(self.keys().await.is_ok_and(|keys| keys == registrations));
        until("all registrations are there", PATIENCE, complete).await?;
        let after = back.elapsed();
        // And they stay, beyond the leases from before.
        sleep(TTL + Duration::from_millis(500)).await;
        let keys = self.keys().await?;
        if keys != registrations {
            return Err(format!("registered is now {keys:?}"));
        }
        self.no_failure_beyond(failed)?;
        Ok(format!(
            "{calls} calls without it, all back in {} ms",
            after.as_millis()
        ))
    }

    /// No call has failed beyond so many.
    fn no_failure_beyond(&self, failed: u64) -> Result<(), String> {
        let tally = self.load.tally();
        match tally.last_failure() {
            Some(reason) if tally.failed > failed => Err(format!("a call failed: {reason}")),
            _ => Ok(()),
        }
    }

    /// What is in etcd under the service, read past the directory.
    async fn keys(&self) -> Result<BTreeSet<String>, String> {
        let options = GetOptions::new().with_prefix().with_keys_only();
        let range = format!("services/{SERVICE}/");
        let answer = self.client.get(range, Some(options)).await;
        let answer = answer.map_err(|error| error.to_string())?;
        let keys = answer
            .kvs()
            .iter()
            .map(|kv| kv.key_str().map(str::to_owned));
        keys.collect::<Result<_, _>>()
            .map_err(|error| error.to_string())
    }
}

/// Waits until a server that was started is in the directory.
async fn registered(server: &mut Server, directory: &Directory) -> Result<(), String> {
    until("it is registered", PATIENCE, async || {
        match server.ended() {
            Some(status) => Err(format!("server {} ended with {status}", server.id)),
            None => Ok(directory.snapshot().instances().any(|i| i.id == server.id)),
        }
    })
    .await
    .map(drop)
}

/// Waits until something holds; how long that took.
async fn until(
    what: &str,
    limit: Duration,
    mut holds: impl AsyncFnMut() -> Result<bool, String>,
) -> Result<Duration, String> {
    let begun = Instant::now();
    while !holds().await? {
        if begun.elapsed() > limit {
            return Err(format!("it did not happen within {limit:?} that {what}"));
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(begun.elapsed())
}

/// Resolves on Ctrl-C and SIGTERM.
async fn stop_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        result = tokio::signal::ctrl_c() => result,
    }
}
