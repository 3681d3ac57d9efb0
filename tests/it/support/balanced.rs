//! Balanced channels, calls on them, and load.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::channel::mpsc;
use goo_etcd::balance::{BalancedChannelBuilder, EndpointState, EndpointStatus, Source};
use goo_etcd::{BalancedChannel, Instance};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tokio::net::TcpSocket;
use tokio::task::{JoinHandle, JoinSet};
use tonic::{Request, Status};

use super::{PATIENCE, wait_until};

/// The name of these tests' sources.
pub const KEY: &str = "services/echo/";

/// Sends sets of instances to the source of a channel.
pub struct SetSender(mpsc::UnboundedSender<Vec<Instance>>);

impl SetSender {
    pub fn new() -> (Self, Source) {
        let (sender, sets) = mpsc::unbounded();
        (Self(sender), Source::new(KEY, sets))
    }

    pub fn send(&self, set: impl IntoIterator<Item = Instance>) {
        self.0.unbounded_send(set.into_iter().collect()).unwrap();
    }
}

pub fn instance(address: &str) -> Instance {
    Instance::new("echo", address)
}

/// An address that refuses connections.
///
/// The port stays bound for the rest of the process, without a listener, so that no other test gets
/// it. A server can still be started there, because both sockets set `SO_REUSEADDR`.
pub fn unused_address() -> String {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = socket.local_addr().unwrap().to_string();
    std::mem::forget(socket);
    address
}

/// A channel that starts with these addresses, and the sender that replaces them.
pub fn dynamic_channel<'a>(
    addresses: impl IntoIterator<Item = &'a str>,
    settings: impl FnOnce(BalancedChannelBuilder) -> BalancedChannelBuilder,
) -> (SetSender, BalancedChannel) {
    let (sets, source) = SetSender::new();
    let channel = settings(BalancedChannel::builder(source)).build().unwrap();
    sets.send(addresses.into_iter().map(instance));
    (sets, channel)
}

/// A channel whose addresses never change.
pub fn static_channel<'a>(
    addresses: impl IntoIterator<Item = &'a str>,
    settings: impl FnOnce(BalancedChannelBuilder) -> BalancedChannelBuilder,
) -> BalancedChannel {
    let source = Source::fixed(addresses.into_iter().map(instance));
    settings(BalancedChannel::builder(source)).build().unwrap()
}

pub fn status_of(channel: &BalancedChannel, address: &str) -> Option<EndpointStatus> {
    let mut endpoints = channel.endpoints().into_iter();
    endpoints.find(|endpoint| endpoint.address == address)
}

pub fn is_ready(channel: &BalancedChannel, address: &str) -> bool {
    status_of(channel, address).is_some_and(|endpoint| endpoint.state == EndpointState::Ready)
}

pub fn in_flight(channel: &BalancedChannel) -> usize {
    channel.endpoints().iter().map(|e| e.in_flight).sum()
}

/// Waits until exactly `count` endpoints are ready.
pub async fn wait_until_ready(channel: &BalancedChannel, count: usize) {
    let ready = || {
        let endpoints = channel.endpoints();
        let ready = |e: &&EndpointStatus| e.state == EndpointState::Ready;
        endpoints.iter().filter(ready).count()
    };
    wait_until("the endpoints are ready", async || ready() == count).await;
}

pub fn hello() -> EchoRequest {
    EchoRequest {
        payload: b"hello".to_vec(),
        ..EchoRequest::default()
    }
}

/// Makes a unary call and returns the address of the server that responded.
pub async fn call(channel: &BalancedChannel) -> Result<String, Status> {
    let reply = EchoClient::new(channel.clone()).unary(hello()).await?;
    Ok(reply.into_inner().server)
}

/// Like [`call`], with a deadline.
pub async fn call_with_timeout(
    channel: &BalancedChannel,
    limit: Duration,
) -> Result<String, Status> {
    let mut request = Request::new(hello());
    request.set_timeout(limit);
    let reply = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(reply.into_inner().server)
}

/// Starts calls, and waits until all of them are in flight.
pub async fn calls_in_flight(
    channel: &BalancedChannel,
    count: usize,
) -> Vec<JoinHandle<Result<String, Status>>> {
    let before = in_flight(channel);
    let start = |_| {
        let channel = channel.clone();
        tokio::spawn(async move { call(&channel).await })
    };
    let calls = (0..count).map(start).collect();
    let all = async || in_flight(channel) == before + count;
    wait_until("the calls are in flight", all).await;
    calls
}

/// A call that failed.
#[derive(Debug)]
pub struct Failure {
    pub started: Instant,
    pub status: Status,
}

/// The outcome of a [`Load`].
#[derive(Debug, Default)]
pub struct Report {
    /// The number of successful calls of each server.
    pub responses: BTreeMap<String, u64>,
    pub failures: Vec<Failure>,
}

impl Report {
    pub fn calls(&self) -> u64 {
        self.responses.values().sum::<u64>() + self.failures.len() as u64
    }

    pub fn assert_no_failure(&self) {
        let (failed, calls) = (self.failures.len(), self.calls());
        let some: Vec<_> = self.failures.iter().take(5).collect();
        assert!(some.is_empty(), "{failed} of {calls} failed: {some:#?}");
        assert!(calls > 0);
    }
}

/// Tasks that make unary calls, each one after another, until [`finish`](Self::finish).
pub struct Load {
    stop: Arc<AtomicBool>,
    report: Arc<Mutex<Report>>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Starts the tasks. Each pauses after a call, to leave the machine time for everything else.
    pub fn start(channel: &BalancedChannel, tasks: usize) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let report = Arc::<Mutex<Report>>::default();
        let mut load = JoinSet::new();
        for _ in 0..tasks {
            let (stop, report) = (Arc::clone(&stop), Arc::clone(&report));
            let mut client = EchoClient::new(channel.clone());
            load.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let started = Instant::now();
                    let result = client.unary(hello()).await;
                    {
                        let mut report = report.lock().unwrap();
                        match result {
                            Ok(reply) => {
                                let server = reply.into_inner().server;
                                *report.responses.entry(server).or_default() += 1;
                            }
                            Err(status) => report.failures.push(Failure { started, status }),
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(3)).await;
                }
            });
        }
        Self {
            stop,
            report,
            tasks: load,
        }
    }

    /// The number of calls that a server has responded to so far.
    pub fn calls_served_by(&self, server: &str) -> u64 {
        let report = self.report.lock().unwrap();
        report.responses.get(server).copied().unwrap_or(0)
    }

    pub fn calls(&self) -> u64 {
        self.report.lock().unwrap().calls()
    }

    /// Waits until `calls` more calls have ended.
    pub async fn wait_for_calls(&self, calls: u64) {
        let enough = self.calls() + calls;
        wait_until("calls go on", async || self.calls() >= enough).await;
    }

    /// Waits until a server has responded to another call.
    pub async fn wait_until_called(&self, server: &str) {
        let before = self.calls_served_by(server);
        let more = async || self.calls_served_by(server) > before;
        wait_until(&format!("{server} is called"), more).await;
    }

    /// Stops the tasks after their current calls.
    ///
    /// # Panics
    ///
    /// If a call does not end within [`PATIENCE`].
    pub async fn finish(mut self) -> Report {
        self.stop.store(true, Ordering::SeqCst);
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                ended.unwrap();
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            panic!("{} calls do not end", self.tasks.len());
        }
        std::mem::take(&mut self.report.lock().unwrap())
    }
}
