//! The calls: a steady rate of them, and who answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::balance::RetryPolicy;
use goo_etcd::{BalancedChannel, Directory};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Calls begun per second, whether or not the earlier ones have ended.
pub const RATE: u32 = 200;

/// How long a call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A channel to whoever is in the directory.
fn connect(directory: &Directory) -> goo_etcd::Result<BalancedChannel> {
    BalancedChannel::builder(directory)
        .connect_timeout(CALL_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        // To be greeted twice does no harm, so that even a call that was in flight on a server when it
        // was killed need not fail.
        .retry(RetryPolicy::new(2))
        .build()
}

/// Calls, for as long as it is held.
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

    /// What has happened so far.
    pub fn tally(&self) -> Tally {
        lock(&self.tally).clone()
    }

    /// Begins no more calls, waits for those in flight, and returns what has happened in all.
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
    // A server is known by its id; it tells its address.
    let mut ids = BTreeMap::new();
    let mut calls = JoinSet::new();
    let mut next = interval(Duration::from_secs(1) / RATE);
    // A busy machine makes calls late, not fewer.
    next.set_missed_tick_behavior(MissedTickBehavior::Burst);
    loop {
        tokio::select! {
            // Who is new is known before it answers.
            biased;
            _ = &mut stopped => break,
            Some(snapshot) = snapshots.next() => {
                let known = snapshot.instances();
                ids.extend(known.map(|server| (server.address.clone(), server.id.clone())));
            }
            Some(Ok(ended)) = calls.join_next() => lock(&tally).add(&ids, ended),
            _ = next.tick() => {
                calls.spawn(call(greeter.clone()));
            }
        }
    }
    while let Some(Ok(ended)) = calls.join_next().await {
        lock(&tally).add(&ids, ended);
    }
}

/// A call that has ended.
struct Ended {
    begun: Instant,
    /// The address of the server, or why none answered.
    answer: Result<String, String>,
}

async fn call(mut greeter: GreeterClient<BalancedChannel>) -> Ended {
    let begun = Instant::now();
    let name = "demo".to_owned();
    let answer = match greeter.say_hello(HelloRequest { name }).await {
        Ok(reply) => Ok(reply.into_inner().server),
        Err(status) => Err(status.message().to_owned()),
    };
    Ended { begun, answer }
}

fn lock(tally: &Mutex<Tally>) -> MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of the calls that have ended.
#[derive(Clone, Default)]
pub struct Tally {
    pub failed: u64,
    /// Why the latest call failed that did.
    last_failure: Option<String>,
    answered: BTreeMap<String, Answered>,
}

/// What one server did.
#[derive(Clone)]
struct Answered {
    calls: u64,
    /// When the latest call that it answered was begun.
    latest: Instant,
}

impl Tally {
    fn add(&mut self, ids: &BTreeMap<String, String>, ended: Ended) {
        let begun = ended.begun;
        match ended.answer {
            Ok(address) => {
                let id = ids.get(&address).cloned().unwrap_or(address);
                let first = Answered {
                    calls: 0,
                    latest: begun,
                };
                let answered = self.answered.entry(id).or_insert(first);
                answered.calls += 1;
                answered.latest = answered.latest.max(begun);
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
                .answered
                .values()
                .map(|server| server.calls)
                .sum::<u64>()
    }

    /// How many calls a server has answered.
    pub fn answered_by(&self, id: &str) -> u64 {
        self.answered.get(id).map_or(0, |server| server.calls)
    }

    /// Whether a server has answered a call that was begun after `then`.
    pub fn answered_since(&self, id: &str, then: Instant) -> bool {
        self.answered
            .get(id)
            .is_some_and(|server| server.latest > then)
    }

    /// Why the latest of those that failed did.
    pub fn last_failure(&self) -> Option<&str> {
        self.last_failure.as_deref()
    }
}
