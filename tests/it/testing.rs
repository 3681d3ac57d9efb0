//! The etcd servers and proxies of `goo_etcd::testing`, on which all other tests rely.

use std::path::Path;
use std::time::Duration;

use crate::support::process::ChildProcess;
use crate::support::{TestResult, stored_value, wait_until};
use etcd_client::ConnectOptions;
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy, TestingError};
use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// How long a call must stay pending to count as hung.
const SILENCE: Duration = Duration::from_secs(1);

#[tokio::test]
async fn data_survives_kill_stop_and_restart() -> TestResult {
    let etcd = Etcd::start().await?;
    let endpoint = etcd.endpoint();
    etcd.client().await?.put("key", "value", None).await?;

    etcd.kill().await?;
    assert!(!etcd.is_running());
    assert_eq!(etcd.pid(), None);
    assert!(stored_value(&etcd, "key").await.is_err());
    etcd.start_again().await?;
    assert_eq!(stored_value(&etcd, "key").await?.as_deref(), Some("value"));

    etcd.stop().await?;
    assert!(!etcd.is_running());
    etcd.start_again().await?;
    assert_eq!(stored_value(&etcd, "key").await?.as_deref(), Some("value"));

    let before = etcd.pid();
    etcd.restart().await?;
    assert_ne!(etcd.pid(), before);
    assert_eq!(stored_value(&etcd, "key").await?.as_deref(), Some("value"));
    assert_eq!(etcd.endpoint(), endpoint);
    Ok(())
}

#[tokio::test]
async fn wiped_server_returns_empty() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut client = etcd.client().await?;
    let before = client.put("key", "value", None).await?;
    etcd.wipe_and_restart().await?;
    assert_eq!(stored_value(&etcd, "key").await?, None);
    let after = etcd.client().await?.get("key", None).await?;
    assert!(after.header().unwrap().revision() < before.header().unwrap().revision());
    Ok(())
}

#[tokio::test]
async fn paused_server_is_silent_until_resumed() -> TestResult {
    let etcd = Etcd::start().await?;
    etcd.client().await?.put("key", "value", None).await?;
    etcd.pause().await?;
    assert!(etcd.is_running());
    let pending = stored_value(&etcd, "key");
    tokio::pin!(pending);
    assert!(tokio::time::timeout(SILENCE, &mut pending).await.is_err());
    etcd.resume()?;
    // The pending call itself gets its response.
    assert_eq!(pending.await?.as_deref(), Some("value"));

    // A paused server can be stopped and killed.
    etcd.pause().await?;
    etcd.stop().await?;
    etcd.start_again().await?;
    etcd.pause().await?;
    etcd.kill().await?;
    Ok(())
}

#[tokio::test]
async fn compacted_history_cannot_be_read() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut client = etcd.client().await?;
    let first = client.put("key", "1", None).await?;
    let first = first.header().unwrap().revision();
    client.put("key", "2", None).await?;
    let compacted = etcd.compact().await?;
    assert!(compacted > first);
    let options = etcd_client::GetOptions::new().with_revision(first);
    let error = client.get("key", Some(options)).await.unwrap_err();
    assert!(error.to_string().contains("compacted"), "{error}");
    Ok(())
}

#[tokio::test]
async fn dropping_the_last_handle_removes_everything() -> TestResult {
    let etcd = Etcd::start().await?;
    let folder = etcd.data_dir().parent().unwrap().to_owned();
    let pid = etcd.pid().unwrap();
    assert!(folder.exists() && is_alive(pid));
    let other = etcd.clone();
    drop(etcd);
    assert!(is_alive(pid));
    drop(other);
    assert!(!is_alive(pid));
    assert!(!folder.exists());
    Ok(())
}

/// The program that starts two etcd servers, kills one of them, and waits to be killed.
pub const PROGRAM: &str = "etcd_owner";
const STARTED: &str = "started ";

#[tokio::main(flavor = "current_thread")]
pub async fn run_until_killed() {
    let running = Etcd::start().await.unwrap();
    let down = Etcd::start().await.unwrap();
    down.kill().await.unwrap();
    let folders = [&running, &down].map(|etcd| etcd.data_dir().parent().unwrap().to_owned());
    let folders = folders.map(|folder| folder.display().to_string()).join(" ");
    println!("{STARTED}{} {folders}", running.pid().unwrap());
    std::future::pending().await
}

#[tokio::test]
async fn killed_test_process_leaves_nothing_behind() -> TestResult {
    let mut owner = ChildProcess::start(PROGRAM, &[]);
    let started = owner.read_after(STARTED).await;
    let (pid, folders) = started.split_once(' ').unwrap();
    let pid = pid.parse()?;
    assert!(is_alive(pid));

    owner.signal(Signal::SIGKILL);
    owner.wait().await;

    wait_until("the server and the folders are gone", async || {
        !is_alive(pid) && !folders.split(' ').any(|folder| Path::new(folder).exists())
    })
    .await;
    Ok(())
}

fn is_alive(pid: u32) -> bool {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), None).is_ok()
}

