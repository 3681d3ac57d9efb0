//! One etcd server under test.

use std::fmt;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use etcd_client::{Client, CompactionOptions};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::builder::{EtcdBuilder, Member};
use super::process::{Guard, Process, find_etcd};
use super::{Result, TestingError};

/// How often a condition is looked at while waiting for it.
pub(super) const POLL: Duration = Duration::from_millis(20);
/// How long a server that was asked to end may take before it is made to.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A real etcd server that belongs to a test: on a free loopback port, with its data in a temporary
/// folder.
///
/// Cloning gives another handle to the same server. When the last handle drops, also in a panic, the
/// server is killed and its folder removed; the drop waits for that, some milliseconds. Should the
/// test process itself be killed, a small guard process does the same.
///
/// The port stays the same for the handle's life, and nobody else gets it while the server is down.
#[derive(Clone)]
pub struct Etcd {
    inner: Arc<Inner>,
}

struct Inner {
    // Dropped in this order: the process before the folder it writes to.
    process: Mutex<Option<Process>>,
    builder: EtcdBuilder,
    member: Member,
    initial_cluster: String,
    /// Whether the next start joins a cluster that exists (`--initial-cluster-state`).
    joins: AtomicBool,
    /// Where the log of the last start begins.
    log_start: AtomicU64,
    data_dir: PathBuf,
    guard: Arc<Guard>,
    folder: TempDir,
}

impl Etcd {
    /// Starts a server and waits until it answers.
    ///
    /// # Errors
    ///
    /// When no etcd is found, when it exits (the error has an excerpt of its log), or when it does
    /// not answer within a minute.
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// A server, or a cluster, with options.
    pub fn builder() -> EtcdBuilder {
        EtcdBuilder::default()
    }

    /// Makes the handle and starts the process, without waiting for it to answer.
    pub(super) fn launch(
        builder: EtcdBuilder,
        member: Member,
        initial_cluster: String,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("goo-etcd-test-")
            .tempdir()
            .map_err(TestingError::io("making a temporary folder"))?;
        let etcd = Self {
            inner: Arc::new(Inner {
                process: Mutex::new(None),
                guard: Guard::start(folder.path())
                    .map(Arc::new)
                    .map_err(TestingError::io("starting the guard of an etcd"))?,
                data_dir: folder.path().join("data"),
                folder,
                builder,
                member,
                initial_cluster,
                joins: AtomicBool::new(false),
                log_start: AtomicU64::new(0),
            }),
        };
        etcd.spawn()?;
        Ok(etcd)
    }

    /// The member's name within its cluster.
    pub fn name(&self) -> &str {
        &self.inner.member.name
    }

