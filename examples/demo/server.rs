//! The greeter servers, each a process of its own.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::{SERVICE, TTL};

/// How long an exit may take after SIGTERM: a second of draining, and then what is in flight.
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
            .map_err(|error| format!("cannot find out where this program is: {error}"))?
            .with_file_name("greeter_server");
        let process = Command::new(&program)
            .args(["--id", id, "--etcd", etcd, "--service", SERVICE])
            .arg(format!("--ttl={}s", TTL.as_secs()))
            .stdin(Stdio::null())
            // This program tells the story; errors still show.
            .stdout(Stdio::null())
            .env("RUST_LOG", "error")
            .kill_on_drop(true)
            // Ctrl-C in a terminal goes to the demo alone.
            .process_group(0)
            .spawn()
            .map_err(|error| {
                let program = program.display();
                format!("cannot start {program}: {error}; `cargo build --examples` builds it")
            })?;
        Ok(Self { id, process })
    }

    /// Where its registration stands in etcd.
    pub fn key(&self) -> String {
        format!("services/{SERVICE}/{}", self.id)
    }

    /// SIGTERM: it is asked to leave. Returns how it ended.
    pub async fn terminate(&mut self) -> Result<ExitStatus, String> {
        self.signal(Signal::SIGTERM)?;
        match timeout(EXIT_TIMEOUT, self.process.wait()).await {
            Ok(status) => status.map_err(|error| error.to_string()),
            Err(_) => Err(format!(
                "{} still runs {EXIT_TIMEOUT:?} after SIGTERM",
                self.id
            )),
        }
    }

    /// SIGKILL: it gets no chance to do anything.
    pub fn kill(&mut self) -> Result<(), String> {
        self.signal(Signal::SIGKILL)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().ok().flatten()
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        let pid = self.process.id().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.ok_or_else(|| format!("{} has ended by itself", self.id))?;
        kill(Pid::from_raw(pid), signal).map_err(|error| format!("{signal}: {error}"))
    }
}
