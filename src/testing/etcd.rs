//! One etcd server under test.

use std::fmt;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use etcd_client::{Client, CompactionOptions};
use nix::sys::signal::Signal;
use parking_lot::{Mutex, MutexGuard};
use tempfile::TempDir;

use super::error::{Result, TestingError};
use super::member::Member;
use super::options::Options;
use super::process::{Process, Reaper, find_etcd};
use super::timing::POLL_INTERVAL;

/// The time limit for a graceful stop; then the server is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A real etcd server that belongs to a test, on a free loopback port and with a temporary data
/// folder.
///
/// Cloning gives another handle to the same server. When the last handle drops, also in a panic,
/// the server is killed and its folder is removed; the drop blocks for some milliseconds. If the
/// test process itself is killed, a small reaper process does the same.
///
/// The port stays the same for the life of the handle. No other test gets it while the server is
/// down.
#[derive(Clone)]
#[must_use = "dropping the last handle kills the server"]
pub struct Etcd {
    inner: Arc<Inner>,
}

/// An [`Etcd`] that does not keep the server running.
pub(super) struct WeakEtcd {
    inner: Weak<Inner>,
}

impl WeakEtcd {
    /// The process id; `None` while the server is down, and after its last handle.
    pub(super) fn pid(&self) -> Option<u32> {
        let inner = self.inner.upgrade()?;
        Etcd { inner }.pid()
    }
}

struct Inner {
    // Fields drop in this order: the process must end before its folder is removed.
    process: Mutex<Option<Process>>,
    options: Options,
    /// The program of the next start.
    program: Mutex<Option<PathBuf>>,
    member: Member,
    initial_cluster: String,
    /// Whether the next start joins an existing cluster (`--initial-cluster-state`).
    joins_existing: AtomicBool,
    /// The offset in the log file at which the log of the last start begins.
    log_start: AtomicU64,
    data_dir: PathBuf,
    reaper: Arc<Reaper>,
    folder: TempDir,
}

