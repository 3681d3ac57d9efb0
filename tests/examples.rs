//! The examples do what their pages say, as programs, against a real etcd.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use goo_etcd::testing::Etcd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

type TestResult = Result<(), Box<dyn Error>>;

/// For whatever should take a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// `cargo test` builds the examples before it runs a test; `cargo test --test examples` does not.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().expect("a test knows where it is");
    let profile = test
        .ancestors()
        .nth(2)
        .expect("it is in target/PROFILE/deps");
    let program: PathBuf = profile.join("examples").join(name);
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build --examples` first",
        program.display()
    );
    let mut command = Command::new(program);
    // What the machine has set is not meant for a test.
    command
        .env_remove("GOO_ETCD_ENDPOINTS")
        .env_remove("RUST_LOG");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn output(command: &mut Command) -> Result<Output, Box<dyn Error>> {
    Ok(timeout(PATIENCE, command.output()).await??)
}

struct Server {
    process: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    key: String,
    address: String,
}

impl Server {
    /// Returns once it says that it is registered.
    async fn start(etcd: &Etcd, args: &[&str]) -> Result<Self, Box<dyn Error>> {
        let mut process = example("greeter_server")
            .env("GOO_ETCD_ENDPOINTS", etcd.endpoint())
            .args(args)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().ok_or("stdout is piped")?;
        let mut stdout = BufReader::new(stdout).lines();
        let line = timeout(PATIENCE, stdout.next_line()).await??;
        let line = line.ok_or("it said nothing")?;
        let (key, address) = line
            .strip_prefix("registered ")
            .and_then(|rest| rest.split_once(" at "))
            .ok_or_else(|| format!("unexpected: {line}"))?;
        Ok(Self {
            key: key.to_owned(),
            address: address.to_owned(),
            process,
            stdout,
        })
    }

    fn signal(&self, signal: Signal) -> TestResult {
        let pid = self.process.id().ok_or("it has ended")?;
        Ok(kill(Pid::from_raw(pid.try_into()?), signal)?)
    }
}

async fn value(etcd: &Etcd, key: &str) -> Result<Option<String>, Box<dyn Error>> {
    let answer = etcd.client().await?.get(key, None).await?;
    let value = answer.kvs().first().map(|kv| kv.value_str());
    Ok(value.transpose()?.map(str::to_owned))
}

#[tokio::test]
async fn a_greeter_is_found_and_called_and_leaves_when_asked_to() -> TestResult {
    let etcd = Etcd::start().await?;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let args = ["--zone", "eu-1a", "--weight", "7", "--ttl", "60s"];
        let mut server = Server::start(&etcd, &args).await?;
        assert_eq!(server.key, format!("services/greeter/{}", server.address));
        let registered = value(&etcd, &server.key).await?.ok_or("not in etcd")?;
        for part in [server.address.as_str(), "eu-1a", "7"] {
            assert!(registered.contains(part), "{part} in {registered}");
        }

        let called = output(
            example("greeter_client")
                .args(["--etcd", &etcd.endpoint()])
                .args(["--count", "20", "--rate", "100", "--timeout", "30s"]),
        )
        .await?;
        let summary = String::from_utf8(called.stdout)?;
        assert!(called.status.success(), "{summary}");
        let answered = format!("20 requests, 0 failed   {} 20", server.address);
        assert!(summary.contains(&answered), "{summary}");

        server.signal(signal)?;
        let status = timeout(PATIENCE, server.process.wait()).await??;
        assert!(status.success(), "{status}");
        let left = server.stdout.next_line().await?;
        assert_eq!(left, Some(format!("left {}", server.key)));
        // Its lease has most of its minute left: it was deleted.
        assert_eq!(value(&etcd, &server.key).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn the_demo_plays_its_story_to_the_end_without_a_failed_call() -> TestResult {
    let played = output(&mut example("demo")).await?;
    let said = String::from_utf8(played.stdout)?;
    assert!(played.status.success(), "{said}");
    let last = said.lines().last().unwrap_or_default();
    let expected = " failed=0 joined=ok left=ok killed=ok etcd_restart=ok";
    assert!(
        last.starts_with("demo: requests=") && last.ends_with(expected),
        "{said}"
    );
    Ok(())
}

#[tokio::test]
async fn a_client_that_was_started_first_calls_the_greeter_once_it_is_there() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = example("greeter_client")
        .args(["--etcd", &etcd.endpoint(), "--service", "late"])
        .args(["--count", "5", "--rate", "10", "--timeout", "60s"])
        .stdout(Stdio::piped())
        .spawn()?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let args = ["--service", "late", "--id", "one"];
    let server = Server::start(&etcd, &args).await?;
    assert_eq!(server.key, "services/late/one");
    let called = timeout(PATIENCE, client.wait_with_output()).await??;
    let summary = String::from_utf8(called.stdout)?;
    assert!(called.status.success(), "{summary}");
    let answered = format!("5 requests, 0 failed   {} 5", server.address);
    assert!(summary.contains(&answered), "{summary}");
    Ok(())
}

#[tokio::test]
async fn what_cannot_work_is_said_in_a_line() -> TestResult {
    let etcd = Etcd::start().await?;
    let endpoint = etcd.endpoint();
    for (args, said) in [
        (["--listen", "0.0.0.0:0"], "with --advertise HOST:"),
        (
            ["--listen", "203.0.113.1:1"],
            "cannot listen on 203.0.113.1:1: ",
        ),
        (["--service", "a/b"], "invalid service \"a/b\": "),
        (["--advertise", "here"], "invalid address \"here\": "),
        (["--ttl", "1s"], "invalid ttl \"1s\": "),
        (["--etcd", "nowhere:x"], "invalid endpoints \"nowhere:x\": "),
    ] {
        let mut server = example("greeter_server");
        let ended = output(server.env("GOO_ETCD_ENDPOINTS", &endpoint).args(args)).await?;
        let stderr = String::from_utf8(ended.stderr)?;
        assert_eq!(ended.status.code(), Some(1), "{stderr}");
        assert!(stderr.starts_with("greeter_server: "), "{stderr}");
        assert!(stderr.contains(said), "{said} in {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }

    let mut client = example("greeter_client");
    let args = ["--count", "1", "--timeout", "100ms", "--etcd", &endpoint];
    let ended = output(client.args(args)).await?;
    let stdout = String::from_utf8(ended.stdout)?;
    assert_eq!(ended.status.code(), Some(1), "{stdout}");
    assert!(
        stdout.contains("1 requests, 1 failed (DeadlineExceeded: "),
        "{stdout}"
    );
    assert!(
        stdout.contains("no instances under services/greeter/"),
        "{stdout}"
    );
    Ok(())
}
