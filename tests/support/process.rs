//! Servers that echo, as processes, for signals.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::Server;

use super::PATIENCE;
use super::echo::{Echoing, bind, incoming};

/// What a file of tests calls its server's entry, see [`EchoProcess`].
const ENTRY: &str = "echo_server_process";
const ADDRESS: &str = "ECHO_ADDRESS";
const LISTENING: &str = "echo server listens on ";

/// A server as a process: the running test program again, of which it runs only the test
/// `echo_server_process`, which calls [`serve_as_process`]. Dropping it kills it.
pub struct EchoProcess {
    address: String,
    process: Child,
}

impl EchoProcess {
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    pub async fn start_at(address: &str) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args([ENTRY, "--exact", "--nocapture"])
            .env(ADDRESS, address)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let address = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some((_, address)) = line.split_once(LISTENING) {
                    return address.to_owned();
                }
            }
            panic!("the server has ended before it listened");
        };
        let address = tokio::time::timeout(PATIENCE, address).await.unwrap();
        Self { address, process }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.process.id().expect("it runs");
        kill(Pid::from_raw(pid as i32), signal).unwrap();
    }

    /// SIGSTOP: it is there and does nothing. Returns when it has stopped, which on another core
    /// takes a moment.
    pub async fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        let stat = format!("/proc/{}/stat", self.process.id().expect("it runs"));
        super::eventually("the process has stopped", async || {
            let stat = std::fs::read_to_string(&stat).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        })
        .await;
    }

    /// Waits for its end.
    pub async fn ended(&mut self) {
        tokio::time::timeout(PATIENCE, self.process.wait())
            .await
            .unwrap()
            .unwrap();
    }
}

/// The program of an [`EchoProcess`]. SIGTERM ends it gracefully.
pub fn serve_as_process() {
    let Ok(address) = std::env::var(ADDRESS) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let terminate = tokio::signal::unix::SignalKind::terminate();
        let mut terminate = tokio::signal::unix::signal(terminate).unwrap();
        let listener = bind(&address);
        let address: SocketAddr = listener.local_addr().unwrap();
        println!("{LISTENING}{address}");
        Server::builder()
            .add_service(Echoing::new(address.to_string()).service())
            .serve_with_incoming_shutdown(incoming(listener, Arc::default()), async {
                terminate.recv().await;
            })
            .await
            .unwrap();
    });
}
