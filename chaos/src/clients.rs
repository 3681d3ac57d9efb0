//! The clients. Each one follows the directory, calls the servers at a steady rate, and records the
//! outcome.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::{BalancedChannel, Client, Config, Directory, Snapshot};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use crate::check::sent_to;
use crate::record::{Clock, Failure, InstanceMap, SERVICE, ShownSnapshot};

/// Calls per second and client.
const RATE: u32 = 60;

/// Deadline of a call: longer than `ready_timeout`, which is 5 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// One client; dropping it ends its tasks.
pub struct ClientTask {
    pub directory: Directory,
    notes: Arc<Mutex<Notes>>,
    stop: oneshot::Sender<()>,
    calling: JoinHandle<()>,
    _watching: AbortOnDropHandle<()>,
    _client: Client,
}

/// The record of a client.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    pub calls: u64,
    pub failures: Vec<Failure>,
    /// The longest duration of a successful call.
    pub slowest: Duration,
    pub shown: Vec<ShownSnapshot>,
}

impl ClientTask {
    pub async fn start(
        index: usize,
        endpoints: Vec<String>,
        clock: Clock,
    ) -> goo_etcd::Result<Self> {
        let config = Config::builder().endpoints(endpoints).build()?;
        let client = Client::connect(format!("client {index}"), config).await?;
        let directory = Directory::watch(&client, SERVICE).await?;
        // No retry policy, so that each failure is recorded here.
        let channel = BalancedChannel::builder(&directory)
            .timeout(CALL_TIMEOUT)
            .build()?;
        let notes = Arc::<Mutex<Notes>>::default();
        let watching = watch(directory.clone(), Arc::clone(&notes), clock);
        let (stop, stopped) = oneshot::channel();
        let calling = call_steadily(index, channel, Arc::clone(&notes), clock, stopped);
        Ok(Self {
            notes,
            stop,
            calling: tokio::spawn(calling),
            _watching: AbortOnDropHandle::new(tokio::spawn(watching)),
            directory,
            _client: client,
        })
    }

    /// The instances that the directory shows now.
    pub fn instances(&self) -> InstanceMap {
        instances(&self.directory.snapshot())
    }

    /// Stops making calls, waits for those in flight, and returns the record.
    pub async fn finish(self) -> Notes {
        drop(self.stop);
        let _ = self.calling.await;
        self.notes.lock().clone()
    }
}

fn instances(snapshot: &Snapshot) -> InstanceMap {
    let shown = snapshot.iter();
    shown
        .map(|(key, instance)| (key.to_string(), Arc::clone(instance)))
        .collect()
}

async fn watch(directory: Directory, notes: Arc<Mutex<Notes>>, clock: Clock) {
    let mut snapshots = directory.changes();
    while let Some(snapshot) = snapshots.next().await {
        let shown = ShownSnapshot {
            at: clock.now(),
            revision: snapshot.revision(),
            instances: instances(&snapshot),
        };
        notes.lock().shown.push(shown);
    }
}

async fn call_steadily(
    client: usize,
    channel: BalancedChannel,
    notes: Arc<Mutex<Notes>>,
    clock: Clock,
    mut stopped: oneshot::Receiver<()>,
) {
    let greeter = GreeterClient::new(channel);
    let mut calls = JoinSet::new();
    let mut next = interval(Duration::from_secs(1) / RATE);
    // A busy machine makes fewer calls instead of bursts.
    next.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(Ok(ended)) = calls.join_next() => record_result(&notes, ended),
            _ = next.tick() => {
                calls.spawn(call(client, greeter.clone(), clock));
            }
        }
    }
    while let Some(Ok(ended)) = calls.join_next().await {
        record_result(&notes, ended);
    }
}

async fn call(
    client: usize,
    mut greeter: GreeterClient<BalancedChannel>,
    clock: Clock,
) -> Result<Duration, Failure> {
    let begun = clock.now();
    let name = "chaos".to_owned();
    let response = greeter.say_hello(HelloRequest { name }).await;
    let ended = clock.now();
    match response {
        Ok(_) => Ok(ended - begun),
        Err(status) => Err(Failure {
            client,
            begun,
            ended,
            status: format!("{:?}: {}", status.code(), status.message()),
            sent_to: sent_to(status.message()),
        }),
    }
}

fn record_result(notes: &Mutex<Notes>, ended: Result<Duration, Failure>) {
    let mut notes = notes.lock();
    notes.calls += 1;
    match ended {
        Ok(took) => notes.slowest = notes.slowest.max(took),
        Err(failure) => notes.failures.push(failure),
    }
}
