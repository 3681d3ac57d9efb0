//! Servers that register themselves, as processes, for tests that send signals.

use std::sync::Arc;
use std::time::Duration;

use goo_etcd::testing::Etcd;
use goo_etcd::{Instance, Registrar};
use nix::sys::signal::Signal;
use tokio::net::TcpStream;
use tonic::transport::Server;

use super::connect;
use super::echo::{EchoService, bind, incoming};
use super::process::ChildProcess;

pub const PROGRAM: &str = "registered_server";
/// The etcd that the server asks about itself.
const ETCD: &str = "REGISTERED_AT";
/// The endpoint that its registrar uses.
const REGISTRAR_ENDPOINT: &str = "REGISTERED_THROUGH";
const TTL_SECONDS: &str = "REGISTERED_TTL";
const REGISTERED: &str = "server is registered at ";
const LEFT: &str = "server has left: ";

/// A registered echo server in a process of its own. Dropping it kills the process.
pub struct RegisteredProcess {
    address: String,
    process: ChildProcess,
}

/// The state that a server observed after `leave_on` resolved and before tonic began its shutdown.
///
/// The server reads its key over a connection other than the registrar's, so that the read does not
/// queue behind the registrar's own requests.
#[derive(Debug, PartialEq, Eq)]
pub struct Leaving {
    /// etcd's revision when the server read its key.
    pub revision: i64,
    pub has_key: bool,
    /// Whether a connection to the server's own listener succeeded after that read.
    pub is_listening: bool,
}

impl RegisteredProcess {
    /// Starts a server and returns once it is registered as an instance of the service `greeter`.
    pub async fn start(etcd: &Etcd, ttl: Duration) -> Self {
        Self::start_through(etcd.endpoint(), etcd, ttl).await
    }

    /// Like [`start`](Self::start), but the registrar connects to `endpoint` instead of `etcd`.
    pub async fn start_through(endpoint: String, etcd: &Etcd, ttl: Duration) -> Self {
        let mut process = ChildProcess::start(
            PROGRAM,
            &[
                (ETCD, &etcd.endpoint()),
                (REGISTRAR_ENDPOINT, &endpoint),
                (TTL_SECONDS, &ttl.as_secs().to_string()),
            ],
        );
        let address = process.read_after(REGISTERED).await;
        Self { address, process }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Stops the process with SIGSTOP, and returns once it has stopped.
    pub async fn pause(&self) {
        self.process.pause().await;
    }

    /// Waits until the server has left after SIGTERM.
    pub async fn read_leaving(&mut self) -> Leaving {
        let line = self.process.read_after(LEFT).await;
        let words: Vec<&str> = line.split(' ').collect();
        Leaving {
            revision: words[0].parse().unwrap(),
            has_key: words[1].parse().unwrap(),
            is_listening: words[2].parse().unwrap(),
        }
    }

    /// Waits until the process has ended successfully.
    pub async fn wait(&mut self) {
        assert!(self.process.wait().await);
    }
}

/// The program of a [`RegisteredProcess`]. SIGTERM makes it leave and shut down gracefully.
pub fn run() {
    let [etcd, endpoint, ttl] =
        [ETCD, REGISTRAR_ENDPOINT, TTL_SECONDS].map(|name| std::env::var(name).unwrap());
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
        let (observer, client) = (connect(etcd).await, connect(endpoint).await);
        let registrar = Registrar::builder(&client).ttl(ttl).build().unwrap();
        let instance = Instance::new("greeter", &address);
        let registration = registrar.register(instance).await.unwrap();
        println!("{REGISTERED}{address}");
        let own_address = address.clone();
        let leave = async move {
            registration
                .leave_on(async move { terminate.recv().await })
                .await;
            let response = observer.get(registration.key(), None).await.unwrap();
            let revision = response.header().unwrap().revision();
            let is_listening = TcpStream::connect(own_address).await.is_ok();
            println!("{LEFT}{revision} {} {is_listening}", response.count() > 0);
        };
        Server::builder()
            .add_service(EchoService::new(address).service())
            .serve_with_incoming_shutdown(incoming(listener, Arc::default()), leave)
            .await
            .unwrap();
    });
}
