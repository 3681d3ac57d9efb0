//! Runs the examples as programs against a real etcd and checks their output.

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

type TestResult<T = ()> = Result<T, Box<dyn Error>>;

/// How long an example may take: far longer than usual, because the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// The command that runs an example. `cargo test` builds the examples before it runs a test;
/// `cargo test --test examples` does not.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().expect("a test knows its path");
    let profile = test
        .ancestors()
        .nth(2)
        .expect("a test is in target/PROFILE/deps");
    let program: PathBuf = profile.join("examples").join(name);
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build --examples` first",
        program.display()
    );
    let mut command = Command::new(program);
    // Settings of the machine must not reach the example.
    command
        .env_remove("GOO_ETCD_ENDPOINTS")
        .env_remove("RUST_LOG");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn output(command: &mut Command) -> TestResult<Output> {
    Ok(timeout(PATIENCE, command.output()).await??)
}

/// Runs an example against this etcd, and returns its output.
async fn run(name: &str, etcd: &Etcd, args: &[&str]) -> TestResult<String> {
    let mut command = example(name);
    command
        .args(args)
        .env("GOO_ETCD_ENDPOINTS", etcd.endpoint());
    let output = output(&mut command).await?;
    let stdout = String::from_utf8(output.stdout)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {stdout}{stderr}");
    Ok(stdout)
}

struct Server {
    process: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    key: String,
    address: String,
}

impl Server {
    /// Starts `greeter_server` and returns once it prints that it is registered.
    async fn start(etcd: &Etcd, args: &[&str]) -> TestResult<Self> {
        let mut process = example("greeter_server")
            .env("GOO_ETCD_ENDPOINTS", etcd.endpoint())
            .args(args)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().ok_or("stdout is piped")?;
        let mut stdout = BufReader::new(stdout).lines();
        let line = timeout(PATIENCE, stdout.next_line()).await??;
        let line = line.ok_or("the server printed nothing")?;
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
        let pid = self.process.id().ok_or("the server has ended")?;
        Ok(kill(Pid::from_raw(pid.try_into()?), signal)?)
    }
}

async fn value(etcd: &Etcd, key: &str) -> TestResult<Option<String>> {
    let answer = etcd.client().await?.get(key, None).await?;
    let value = answer.kvs().first().map(|kv| kv.value_str());
    Ok(value.transpose()?.map(str::to_owned))
}

#[tokio::test]
async fn greeter_is_registered_called_and_leaves_on_signals() -> TestResult {
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
        // The key was deleted: its lease would have kept it for most of a minute.
        assert_eq!(value(&etcd, &server.key).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn demo_ends_without_a_failed_call() -> TestResult {
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
async fn client_started_first_finds_a_later_greeter() -> TestResult {
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
async fn bad_arguments_are_reported_in_one_line() -> TestResult {
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

#[tokio::test]
async fn client_examples_print_their_results() -> TestResult {
    let etcd = Etcd::start().await?;
    let leads = format!("etcd0 at http://{}: etcd 3.", etcd.endpoint());
    for (name, expected) in [
        (
            "kv",
            "before: red\nfruit/pear = green\nfruit/apple = yellow\ndeleted: 2\n",
        ),
        (
            "watch",
            "config/level = info\nconfig/level = debug\nconfig/level is deleted\n",
        ),
        ("lease", "renewed for 5 s\ngranted for 5 s\nkeys left: 0\n"),
        ("txn", "created: true\nexists already: 10\n"),
        (
            "many_clients",
            "default: orders\nno client named \"user\" is registered; registered are: orders, users\n",
        ),
        ("cluster", leads.as_str()),
        ("lock", "locked\nwritten: true\nunlocked\n"),
    ] {
        let printed = run(name, &etcd, &[]).await?;
        if name == "cluster" {
            assert!(
                printed.starts_with(expected) && printed.contains(", leads"),
                "{printed}"
            );
        } else {
            assert_eq!(printed, expected, "{name}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn users_example_writes_only_granted_keys() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut auth = etcd.client().await?.auth_client();
    auth.user_add("root", "root's", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.role_add("app").await?;
    let permission = goo_etcd::etcd_client::Permission::read_write("mine");
    auth.role_grant_permission("app", permission).await?;
    auth.user_grant_role("app", "app").await?;
    auth.auth_enable().await?;
    let printed = run("users", &etcd, &["app", "hunter2", "mine"]).await?;
    assert_eq!(printed, "mine is written\n");
    let printed = run("users", &etcd, &["app", "hunter2", "yours"]).await?;
    assert!(
        printed.contains("put \"yours\" failed") && printed.contains("permission denied"),
        "{printed}"
    );
    Ok(())
}

#[cfg(feature = "tls-ring")]
#[tokio::test]
async fn tls_example_connects_over_mutual_tls() -> TestResult {
    use goo_etcd::etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
    let folder = tempfile::tempdir()?;
    // The certificate signs itself, so it is its own authority.
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
    let file = |name: &str, content: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, content).map(|()| path.display().to_string())
    };
    let (pem, key_pem) = (made.cert.pem(), made.signing_key.serialize_pem());
    let cert = file("cert", pem.clone())?;
    let key = file("key", key_pem.clone())?;
    let tls = TlsOptions::new()
        .ca_certificate(Certificate::from_pem(&pem))
        .identity(Identity::from_pem(&pem, &key_pem));
    let etcd = Etcd::builder()
        .args([format!("--cert-file={cert}"), format!("--key-file={key}")])
        .args([
            format!("--trusted-ca-file={cert}"),
            "--client-cert-auth".to_owned(),
        ])
        .connect_options(ConnectOptions::new().with_tls(tls))
        .start()
        .await?;
    let endpoint = format!("https://{}", etcd.endpoint());
    let printed = run("tls", &etcd, &[&endpoint, &cert, &cert, &key]).await?;
    assert!(
        printed.starts_with("etcd 3.") && printed.ends_with(" over TLS\n"),
        "{printed}"
    );
    Ok(())
}
