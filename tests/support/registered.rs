//! Servers that register themselves, as processes, for signals.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use goo_etcd::testing::Etcd;
use goo_etcd::{Instance, Registrar};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdout, Command};
use tonic::transport::Server;

use super::echo::{Echoing, bind, incoming};
use super::{PATIENCE, connect, eventually};

/// What a file of tests calls its server's entry, see [`RegisteredProcess`].
const ENTRY: &str = "registered_server_process";
const ETCD: &str = "REGISTERED_AT";
const THROUGH: &str = "REGISTERED_THROUGH";
const SECONDS: &str = "REGISTERED_TTL";
const REGISTERED: &str = "server is registered at ";
const LEFT: &str = "server has left: ";

/// A server as a process: the running test program again, of which it runs only the test
/// `registered_server_process`, which calls [`serve_registered`]. Dropping it kills it.
pub struct RegisteredProcess {
    address: String,
    process: Child,
    /// Kept open, for the test program writes how its test went.
    output: Lines<BufReader<ChildStdout>>,
}

/// What a server found in the moment in which `leave_on` had resolved, before tonic knew of it. It asks etcd
/// without the registrar's connection, so that it need not wait for what is still on its way on that.
#[derive(Debug, PartialEq, Eq)]
pub struct Leaving {
    /// The revision at which it asked for its key, and whether the key was there.
    pub revision: i64,
    pub has_key: bool,
    /// Whether a connection to its own listener could be made, after that.
    pub is_listening: bool,
}

impl RegisteredProcess {
    /// Returns when it is registered, as an instance of the service `greeter`.
    pub async fn start(etcd: &Etcd, ttl: Duration) -> Self {
        Self::start_through(etcd.endpoint(), etcd, ttl).await
    }

    /// The same, with its registrar's connections going to another endpoint.
    pub async fn start_through(endpoint: String, etcd: &Etcd, ttl: Duration) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([ENTRY, "--exact", "--nocapture"])
            .env(ETCD, etcd.endpoint())
            .env(THROUGH, endpoint)
            .env(SECONDS, ttl.as_secs().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let address = said(&mut lines, REGISTERED).await;
        Self {
            address,
            process,
            output: lines,
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.process.id().expect("it runs");
        kill(Pid::from_raw(pid as i32), signal).unwrap();
    }

    /// SIGSTOP. Returns when it has stopped, which on another core takes a moment.
    pub async fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        let stat = format!("/proc/{}/stat", self.process.id().expect("it runs"));
        eventually("the process has stopped", async || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        })
        .await;
    }

    /// Waits until it has left, after SIGTERM.
    pub async fn left(&mut self) -> Leaving {
        let line = said(&mut self.output, LEFT).await;
        let words: Vec<&str> = line.split(' ').collect();
        Leaving {
            revision: words[0].parse().unwrap(),
            has_key: words[1].parse().unwrap(),
            is_listening: words[2].parse().unwrap(),
        }
    }

    /// Waits for its end.
    pub async fn ended(&mut self) {
        let ended = tokio::time::timeout(PATIENCE, self.process.wait());
        assert!(ended.await.unwrap().unwrap().success());
    }
}

/// What a process has written after `what`.
async fn said(lines: &mut Lines<BufReader<ChildStdout>>, what: &str) -> String {
    let said = async {
        while let Some(line) = lines.next_line().await.unwrap() {
            if let Some((_, said)) = line.split_once(what) {
                return said.to_owned();
            }
        }
        panic!("the server has ended before it said {what:?}");
    };
    tokio::time::timeout(PATIENCE, said).await.unwrap()
}

/// The program of a [`RegisteredProcess`]. SIGTERM ends it gracefully.
pub fn serve_registered() {
    let set = [ETCD, THROUGH, SECONDS].map(std::env::var);
    let [Ok(etcd), Ok(through), Ok(ttl)] = set else {
        return;
    };
    let ttl = Duration::from_secs(ttl.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let terminate = tokio::signal::unix::SignalKind::terminate();
        let mut terminate = tokio::signal::unix::signal(terminate).unwrap();
        let listener = bind("127.0.0.1:0");
        let address = listener.local_addr().unwrap().to_string();
        let (asks, client) = (connect(etcd).await, connect(through).await);
        let registrar = Registrar::builder(&client).ttl(ttl).build().unwrap();
        let instance = Instance::new("greeter", &address);
        let registration = registrar.register(instance).await.unwrap();
        println!("{REGISTERED}{address}");
        let to = address.clone();
        let leaves = async move {
            registration
                .leave_on(async move { terminate.recv().await })
                .await;
            let answer = asks.get(registration.key(), None).await.unwrap();
            let revision = answer.header().unwrap().revision();
            let is_listening = TcpStream::connect(to).await.is_ok();
            println!("{LEFT}{revision} {} {is_listening}", answer.count() > 0);
        };
        Server::builder()
            .add_service(Echoing::new(address).service())
            .serve_with_incoming_shutdown(incoming(listener, Arc::default()), leaves)
            .await
            .unwrap();
    });
}
