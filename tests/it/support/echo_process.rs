//! Echo servers as processes, for tests that send signals.

use std::net::SocketAddr;
use std::sync::Arc;

use nix::sys::signal::Signal;
use tonic::transport::Server;

use super::echo::{EchoService, bind, incoming};
use super::process::ChildProcess;

pub const PROGRAM: &str = "echo_server";
const ADDRESS: &str = "ECHO_ADDRESS";
const LISTENING: &str = "echo server listens on ";

/// An echo server in a process of its own. Dropping it kills the process.
pub struct EchoProcess {
    address: String,
    process: ChildProcess,
}

impl EchoProcess {
    /// Starts a server on a free port of loopback.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    pub async fn start_at(address: &str) -> Self {
        let mut process = ChildProcess::start(PROGRAM, &[(ADDRESS, address)]);
        let address = process.read_after(LISTENING).await;
        Self { address, process }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Stops the process with SIGSTOP; its connections stay open and silent.
    pub async fn pause(&self) {
        self.process.pause().await;
    }

    /// Waits until the process has ended.
    pub async fn wait(&mut self) {
        self.process.wait().await;
    }
}

/// The program of an [`EchoProcess`]. SIGTERM shuts it down gracefully.
pub fn run() {
    let address = std::env::var(ADDRESS).unwrap();
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
            .add_service(EchoService::new(address.to_string()).service())
            .serve_with_incoming_shutdown(incoming(listener, Arc::default()), async {
                terminate.recv().await;
            })
            .await
            .unwrap();
    });
}