impl Etcd {
    /// Starts the process without waiting until it responds.
    pub(super) fn launch(
        options: Options,
        member: Member,
        initial_cluster: String,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("goo-etcd-test-")
            .tempdir()
            .map_err(TestingError::io("creating a temporary folder"))?;
        let etcd = Self {
            inner: Arc::new(Inner {
                process: Mutex::new(None),
                reaper: Reaper::start(folder.path())
                    .map(Arc::new)
                    .map_err(TestingError::io("starting the reaper of an etcd"))?,
                data_dir: folder.path().join("data"),
                folder,
                program: Mutex::new(options.program.clone()),
                options,
                member,
                initial_cluster,
                joins_existing: AtomicBool::new(false),
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

    /// The endpoint for clients, as `127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        self.inner.member.client.endpoint()
    }

    /// The URL for clients, `http://127.0.0.1:PORT`; `https` if started with a certificate.
    pub fn client_url(&self) -> String {
        let is_tls = self.inner.options.is_tls();
        let scheme = if is_tls { "https" } else { "http" };
        format!("{scheme}://{}", self.endpoint())
    }

    /// The URL at which the other members reach this one.
    pub fn peer_url(&self) -> String {
        self.inner.member.peer_url()
    }

    pub(super) fn downgrade(&self) -> WeakEtcd {
        WeakEtcd {
            inner: Arc::downgrade(&self.inner),
        }
    }

    /// Where the member itself listens for its peers, also behind a proxy.
    pub(super) fn peer_endpoint(&self) -> String {
        self.inner.member.peer.endpoint()
    }

    /// The process id; `None` while the server is down.
    pub fn pid(&self) -> Option<u32> {
        self.process().as_ref().map(Process::id)
    }

    /// The data folder.
    pub fn data_dir(&self) -> &Path {
        &self.inner.data_dir
    }

    /// The log of all runs of this server.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A client of this server alone, with the builder's connect options.
    ///
    /// # Errors
    ///
    /// Fails if the options have a user and the authentication fails. Without a user this method
    /// succeeds even while the server is down; calls then fail.
    pub async fn client(&self) -> Result<Client> {
        Client::connect([self.client_url()], self.inner.options.connect.clone())
            .await
            .map_err(TestingError::client("connecting"))
    }

    /// Kills the server (SIGKILL) and waits for its exit. Does nothing while it is down.
    pub async fn kill(&self) -> Result<()> {
        let process = self.process().take();
        // The drop kills the process and blocks until it has exited.
        tokio::task::spawn_blocking(move || drop(process))
            .await
            .map_err(|error| TestingError::io("killing etcd")(error.into()))
    }

    /// Stops the server gracefully (SIGTERM) and waits for its exit. Resumes it first if it is
    /// paused, and kills it after 20 s. Does nothing while it is down.
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
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Starts the server after [`kill`](Self::kill) or [`stop`](Self::stop), with the same port and
    /// data, and waits until it responds. Only waits if it is running.
    ///
    /// A member of a cluster responds only once a majority runs: start several members together
    /// (`tokio::join!`).
    ///
    /// # Errors
    ///
    /// Fails like [`start`](Self::start).
    pub async fn start_again(&self) -> Result<()> {
        self.spawn()?;
        self.wait_ready().await
    }

    /// Sets the etcd program of the next start, for example of the next release: then
    /// [`stop`](Self::stop) and [`start_again`](Self::start_again) upgrade this member.
    pub fn set_program(&self, path: impl Into<PathBuf>) {
        *self.inner.program.lock() = Some(path.into());
    }

    /// Kills the server, starts it with the same port and data, and waits until it responds. For a
    /// graceful restart call [`stop`](Self::stop), then [`start_again`](Self::start_again).
    pub async fn restart(&self) -> Result<()> {
        self.kill().await?;
        self.start_again().await
    }

    /// Kills the server, starts it with the same port and without data, and waits until it
    /// responds. Revisions start at 1 again.
    ///
    /// # Errors
    ///
    /// Fails like [`start`](Self::start). A member of a cluster cannot rejoin without its data:
    /// use [`EtcdCluster::replace`](super::EtcdCluster::replace) or
    /// [`EtcdCluster::wipe_and_restart`](super::EtcdCluster::wipe_and_restart).
    pub async fn wipe_and_restart(&self) -> Result<()> {
        self.wipe().await?;
        self.start_again().await
    }

    /// Freezes the server (SIGSTOP): its connections stay open, but it does not respond. On Linux
    /// this method returns once all threads have stopped; elsewhere they may stop a moment later.
    ///
    /// # Errors
    ///
    /// Fails while the server is down.
    pub async fn pause(&self) -> Result<()> {
        // A process that has exited still accepts signals until it is waited for.
        self.check_running()?;
        self.signal(Signal::SIGSTOP, "pausing etcd")?;
        while self.process().as_ref().is_some_and(|p| !p.is_stopped()) {
            tokio::time::sleep(POLL_INTERVAL).await;
            self.check_running()?;
        }
        Ok(())
    }

    /// Resumes the server after [`pause`](Self::pause) (SIGCONT). Does not wait until it responds.
    ///
    /// # Errors
    ///
    /// Fails while the server is down.
    pub fn resume(&self) -> Result<()> {
        self.check_running()?;
        self.signal(Signal::SIGCONT, "resuming etcd")
    }

    /// Compacts the history up to the current revision, and returns that revision. A watch from an
    /// older revision gets a compaction error.
    ///
    /// # Errors
    ///
    /// Fails if etcd refuses, for example because this revision is already compacted.
    pub async fn compact(&self) -> Result<i64> {
        let mut client = self.client().await?;
        let response = client
            .get("compact", None)
            .await
            .map_err(TestingError::client("reading the current revision"))?;
        let revision = response.header().map_or(0, |header| header.revision());
        self.compact_at(revision).await?;
        Ok(revision)
    }

    /// Compacts the history up to `revision`, and waits until it is physically removed.
    ///
    /// # Errors
    ///
    /// Fails like [`compact`](Self::compact), and for a revision in the future.
    pub async fn compact_at(&self, revision: i64) -> Result<()> {
        let options = CompactionOptions::new().with_physical();
        self.client()
            .await?
            .compact(revision, Some(options))
            .await
            .map_err(TestingError::client("compacting"))?;
        Ok(())
    }

    /// Whether the process runs. A paused server counts as running.
    pub fn is_running(&self) -> bool {
        self.check_running().is_ok()
    }

    /// Locks the process. The lock must not be held over an await.
    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.inner.process.lock()
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
            .exit_status()
            .map_err(TestingError::io("reading the state of etcd"))?
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
            && matches!(running.exit_status(), Ok(None))
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
        let program = inner.program.lock().clone().unwrap_or_else(find_etcd);
        let args = inner.options.command_line(
            &inner.member,
            &inner.data_dir,
            &inner.initial_cluster,
            inner.joins_existing.load(Ordering::Relaxed),
        );
        let started = Process::start(
            &program,
            &args,
            &inner.options.envs,
            log,
            Arc::clone(&inner.reaper),
        );
        *process = Some(started.map_err(|source| TestingError::CannotRun { program, source })?);
        Ok(())
    }

    /// Kills the server and removes its data.
    pub(super) async fn wipe(&self) -> Result<()> {
        self.kill().await?;
        match std::fs::remove_dir_all(&self.inner.data_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(TestingError::io("removing etcd's data")(error))
            }
            _ => Ok(()),
        }
    }

    /// Sets whether an empty data folder means joining an existing cluster or founding a new one.
    pub(super) fn set_joins_existing(&self, joins_existing: bool) {
        let flag = &self.inner.joins_existing;
        flag.store(joins_existing, Ordering::Relaxed);
    }

    pub(super) fn options(&self) -> &Options {
        &self.inner.options
    }

    fn log_path(&self) -> PathBuf {
        self.inner.folder.path().join("etcd.log")
    }

    /// The log since the last start.
    pub(super) fn last_log(&self) -> String {
        let start = usize::try_from(self.inner.log_start.load(Ordering::Relaxed)).unwrap_or(0);
        let mut log = std::fs::read(self.log_path()).unwrap_or_default();
        let last = log.split_off(start.min(log.len()));
        String::from_utf8_lossy(&last).into_owned()
    }

    pub(super) fn log_excerpt(&self) -> String {
        let log = self.last_log();
        let lines: Vec<_> = log.lines().collect();
        // etcd reports a wrong flag in the first lines, and every other error in the last.
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