#[tokio::test]
async fn a_cluster_answers_while_a_majority_lives() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    assert_eq!(cluster.endpoints().len(), 3);
    let leader = cluster.leader().await?;
    cluster.member(leader).kill().await?;
    let survivor = cluster.member((leader + 1) % 3);
    survivor.wait_ready().await?;
    survivor.client().await?.put("key", "value", None).await?;
    assert_ne!(cluster.leader().await?, leader);

    cluster.start_all().await?;
    assert_eq!(
        stored_value(cluster.member(leader), "key")
            .await?
            .as_deref(),
        Some("value")
    );

    cluster.kill_all().await?;
    cluster.start_all().await?;
    assert_eq!(
        stored_value(survivor, "key").await?.as_deref(),
        Some("value")
    );
    Ok(())
}

#[tokio::test]
async fn member_is_replaced_and_cluster_wiped() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let (first, last) = (cluster.member(0), cluster.member(2));
    first.client().await?.put("key", "value", None).await?;
    cluster.replace(2).await?;
    assert_eq!(stored_value(last, "key").await?.as_deref(), Some("value"));
    last.restart().await?;
    assert_eq!(stored_value(last, "key").await?.as_deref(), Some("value"));

    cluster.replace_with_learner(1).await?;
    let learner = cluster.member(1);
    assert!(stored_value(learner, "key").await.is_err());
    cluster.promote(1).await?;
    wait_until("the promoted learner responds", async || {
        stored_value(learner, "key").await.is_ok()
    })
    .await;

    cluster.wipe_and_restart().await?;
    assert_eq!(stored_value(last, "key").await?, None);
    Ok(())
}

#[tokio::test]
async fn flags_reach_etcd_and_errors_show_its_log() -> TestResult {
    let etcd = Etcd::builder().args(["--name", "mine"]).start().await;
    let error = etcd.unwrap_err(); // the last flag wins, and then the cluster has no such member
    assert!(error.to_string().contains("mine"), "{error}");

    let etcd = Etcd::builder().args(["--max-txn-ops=1"]).start().await?;
    let put = |key| etcd_client::TxnOp::put(key, "value", None);
    let txn = etcd_client::Txn::new().and_then([put("1"), put("2")]);
    let refusal = etcd.client().await?.txn(txn).await.unwrap_err();
    assert!(refusal.to_string().contains("too many"), "{refusal}");

    let error = Etcd::builder().args(["--no-such-flag"]).start().await;
    let error = error.unwrap_err();
    assert!(matches!(error, TestingError::NotRunning { .. }), "{error}");
    assert!(error.to_string().contains("no-such-flag"), "{error}");
    Ok(())
}

#[tokio::test]
async fn missing_program_is_an_error() {
    let nowhere = Path::new("/nonexistent/etcd");
    let error = Etcd::builder().program(nowhere).start().await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("/nonexistent/etcd") && text.contains("set ETCD"),
        "{text}"
    );
}

#[tokio::test]
async fn server_with_authentication_becomes_ready() -> TestResult {
    let etcd = Etcd::start().await?;
    let mut client = etcd.client().await?;
    client.user_add("root", "secret", None).await?;
    client.user_grant_role("root", "root").await?;
    client.auth_enable().await?;
    etcd.restart().await?;
    assert!(stored_value(&etcd, "key").await.is_err());
    Ok(())
}

/// Whether a member itself says that it is the leader.
async fn leads(member: &Etcd) -> TestResult<bool> {
    let user = ConnectOptions::new().with_user("root", "secret");
    let mut client = etcd_client::Client::connect([member.endpoint()], Some(user)).await?;
    let status = client.status().await?;
    let id = status.header().ok_or("a header")?.member_id();
    Ok(status.leader() == id)
}

/// With authentication enabled, some releases of etcd (3.6.16 is one) refuse the status without a
/// user.
#[tokio::test]
async fn leader_is_found_without_a_user() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    let mut client = cluster.member(0).client().await?;
    client.user_add("root", "secret", None).await?;
    client.user_grant_role("root", "root").await?;
    client.auth_enable().await?;
    wait_until("the member that leads is found", async || {
        let leader = cluster.leader().await.unwrap();
        matches!(leads(cluster.member(leader)).await, Ok(true))
    })
    .await;
    let before = cluster.leader().await?;
    cluster.member(before).kill().await?;
    wait_until("another leader is found", async || {
        cluster.leader().await.unwrap() != before
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn server_with_tls_becomes_ready() -> TestResult {
    let etcd = Etcd::builder().args(["--auto-tls"]).start().await?;
    assert!(etcd.client_url().starts_with("https://"));
    etcd.restart().await?;
    Ok(())
}

/// A server that echoes all bytes, behind a proxy.
async fn echo_behind_a_proxy() -> TestResult<Proxy> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let proxy = Proxy::start(listener.local_addr()?.to_string()).await?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await
            });
        }
    });
    Ok(proxy)
}

