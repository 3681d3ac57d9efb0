//! Makes calls at a steady rate, and counts the responses by server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::balance::RetryPolicy;
use goo_etcd::{BalancedChannel, Directory};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Calls started per second, even if earlier calls have not ended.
pub const RATE: u32 = 200;

/// The deadline of a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A channel to all servers in the directory.
fn connect(directory: &Directory) -> goo_etcd::Result<BalancedChannel> {
    BalancedChannel::builder(directory)
        .connect_timeout(CALL_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        // Greetings are idempotent, so a call that was in flight on a killed server can be retried.
        .retry(RetryPolicy::new(2))
        .build()
}

/// Makes calls until dropped.
pub struct Load {
    tally: Arc<Mutex<Tally>>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Load {
    pub fn start(directory: &Directory) -> goo_etcd::Result<Self> {
        let tally = Arc::default();
        let (stop, stopped) = oneshot::channel();
        let greeter = GreeterClient::new(connect(directory)?);
        let calls = generate(greeter, directory.clone(), Arc::clone(&tally), stopped);
        Ok(Self {
            task: tokio::spawn(calls),
            tally,
            stop: Some(stop),
        })
    }

    /// The results so far.
    pub fn tally(&self) -> Tally {
        self.tally.lock().clone()
    }

    /// Stops starting calls, waits for the calls in flight, and returns the results.
    pub async fn finish(mut self) -> Tally {
        self.stop = None;
        let _ = (&mut self.task).await;
        self.tally()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn generate(
    greeter: GreeterClient<BalancedChannel>,
    directory: Directory,
    tally: Arc<Mutex<Tally>>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut snapshots = directory.changes();
    // Servers are counted by id, but a response has the address only.
    let mut ids = BTreeMap::new();
    let mut calls = JoinSet::new();
    let mut next = interval(Duration::from_secs(1) / RATE);
    // On a busy machine calls start late, but none is left out.
    next.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        tokio::select! {
            // Snapshots come first, so that the id of a new server is known before its response.
            biased;
            _ = &mut stopped => break,
            Some(snapshot) = snapshots.next() => {
                let known = snapshot.instances();
                ids.extend(known.map(|server| (server.address.clone(), server.id.clone())));
            }
            Some(Ok(ended)) = calls.join_next() => tally.lock().add(&ids, ended),
            _ = next.tick() => {
                calls.spawn(call(greeter.clone()));
            }
        }
    }
    while let Some(Ok(ended)) = calls.join_next().await {
        tally.lock().add(&ids, ended);
    }
}

/// A finished call.
struct Ended {
    started: Instant,
    /// The address of the server, or the error.
    result: Result<String, String>,
}

async fn call(mut greeter: GreeterClient<BalancedChannel>) -> Ended {
    let started = Instant::now();
    let name = "demo".to_owned();
    let result = match greeter.say_hello(HelloRequest { name }).await {
        Ok(reply) => Ok(reply.into_inner().server),
        Err(status) => Err(status.message().to_owned()),
    };
    Ended { started, result }
}

/// The results of the finished calls.
#[derive(Clone, Default)]
pub struct Tally {
    pub failed: u64,
    /// The error of the latest failed call.
    last_failure: Option<String>,
    responses: BTreeMap<String, Responses>,
}

/// The responses of one server.
#[derive(Clone)]
struct Responses {
    calls: u64,
    /// The start time of the latest call with a response.
    latest: Instant,
}

impl Tally {
    fn add(&mut self, ids: &BTreeMap<String, String>, ended: Ended) {
        let started = ended.started;
        match ended.result {
            Ok(address) => {
                let id = ids.get(&address).cloned().unwrap_or(address);
                let first = Responses {
                    calls: 0,
                    latest: started,
                };
                let responses = self.responses.entry(id).or_insert(first);
                responses.calls += 1;
                responses.latest = responses.latest.max(started);
            }
            Err(reason) => {
                self.failed += 1;
                self.last_failure = Some(reason);
            }
        }
    }

    pub fn requests(&self) -> u64 {
        self.failed
            + self
                .responses
                .values()
                .map(|server| server.calls)
                .sum::<u64>()
    }

    /// The number of responses of a server.
    pub fn responses_of(&self, id: &str) -> u64 {
        self.responses.get(id).map_or(0, |server| server.calls)
    }

    /// Whether a server has responded to a call that started after `then`.
    pub fn has_responded_since(&self, id: &str, then: Instant) -> bool {
        self.responses
            .get(id)
            .is_some_and(|server| server.latest > then)
    }

    /// The error of the latest failed call.
    pub fn last_failure(&self) -> Option<&str> {
        self.last_failure.as_deref()
    }
}
