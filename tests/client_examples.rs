//! The client's examples do what their pages say, as programs, against a real etcd.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use goo_etcd::testing::Etcd;
use tokio::process::Command;
use tokio::time::timeout;

type TestResult<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// For whatever should take a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an example prints. `cargo test` builds them before it runs a test; `cargo test --test ..` does not.
async fn run(name: &str, etcd: &Etcd, args: &[&str]) -> TestResult<String> {
    let test = std::env::current_exe()?;
    let profile = test.ancestors().nth(2).ok_or("a test has a folder")?;
    let program: PathBuf = profile.join("examples").join(name);
    assert!(
        program.is_file(),
        "{name} is missing: run `cargo build --examples` first"
    );
    let mut command = Command::new(program);
    command
        .args(args)
        .env("GOO_ETCD_ENDPOINTS", etcd.endpoint())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await??;
    let stdout = String::from_utf8(output.stdout)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {stdout}{stderr}");
    Ok(stdout)
}

#[tokio::test]
async fn each_example_prints_what_it_is_to_show() -> TestResult {
    let etcd = Etcd::start().await?;
    let leads = format!("etcd0 at http://{}: etcd 3.", etcd.endpoint());
    for (name, said) in [
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
                printed.starts_with(said) && printed.contains(", leads"),
                "{printed}"
            );
        } else {
            assert_eq!(printed, said, "{name}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_user_may_write_what_was_granted_and_nothing_else() -> TestResult {
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
async fn over_mutual_tls_it_says_so() -> TestResult {
    use goo_etcd::etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
    let folder = tempfile::tempdir()?;
    // Its own authority.
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