async fn echo(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
    stream.write_all(text.as_bytes()).await?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn proxy_forwards_both_ways_and_counts() -> TestResult {
    let proxy = echo_behind_a_proxy().await?;
    let mut stream = TcpStream::connect(proxy.endpoint()).await?;
    assert_eq!(echo(&mut stream, "hello").await?, "hello");
    assert_eq!((proxy.bytes_up(), proxy.bytes_down()), (5, 5));
    assert_eq!((proxy.connections(), proxy.accepted()), (1, 1));
    // The end of one direction is forwarded; the other stays open.
    stream.shutdown().await?;
    assert_eq!(stream.read(&mut [0]).await?, 0);
    while proxy.connections() > 0 {
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[tokio::test]
async fn cut_proxy_refuses_connections_until_restored() -> TestResult {
    let proxy = echo_behind_a_proxy().await?;
    let mut stream = TcpStream::connect(proxy.endpoint()).await?;
    echo(&mut stream, "hello").await?;
    proxy.cut().await;
    assert_eq!(proxy.connections(), 0);
    assert!(echo(&mut stream, "hello").await.is_err());
    // While another test starts a process, the child may hold a copy of the listener.
    let mut refused = None;
    wait_until("connections are refused", async || {
        refused = TcpStream::connect(proxy.endpoint()).await.err();
        refused.is_some()
    })
    .await;
    let refused = refused.map(|error| error.kind());
    assert_eq!(refused, Some(std::io::ErrorKind::ConnectionRefused));

    proxy.restore().await?;
    let mut stream = TcpStream::connect(proxy.endpoint()).await?;
    assert_eq!(echo(&mut stream, "again").await?, "again");
    proxy.disconnect().await?;
    assert!(echo(&mut stream, "hello").await.is_err());
    let mut stream = TcpStream::connect(proxy.endpoint()).await?;
    assert_eq!(echo(&mut stream, "again").await?, "again");

    let endpoint = proxy.endpoint();
    drop(proxy);
    assert!(echo(&mut stream, "hello").await.is_err());
    while TcpStream::connect(&endpoint).await.is_ok() {
        tokio::task::yield_now().await;
    }
    Ok(())
}

#[tokio::test]
async fn blackhole_keeps_connections_open_and_silent() -> TestResult {
    let proxy = echo_behind_a_proxy().await?;
    let mut old = TcpStream::connect(proxy.endpoint()).await?;
    echo(&mut old, "hello").await?;
    proxy.blackhole();
    let mut new = TcpStream::connect(proxy.endpoint()).await?;
    {
        let pending = futures::future::join(echo(&mut old, "old"), echo(&mut new, "new"));
        tokio::pin!(pending);
        assert!(tokio::time::timeout(SILENCE, &mut pending).await.is_err());
        assert_eq!(proxy.bytes_up(), 5);
        proxy.restore().await?;
        let (old, new) = pending.await;
        assert_eq!((old?.as_str(), new?.as_str()), ("old", "new"));
    }
    Ok(())
}

#[tokio::test]
async fn proxy_delays_and_redirects() -> TestResult {
    let proxy = echo_behind_a_proxy().await?;
    let mut stream = TcpStream::connect(proxy.endpoint()).await?;
    let delay = Duration::from_millis(200);
    proxy.delay(delay);
    let begin = std::time::Instant::now();
    echo(&mut stream, "hello").await?;
    assert!(begin.elapsed() >= delay * 2);
    // Messages that are on the way at the same time are delayed at the same time.
    const MESSAGES: usize = 150;
    let begin = std::time::Instant::now();
    let (mut read, mut write) = stream.split();
    let sending = async {
        for _ in 0..MESSAGES {
            write.write_all(b"hello").await?;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    };
    let mut echoed = [0; 5 * MESSAGES];
    let receiving = async { read.read_exact(&mut echoed).await };
    tokio::try_join!(sending, receiving)?;
    let took = begin.elapsed();
    assert!(took < delay * MESSAGES as u32 / 4, "{took:?}");

    proxy.delay(Duration::ZERO);
    proxy.limit_rate(1_000);
    let begin = std::time::Instant::now();
    echo(&mut stream, &"x".repeat(100)).await?;
    assert!(begin.elapsed() >= Duration::from_millis(100));

    proxy.restore().await?;
    let etcd = Etcd::start().await?;
    proxy.set_target(etcd.endpoint());
    let mut client = etcd_client::Client::connect([proxy.endpoint()], None).await?;
    client.put("key", "value", None).await?;
    // The old stream still reaches the old target.
    assert_eq!(echo(&mut stream, "hello").await?, "hello");
    Ok(())
}

#[tokio::test]
async fn ended_server_is_neither_paused_nor_resumed() -> TestResult {
    let etcd = Etcd::start().await?;
    let pid = etcd.pid().ok_or("it runs")?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.try_into()?),
        nix::sys::signal::Signal::SIGKILL,
    )?;
    let paused = async {
        // Succeeds until the process has ended.
        while etcd.pause().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), paused).await?;
    assert!(etcd.resume().is_err());
    Ok(())
}
