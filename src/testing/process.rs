//! One run of an etcd program: found, started, signalled, and never left behind.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The etcd to run: `$ETCD`, else `target/tools/bin/etcd` here or in a folder above (where
/// `scripts/tools` puts it), else `etcd` on PATH.
pub(super) fn find_etcd() -> PathBuf {
    if let Some(path) = std::env::var_os("ETCD").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let here = std::env::current_dir().unwrap_or_default();
    here.ancestors()
        .map(|folder| folder.join("target/tools/bin/etcd"))
        .find(|path| path.is_file())
        .unwrap_or_else(|| "etcd".into())
}

/// A running etcd. Dropping it kills it and waits for its end.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    guard: Arc<Guard>,
}

impl Process {
    /// Starts `program`; its output is appended to `log`.
    pub(super) fn start(
        program: &Path,
        args: &[String],
        envs: &[(String, String)],
        log: File,
        guard: Arc<Guard>,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        // etcd takes every flag from ETCD_* too; what the machine has set is not meant for a test.
        // This one is no flag: older releases refuse some processors without it.
        for (name, _) in std::env::vars_os() {
            let is_flag = name.to_string_lossy().starts_with("ETCD_");
            if is_flag && name != "ETCD_UNSUPPORTED_ARCH" {
                command.env_remove(name);
            }
        }
        let child = command
            .args(args)
            .envs(envs.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C in a terminal goes to the test alone; it decides in which order things end.
            .process_group(0)
            .spawn()?;
        guard.watch(child.id());
        Ok(Self { child, guard })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.id()).expect("a pid is an i32");
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// How it ended, if it has.
    pub(super) fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// True once a SIGSTOP has reached every thread: the signal is not immediate.
    #[cfg(target_os = "linux")]
    pub(super) fn is_stopped(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.id())) else {
            return false;
        };
        threads.flatten().all(|thread| {
            // "PID (NAME) STATE ...", where NAME may hold anything.
            std::fs::read_to_string(thread.path().join("stat")).map_or(true, |stat| {
                stat.rsplit_once(") ")
                    .is_some_and(|(_, rest)| rest.starts_with('T'))
            })
        })
    }

    /// Elsewhere there is no cheap way to see it.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn is_stopped(&self) -> bool {
        true
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // First, since after the wait the pid may be somebody else's.
        self.guard.release();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Cleans up after a test process that dies without dropping its handles, by SIGKILL too.
///
/// A shell reads the pid of the etcd that runs (an empty line: none does) until its input ends, which
/// happens when the test process is gone; then it kills that etcd and removes the folder. Asking the
/// kernel for a death signal would need unsafe code, and would fire when the starting thread ends.
#[derive(Debug)]
pub(super) struct Guard {
    shell: Mutex<Child>,
}

impl Guard {
    pub(super) fn start(folder: &Path) -> io::Result<Self> {
        let script = r#"while read -r pid; do last=$pid; done
            [ -z "$last" ] || kill -9 "$last"
            rm -rf "$1""#;
        let shell = Command::new("/bin/sh")
            .args(["-c", script, "etcd-guard"])
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self {
            shell: Mutex::new(shell),
        })
    }

    fn watch(&self, pid: u32) {
        self.tell(format_args!("{pid}"));
    }

    fn release(&self) {
        self.tell(format_args!(""));
    }

    fn tell(&self, line: fmt::Arguments<'_>) {
        let mut shell = self.shell.lock().unwrap_or_else(PoisonError::into_inner);
        // A guard that is gone is no reason to fail a test.
        if let Some(input) = &mut shell.stdin {
            let _ = input.write_all(format!("{line}\n").as_bytes());
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Whoever drops it has ended etcd and owns the folder.
        let shell = self.shell.get_mut();
        let shell = shell.unwrap_or_else(PoisonError::into_inner);
        let _ = shell.kill();
        let _ = shell.wait();
    }
}
