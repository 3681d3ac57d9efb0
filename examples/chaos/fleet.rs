//! The servers, each a process of its own, and the paths on which they and the clients reach etcd.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::try_join_all;
use goo_etcd::testing::{EtcdCluster, Proxy};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};

use crate::record::{Clock, End, Ending, Life};
use crate::schedule::{CLIENT_PATHS, Name, Path, SERVER_PATHS};
use crate::server::LISTENING;

/// How long a process may take to start.
const START: Duration = Duration::from_secs(30);

/// How long a server may take to leave: a second of draining, two requests of at most 5 s each where
/// etcd is away, the calls in flight; and some for a busy machine.
const LEAVE: Duration = Duration::from_secs(15);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The way to each member, through a proxy of its own.
pub struct Paths(BTreeMap<Path, Vec<Proxy>>);

impl Paths {
    pub async fn start(cluster: &EtcdCluster) -> Result<Self> {
        let clients = (0..CLIENT_PATHS).map(Path::Client);
        let mut paths = BTreeMap::new();
        for path in clients.chain((0..SERVER_PATHS).map(Path::Server)) {
            let proxies = cluster.endpoints().into_iter().map(Proxy::start);
            paths.insert(path, try_join_all(proxies).await?);
        }
        Ok(Self(paths))
    }

    pub fn proxies(&self, path: Path) -> &[Proxy] {
        self.0.get(&path).map_or(&[], Vec::as_slice)
    }

    /// Where etcd is for whoever has this path, or none of its own.
    pub fn endpoints(&self, path: Option<Path>, cluster: &EtcdCluster) -> Vec<String> {
        match path.and_then(|path| self.0.get(&path)) {
            Some(proxies) => proxies.iter().map(Proxy::endpoint).collect(),
            None => cluster.endpoints(),
        }
    }
}

/// A server's process.
struct Running {
    process: Child,
    /// It ends when this is closed, which waiting for a [`Child`] does that still has it.
    _input: Option<ChildStdin>,
}

/// All servers that there are and were. Dropping it kills those that run.
pub struct Fleet {
    clock: Clock,
    ttl: Duration,
    logs: Option<PathBuf>,
    running: Mutex<BTreeMap<Name, Running>>,
    lives: Mutex<BTreeMap<Name, Life>>,
}

impl Fleet {
    pub fn new(clock: Clock, ttl: Duration, logs: Option<PathBuf>) -> Self {
        Self {
            clock,
            ttl,
            logs,
            running: Mutex::default(),
            lives: Mutex::default(),
        }
    }

    /// Starts this program again, as a server. Returns when it listens.
    pub async fn start(&self, name: Name, endpoints: &[String]) -> Result<()> {
        let stderr = match &self.logs {
            Some(folder) => File::create(folder.join(format!("{name}.log")))?.into(),
            None => Stdio::null(),
        };
        let mut process = Command::new(std::env::current_exe()?)
            .arg("server")
            .args(name.ids().flat_map(|id| ["--id".to_owned(), id]))
            .args(["--etcd", &endpoints.join(",")])
            .args(["--ttl", &self.ttl.as_secs().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            // Ctrl-C in a terminal goes to the program alone.
            .process_group(0)
            .spawn()?;
        let stdout = process.stdout.take().ok_or("stdout is piped")?;
        let mut lines = BufReader::new(stdout).lines();
        let line = timeout(START, lines.next_line()).await??;
        let address = line
            .as_deref()
            .and_then(|line| line.strip_prefix(LISTENING));
        let address = address.ok_or_else(|| format!("{name} did not start: {line:?}"))?;
        let life = Life {
            name,
            address: address.to_owned(),
            started: self.clock.now(),
            end: None,
        };
        lock(&self.lives).insert(name, life);
        let _input = process.stdin.take();
        let running = Running { process, _input };
        lock(&self.running).insert(name, running);
        Ok(())
    }

    /// SIGKILL or SIGTERM; returns when the process has ended.
    ///
    /// # Errors
    ///
    /// When it does not end, or not as it should.
    pub async fn end(&self, name: Name, how: Ending) -> Result<()> {
        // It may be starting still, on a busy machine.
        let started = async {
            loop {
                if let Some(running) = lock(&self.running).remove(&name) {
                    return running;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let mut running = timeout(START, started)
            .await
            .map_err(|_| format!("{name} does not run"))?;
        let process = &mut running.process;
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| format!("{name} has ended by itself"))?;
        let signalled = self.clock.now();
        let signal = match how {
            Ending::Killed => Signal::SIGKILL,
            Ending::Left => Signal::SIGTERM,
        };
        kill(Pid::from_raw(pid), signal)?;
        let status = timeout(LEAVE, process.wait()).await;
        if status.is_err() {
            process.kill().await?;
        }
        let gone = self.clock.now();
        if let Some(life) = lock(&self.lives).get_mut(&name) {
            life.end = Some(End {
                how,
                signalled,
                gone,
            });
        }
        match (how, status) {
            (_, Err(_)) => Err(format!("{name} still ran {LEAVE:?} after SIGTERM").into()),
            (Ending::Left, Ok(status)) if !status.as_ref().is_ok_and(|s| s.success()) => {
                Err(format!("{name} was to leave and ended with {status:?}").into())
            }
            _ => Ok(()),
        }
    }

    /// The servers that have ended although nobody asked them to.
    pub fn deserters(&self) -> Vec<String> {
        let mut running = lock(&self.running);
        let ended = running.iter_mut().filter_map(|(name, running)| {
            let status = running.process.try_wait().ok().flatten()?;
            Some(format!("{name} ended by itself: {status}"))
        });
        ended.collect()
    }

    pub fn lives(&self) -> Vec<Life> {
        lock(&self.lives).values().cloned().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
