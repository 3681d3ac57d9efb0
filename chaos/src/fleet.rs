//! The server processes, and the paths over which servers and clients reach etcd.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use futures::future::try_join_all;
use goo_etcd::testing::{EtcdCluster, Proxy};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};

use crate::record::{Clock, Exit, ExitKind, Life};
use crate::schedule::{CLIENT_PATHS, Name, Path, SERVER_PATHS};
use crate::server::LISTENING;

/// Limit for a process to start.
const START: Duration = Duration::from_secs(30);

/// Limit for a server to leave: 1 s of draining, two requests of up to 5 s each if etcd is down,
/// the calls in flight, and a margin for a busy machine.
const LEAVE: Duration = Duration::from_secs(15);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// For each path, one proxy per etcd member.
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

    /// The etcd endpoints for this path, or the members' own endpoints without one.
    pub fn endpoints(&self, path: Option<Path>, cluster: &EtcdCluster) -> Vec<String> {
        match path.and_then(|path| self.0.get(&path)) {
            Some(proxies) => proxies.iter().map(Proxy::endpoint).collect(),
            None => cluster.endpoints(),
        }
    }
}

/// A running server process.
struct Running {
    process: Child,
    /// The process ends when its input is closed. Kept apart from the [`Child`], which would close
    /// it while waiting.
    _input: Option<ChildStdin>,
}

/// All servers, running and ended. Dropping the fleet kills the running ones.
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

    /// Starts this program as a server process. Returns once it listens.
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
            // Ctrl-C in a terminal reaches the main program only.
            .process_group(0)
            .spawn()?;
        let stdout = process.stdout.take().ok_or("no stdout")?;
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
        self.lives.lock().insert(name, life);
        let _input = process.stdin.take();
        let running = Running { process, _input };
        self.running.lock().insert(name, running);
        Ok(())
    }

    /// Sends SIGKILL or SIGTERM. Returns once the process has exited.
    ///
    /// # Errors
    ///
    /// If the process does not exit, or not with the expected status.
    pub async fn end(&self, name: Name, how: ExitKind) -> Result<()> {
        // On a busy machine the process may still be starting.
        let started = async {
            loop {
                if let Some(running) = self.running.lock().remove(&name) {
                    return running;
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let mut running = timeout(START, started)
            .await
            .map_err(|_| format!("{name} is not running"))?;
        let process = &mut running.process;
        let pid = process.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| format!("{name} exited unasked"))?;
        let signalled = self.clock.now();
        let signal = match how {
            ExitKind::Killed => Signal::SIGKILL,
            ExitKind::Terminated => Signal::SIGTERM,
        };
        kill(Pid::from_raw(pid), signal)?;
        let status = timeout(LEAVE, process.wait()).await;
        if status.is_err() {
            process.kill().await?;
        }
        let gone = self.clock.now();
        if let Some(life) = self.lives.lock().get_mut(&name) {
            life.end = Some(Exit {
                how,
                signalled,
                gone,
            });
        }
        match (how, status) {
            (_, Err(_)) => Err(format!("{name} still ran {LEAVE:?} after SIGTERM").into()),
            (ExitKind::Terminated, Ok(status)) if !status.as_ref().is_ok_and(|s| s.success()) => {
                Err(format!("{name} was asked to leave and exited with {status:?}").into())
            }
            _ => Ok(()),
        }
    }

    /// The servers that exited although nothing asked them to.
    pub fn exited_unasked(&self) -> Vec<String> {
        let mut running = self.running.lock();
        let ended = running.iter_mut().filter_map(|(name, running)| {
            let status = running.process.try_wait().ok().flatten()?;
            Some(format!("{name} exited unasked: {status}"))
        });
        ended.collect()
    }

    pub fn lives(&self) -> Vec<Life> {
        self.lives.lock().values().cloned().collect()
    }
}
