//! Child processes: this test program again, running one of the programs listed in [`entry`].

use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use super::{PATIENCE, echo_process, registered_process, wait_for, wait_until};

/// Names the program that a child process runs.
const PROGRAM: &str = "IT_PROGRAM";

/// Set in the child process of an isolated test.
const ISOLATED: &str = "IT_ISOLATED";

/// The program that a child process runs instead of the tests.
#[test]
fn entry() {
    let Ok(program) = std::env::var(PROGRAM) else {
        return;
    };
    match program.as_str() {
        echo_process::PROGRAM => echo_process::run(),
        registered_process::PROGRAM => registered_process::run(),
        crate::directory::scale::PROGRAM => crate::directory::scale::run_watcher(),
        crate::formats::PROGRAM => crate::formats::print_advertised(),
        crate::testing::PROGRAM => crate::testing::run_until_killed(),
        _ => panic!("there is no program {program}"),
    }
}

/// A running child process. Dropping it kills the process.
pub struct ChildProcess {
    process: Child,
    /// Kept open, because the test harness in the child writes the result of `entry`.
    output: Lines<BufReader<ChildStdout>>,
}

impl ChildProcess {
    /// Starts a program of [`entry`] with these environment variables.
    pub fn start(program: &str, variables: &[(&str, &str)]) -> Self {
        let mut process = this_program("support::process::entry")
            .env(PROGRAM, program)
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, output }
    }

    /// Waits for the next line that contains `prefix`, and returns the rest of that line.
    ///
    /// # Panics
    ///
    /// If the process ends first, or writes no such line within [`PATIENCE`].
    pub async fn read_after(&mut self, prefix: &str) -> String {
        wait_for(prefix, async {
            while let Some(line) = self.output.next_line().await.unwrap() {
                if let Some((_, rest)) = line.split_once(prefix) {
                    return rest.to_owned();
                }
            }
            panic!("the process ended before it wrote {prefix:?}");
        })
        .await
    }

    pub async fn write_line(&mut self, line: &str) {
        let stdin = self.process.stdin.as_mut().unwrap();
        stdin.write_all(line.as_bytes()).await.unwrap();
        stdin.write_all(b"\n").await.unwrap();
    }

    pub fn id(&self) -> u32 {
        self.process.id().expect("the process is running")
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.id() as i32), signal).unwrap();
    }

    /// Stops the process with SIGSTOP, and returns once it has stopped: on another core that takes
    /// a moment.
    pub async fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        let stat = format!("/proc/{}/stat", self.id());
        wait_until("the process has stopped", async || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        })
        .await;
    }

    /// Waits until the process has ended. Returns whether it succeeded.
    pub async fn wait(&mut self) -> bool {
        let ended = tokio::time::timeout(PATIENCE, self.process.wait());
        ended.await.unwrap().unwrap().success()
    }
}

/// Runs the calling test in a child process, in which no other test runs.
///
/// Returns `true` in the child, which must go on with the test, and `false` in the parent once the
/// child has passed.
///
/// # Panics
///
/// In the parent, if the test fails in the child.
pub async fn isolate(test: &str) -> bool {
    if std::env::var_os(ISOLATED).is_some() {
        return true;
    }
    let child = this_program(test).env(ISOLATED, "1").output();
    let output = wait_for(test, child).await.unwrap();
    let (stdout, stderr) = (output.stdout, output.stderr);
    let [stdout, stderr] = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("1 passed"), "no test is called {test}");
    false
}

/// This test program, to run a single test.
fn this_program(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact", "--nocapture"])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}
