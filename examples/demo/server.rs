//! The greeter servers. Each runs in its own process.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::{SERVICE, TTL};

/// The time limit for an exit after SIGTERM: one second of draining, then the calls in flight.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// A running `greeter_server`. Dropping it kills it.
pub struct Server {
    pub id: &'static str,
    process: Child,
}

impl Server {
    /// Starts the example `greeter_server`, which cargo builds next to this one.
    pub fn start(id: &'static str, etcd: &str) -> Result<Self, String> {
        let program = std::env::current_exe()
            .map_err(|error| format!("cannot find the path of this program: {error}"))?
            .with_file_name("greeter_server");
        let process = Command::new(&program)
            .args(["--id", id, "--etcd", etcd, "--service", SERVICE])
            .arg(format!("--ttl={}s", TTL.as_secs()))
            .stdin(Stdio::null())
            // Only the demo writes to the output; errors of the server still show.
            .stdout(Stdio::null())
            .env("RUST_LOG", "error")
            .kill_on_drop(true)
            // Ctrl-C in a terminal must reach the demo only.
            .process_group(0)
            .spawn()
            .map_err(|error| {
                let program = program.display();
                format!("cannot start {program}: {error}; `cargo build --examples` builds it")
            })?;
        Ok(Self { id, process })
    }

    /// The key of its registration in etcd.
    pub fn key(&self) -> String {
        format!("services/{SERVICE}/{}", self.id)
    }

    /// Asks the server to leave (SIGTERM), waits for its exit and returns the status.
    pub async fn terminate(&mut self) -> Result<ExitStatus, String> {
        self.signal(Signal::SIGTERM)?;
        match timeout(EXIT_TIMEOUT, self.process.wait()).await {
            Ok(status) => status.map_err(|error| error.to_string()),
            Err(_) => Err(format!(
                "{} did not exit within {EXIT_TIMEOUT:?} after SIGTERM",
                self.id
            )),
        }
    }

    /// Kills the server at once (SIGKILL).
    pub fn kill(&mut self) -> Result<(), String> {
        self.signal(Signal::SIGKILL)
    }

    /// The exit status, if the server has exited.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().ok().flatten()
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        let pid = self.process.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| format!("{} has already exited", self.id))?;
        kill(Pid::from_raw(pid), signal).map_err(|error| format!("{signal}: {error}"))
    }
}
