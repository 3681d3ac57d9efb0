//! One run of the etcd program, and the reaper that ends it if the test process dies.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;

/// The etcd program: `$ETCD`, else `target/tools/bin/etcd` (where `scripts/tools` puts it) in the
/// current folder or a folder above it, else `etcd` on PATH.
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

/// A running etcd process. Dropping this handle kills the process and waits for its exit.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    reaper: Arc<Reaper>,
}

impl Process {
    /// Starts `program` and appends its output to `log`.
    pub(super) fn start(
        program: &Path,
        args: &[String],
        envs: &[(String, String)],
        log: File,
        reaper: Arc<Reaper>,
    ) -> io::Result<Self> {
        let mut command = Command::new(program);
        // etcd reads its flags from ETCD_* too, so a test must not inherit those of the machine.
        // ETCD_UNSUPPORTED_ARCH is not a flag: older releases refuse some processors without it.
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
            // Ctrl-C in a terminal must reach the test only, which then stops its servers.
            .process_group(0)
            .spawn()?;
        reaper.set_pid(child.id());
        Ok(Self { child, reaper })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.id()).expect("a pid is an i32");
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// The exit status, if the process has exited.
    pub(super) fn exit_status(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Whether a SIGSTOP has stopped all threads, which takes a moment.
    #[cfg(target_os = "linux")]
    pub(super) fn is_stopped(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.id())) else {
            return false;
        };
        threads.flatten().all(|thread| {
            // The format is "PID (NAME) STATE ...", and NAME may contain any character.
            std::fs::read_to_string(thread.path().join("stat")).map_or(true, |stat| {
                stat.rsplit_once(") ")
                    .is_some_and(|(_, rest)| rest.starts_with('T'))
            })
        })
    }

    /// Other systems have no cheap way to find out, so this returns true.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn is_stopped(&self) -> bool {
        true
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Comes first, because after the wait another process may get the pid.
        self.reaper.clear_pid();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Cleans up if the test process dies without dropping its handles, for example by SIGKILL.
///
/// The reaper is a shell. It reads lines from its input: the pid of the running etcd, or an empty
/// line while none runs. Its input ends when the test process dies; it then kills that etcd and
/// removes the folder. The kernel's parent-death signal would need unsafe code, and is sent already
/// when the thread that started the process ends.
#[derive(Debug)]
pub(super) struct Reaper {
    shell: Mutex<Child>,
}

impl Reaper {
    pub(super) fn start(folder: &Path) -> io::Result<Self> {
        let script = r#"while read -r pid; do last=$pid; done
            [ -z "$last" ] || kill -9 "$last"
            rm -rf "$1""#;
        let shell = Command::new("/bin/sh")
            .args(["-c", script, "etcd-reaper"])
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

    fn set_pid(&self, pid: u32) {
        self.write_line(format_args!("{pid}"));
    }

    fn clear_pid(&self) {
        self.write_line(format_args!(""));
    }

    fn write_line(&self, line: fmt::Arguments<'_>) {
        let mut shell = self.shell.lock();
        // Errors are ignored: a test must not fail because its reaper is gone.
        if let Some(input) = &mut shell.stdin {
            let _ = input.write_all(format!("{line}\n").as_bytes());
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // By now etcd has ended, and the owner of the folder removes it.
        let shell = self.shell.get_mut();
        let _ = shell.kill();
        let _ = shell.wait();
    }
}
