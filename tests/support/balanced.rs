//! Channels under test, and calls on them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::channel::mpsc;
use goo_etcd::balance::{BalancedChannelBuilder, EndpointState, EndpointStatus, Source};
use goo_etcd::{BalancedChannel, Instance};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tokio::task::JoinSet;
use tonic::{Request, Status};

use super::{PATIENCE, eventually};

/// What the sources of these tests call themselves.
pub const KEY: &str = "services/echo/";

/// A set of instances that a test changes.
pub struct Sets(mpsc::UnboundedSender<Vec<Instance>>);

impl Sets {
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

/// An address on which nothing listens.
pub fn refusing() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// A channel whose set can be changed, and begins with these addresses.
pub fn changing<'a>(
    addresses: impl IntoIterator<Item = &'a str>,
    settings: impl FnOnce(BalancedChannelBuilder) -> BalancedChannelBuilder,
) -> (Sets, BalancedChannel) {
    let (sets, source) = Sets::new();
    let channel = settings(BalancedChannel::builder(source)).build().unwrap();
    sets.send(addresses.into_iter().map(instance));
    (sets, channel)
}

pub fn fixed<'a>(
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

/// Waits until so many endpoints are ready.
pub async fn until_ready(channel: &BalancedChannel, count: usize) {
    let ready = || {
        let endpoints = channel.endpoints();
        let ready = |e: &&EndpointStatus| e.state == EndpointState::Ready;
        endpoints.iter().filter(ready).count()
    };
    eventually("the endpoints are ready", async || ready() == count).await;
}

pub fn hello() -> EchoRequest {
    EchoRequest {
        payload: b"hello".to_vec(),
        ..EchoRequest::default()
    }
}

/// A unary call: the address of the server that answered.
pub async fn call(channel: &BalancedChannel) -> Result<String, Status> {
    let reply = EchoClient::new(channel.clone()).unary(hello()).await?;
    Ok(reply.into_inner().server)
}

pub async fn call_within(channel: &BalancedChannel, limit: Duration) -> Result<String, Status> {
    let mut request = Request::new(hello());
    request.set_timeout(limit);
    let reply = EchoClient::new(channel.clone()).unary(request).await?;
    Ok(reply.into_inner().server)
}

/// A call that failed.
#[derive(Debug)]
pub struct Failure {
    pub begun: Instant,
    pub status: Status,
}

/// What came of a [`Load`].
#[derive(Debug, Default)]
pub struct Report {
    /// By server.
    pub answered: BTreeMap<String, u64>,
    pub failures: Vec<Failure>,
}

impl Report {
    pub fn calls(&self) -> u64 {
        self.answered.values().sum::<u64>() + self.failures.len() as u64
    }

    pub fn assert_no_failure(&self) {
        let (failed, calls) = (self.failures.len(), self.calls());
        let some: Vec<_> = self.failures.iter().take(5).collect();
        assert!(some.is_empty(), "{failed} of {calls} failed: {some:#?}");
        assert!(calls > 0);
    }
}

/// Unary calls, one after another in each of several tasks, until it is told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    report: Arc<Mutex<Report>>,
    tasks: JoinSet<()>,
}

impl Load {
    /// With a pause after each call, so that a test does not take the whole machine.
    pub fn start(channel: &BalancedChannel, tasks: usize) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let report = Arc::<Mutex<Report>>::default();
        let mut load = JoinSet::new();
        for _ in 0..tasks {
            let (stop, report) = (Arc::clone(&stop), Arc::clone(&report));
            let mut client = EchoClient::new(channel.clone());
            load.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let begun = Instant::now();
                    let result = client.unary(hello()).await;
                    {
                        let mut report = report.lock().unwrap();
                        match result {
                            Ok(reply) => {
                                let server = reply.into_inner().server;
                                *report.answered.entry(server).or_default() += 1;
                            }
                            Err(status) => report.failures.push(Failure { begun, status }),
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

    /// How many calls a server has answered so far.
    pub fn answered_by(&self, server: &str) -> u64 {
        let report = self.report.lock().unwrap();
        report.answered.get(server).copied().unwrap_or(0)
    }

    pub fn calls(&self) -> u64 {
        self.report.lock().unwrap().calls()
    }

    /// Waits until so many more calls have ended.
    pub async fn goes_on_for(&self, calls: u64) {
        let enough = self.calls() + calls;
        eventually("calls go on", async || self.calls() >= enough).await;
    }

    /// Waits until a server has answered more calls.
    pub async fn reaches(&self, server: &str) {
        let before = self.answered_by(server);
        let more = async || self.answered_by(server) > before;
        eventually(&format!("{server} is called"), more).await;
    }

    /// # Panics
    ///
    /// When a call does not end.
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