    /// Where clients reach it, as `127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        self.inner.member.client.endpoint()
    }

    /// Where clients reach it, as `http://127.0.0.1:PORT`; `https` when started with a certificate.
    pub fn client_url(&self) -> String {
        let scheme = if self.inner.builder.is_tls() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://{}", self.endpoint())
    }

    /// Where the other members reach it.
    pub fn peer_url(&self) -> String {
        self.inner.member.peer_url()
    }

    /// The process id; `None` while it is down.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::id)
    }

    /// The folder of its data.
    pub fn data_dir(&self) -> &Path {
        &self.inner.data_dir
    }

    /// What it has logged in all its runs.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A plain client of this server alone, with the builder's connect options.
    ///
    /// # Errors
    ///
    /// When the options ask for authentication and it fails. Without a user it succeeds even while
    /// the server is down, and the calls fail.
    pub async fn client(&self) -> Result<Client> {
        Client::connect([self.client_url()], self.inner.builder.connect.clone())
            .await
            .map_err(TestingError::client("connecting"))
    }

    /// Kills it (SIGKILL) and waits for its end. Does nothing when it is down.
    pub async fn kill(&self) -> Result<()> {
        let process = self.process().take();
        // Dropping kills and waits; that blocks shortly.
        tokio::task::spawn_blocking(move || drop(process))
            .await
            .map_err(|error| TestingError::io("killing etcd")(error.into()))
    }

    /// Ends it in good order (SIGTERM) and waits for that, resuming it first if it is paused; after
    /// 20 seconds it is killed. Does nothing when it is down.
    pub async fn stop(&self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        self.signal(Signal::SIGTERM, "stopping etcd")?;
        self.signal(Signal::SIGCONT, "stopping etcd")?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.is_running() {
            if Instant::now() > deadline {
                return self.kill().await;
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Starts it after [`kill`](Self::kill) or [`stop`](Self::stop), on the same port and data, and
    /// waits until it answers. When it is running, this only waits.
    ///
    /// A member of a cluster answers only once a majority runs: start several members together
    /// (`tokio::join!`).
    ///
    /// # Errors
    ///
    /// As of [`start`](Self::start).
    pub async fn start_again(&self) -> Result<()> {
        self.spawn()?;
        self.wait_ready().await
    }

    /// Kills it and starts it again, on the same port and data, and waits until it answers. For a
    /// restart in good order: [`stop`](Self::stop), then [`start_again`](Self::start_again).
    pub async fn restart(&self) -> Result<()> {
        self.kill().await?;
        self.start_again().await
    }

    /// Kills it and starts it again with nothing in it, on the same port, and waits until it answers.
    /// Revisions begin anew.
    ///
    /// # Errors
    ///
    /// As of [`start`](Self::start). A member of a cluster that lost its data cannot just come back:
    /// use [`EtcdCluster::replace`](super::EtcdCluster::replace) or
    /// [`EtcdCluster::wipe_and_restart`](super::EtcdCluster::wipe_and_restart).
    pub async fn wipe_and_restart(&self) -> Result<()> {
        self.wipe().await?;
        self.start_again().await
    }

    /// Freezes it (SIGSTOP): connections stay open, and nobody answers. Returns once it stands still
    /// (on Linux; elsewhere that may take a moment longer).
    ///
    /// # Errors
    ///
    /// When it is down.
    pub async fn pause(&self) -> Result<()> {
        // One that has ended takes signals until it is waited for.
        self.check_running()?;
        self.signal(Signal::SIGSTOP, "pausing etcd")?;
        while self.process().as_ref().is_some_and(|p| !p.is_stopped()) {
            tokio::time::sleep(POLL).await;
            self.check_running()?;
        }
        Ok(())
    }

    /// Lets it go on after [`pause`](Self::pause) (SIGCONT), and does not wait.
    ///
    /// # Errors
    ///
    /// When it is down.
    pub fn resume(&self) -> Result<()> {
        self.check_running()?;
        self.signal(Signal::SIGCONT, "resuming etcd")
    }

    /// Compacts the history up to the current revision, and returns that revision. A watch that asks
    /// for an older one gets a compaction error.
    ///
    /// # Errors
    ///
    /// When etcd refuses, for example because this revision has been compacted before.
    pub async fn compact(&self) -> Result<i64> {
        let mut client = self.client().await?;
        let answer = client
            .get("compact", None)
            .await
            .map_err(TestingError::client("asking for the revision"))?;
        let revision = answer.header().map_or(0, |header| header.revision());
        self.compact_at(revision).await?;
        Ok(revision)
    }

    /// Compacts the history up to `revision`, and waits until it is physically gone.
    ///
    /// # Errors
    ///
    /// As of [`compact`](Self::compact), and for a revision in the future.
    pub async fn compact_at(&self, revision: i64) -> Result<()> {
        let options = CompactionOptions::new().with_physical();
        self.client()
            .await?
            .compact(revision, Some(options))
            .await
            .map_err(TestingError::client("compacting"))?;
        Ok(())
    }

    /// True while the process runs; paused counts as running.
    pub fn is_running(&self) -> bool {
        self.check_running().is_ok()
    }

    /// The process, for a moment: the lock is never held over an await.
    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        // A panic under the lock leaves a process that can still be killed.
        self.inner
            .process
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, signal: Signal, what: &'static str) -> Result<()> {
        match &*self.process() {
            Some(process) => process.signal(signal).map_err(TestingError::io(what)),
            None => Err(self.not_running(None)),
        }
    }

    pub(super) fn check_running(&self) -> Result<()> {
        let mut process = self.process();
        let Some(running) = &mut *process else {
            return Err(self.not_running(None));
        };
        match running
            .ended()
            .map_err(TestingError::io("asking for etcd's state"))?
        {
            None => Ok(()),
            Some(status) => {
                *process = None;
                Err(self.not_running(Some(status.to_string())))
            }
        }
    }

    fn not_running(&self, status: Option<String>) -> TestingError {
        TestingError::NotRunning {
            endpoint: self.endpoint(),
            status: status.unwrap_or_else(|| "stopped before".to_owned()),
            log: self.log_excerpt(),
        }
    }

    fn spawn(&self) -> Result<()> {
        let mut process = self.process();
        if let Some(running) = &mut *process
            && matches!(running.ended(), Ok(None))
        {
            return Ok(());
        }
        let inner = &*self.inner;
        let path = self.log_path();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(TestingError::io("opening etcd's log"))?;
        let length = log.metadata().map_or(0, |metadata| metadata.len());
        inner.log_start.store(length, Ordering::Relaxed);
        let program = inner.builder.program.clone().unwrap_or_else(find_etcd);
        let args = inner.builder.command_line(
            &inner.member,
            &inner.data_dir,
            &inner.initial_cluster,
            inner.joins.load(Ordering::Relaxed),
        );
        let started = Process::start(
            &program,
            &args,
            &inner.builder.envs,
            log,
            Arc::clone(&inner.guard),
        );
        *process = Some(started.map_err(|source| TestingError::CannotRun { program, source })?);
        Ok(())
    }

    /// Kills it and removes its data.
    pub(super) async fn wipe(&self) -> Result<()> {
        self.kill().await?;
        match std::fs::remove_dir_all(&self.inner.data_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(TestingError::io("removing etcd's data")(error))
            }
            _ => Ok(()),
        }
    }

    /// Whether an empty data folder means joining a cluster that exists, or founding one.
    pub(super) fn set_joins(&self, joins: bool) {
        self.inner.joins.store(joins, Ordering::Relaxed);
    }

    pub(super) fn options(&self) -> &EtcdBuilder {
        &self.inner.builder
    }

    fn log_path(&self) -> PathBuf {
        self.inner.folder.path().join("etcd.log")
    }

    /// The log of the last start.
    pub(super) fn last_log(&self) -> String {
        let start = usize::try_from(self.inner.log_start.load(Ordering::Relaxed)).unwrap_or(0);
        let mut log = std::fs::read(self.log_path()).unwrap_or_default();
        let last = log.split_off(start.min(log.len()));
        String::from_utf8_lossy(&last).into_owned()
    }

    pub(super) fn log_excerpt(&self) -> String {
        let log = self.last_log();
        let lines: Vec<_> = log.lines().collect();
        // A wrong flag is named in the first lines, before the usage; everything else in the last.
        match lines.len() {
            0..=20 => lines.join("\n"),
            n => [&lines[..3], &["..."], &lines[n - 15..]]
                .concat()
                .join("\n"),
        }
    }
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd")
            .field("name", &self.name())
            .field("endpoint", &self.endpoint())
            .field("pid", &self.pid())
            .finish_non_exhaustive()
    }
}
