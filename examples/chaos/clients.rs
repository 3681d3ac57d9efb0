//! The clients: each follows the directory and calls the servers at a steady rate, and notes what
//! it saw.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::{BalancedChannel, Client, Config, Directory, Snapshot};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use crate::check::sent_to;
use crate::record::{Clock, Failure, Picture, SERVICE, Shown};

/// How many calls each client begins in a second.
const RATE: u32 = 60;

/// How long a call may take: longer than one may wait for an endpoint (5 s).
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// One client, for as long as it is held.
pub struct Caller {
    pub directory: Directory,
    notes: Arc<Mutex<Notes>>,
    stop: oneshot::Sender<()>,
    calling: JoinHandle<()>,
    _watching: AbortOnDropHandle<()>,
    _client: Client,
}

/// What a client has noted.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    pub calls: u64,
    pub failures: Vec<Failure>,
    /// The longest that a call took that went well.
    pub slowest: Duration,
    pub shown: Vec<Shown>,
}

impl Caller {
    pub async fn start(
        index: usize,
        endpoints: Vec<String>,
        clock: Clock,
    ) -> goo_etcd::Result<Self> {
        let config = Config::builder().endpoints(endpoints).build()?;
        let client = Client::new(format!("client {index}"), config).await?;
        let directory = Directory::watch(&client, SERVICE).await?;
        // Nothing is sent again that a server may have seen: each failure is to be seen here.
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

    /// What it shows now.
    pub fn picture(&self) -> Picture {
        picture(&self.directory.snapshot())
    }

    /// Begins no more calls, waits for those in flight, and returns what was noted.
    pub async fn finish(self) -> Notes {
        drop(self.stop);
        let _ = self.calling.await;
        lock(&self.notes).clone()
    }
}

fn picture(snapshot: &Snapshot) -> Picture {
    let shown = snapshot.iter();
    shown
        .map(|(key, instance)| (key.to_string(), Arc::clone(instance)))
        .collect()
}

fn lock(notes: &Mutex<Notes>) -> MutexGuard<'_, Notes> {
    notes.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn watch(directory: Directory, notes: Arc<Mutex<Notes>>, clock: Clock) {
    let mut snapshots = directory.changes();
    while let Some(snapshot) = snapshots.next().await {
        let shown = Shown {
            at: clock.now(),
            revision: snapshot.revision(),
            picture: picture(&snapshot),
        };
        lock(&notes).shown.push(shown);
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
    // A busy machine makes fewer calls, not many at once.
    next.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(Ok(ended)) = calls.join_next() => note(&notes, ended),
            _ = next.tick() => {
                calls.spawn(call(client, greeter.clone(), clock));
            }
        }
    }
    while let Some(Ok(ended)) = calls.join_next().await {
        note(&notes, ended);
    }
}

async fn call(
    client: usize,
    mut greeter: GreeterClient<BalancedChannel>,
    clock: Clock,
) -> Result<Duration, Failure> {
    let begun = clock.now();
    let name = "chaos".to_owned();
    let answer = greeter.say_hello(HelloRequest { name }).await;
    let ended = clock.now();
    match answer {
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

fn note(notes: &Mutex<Notes>, ended: Result<Duration, Failure>) {
    let mut notes = lock(notes);
    notes.calls += 1;
    match ended {
        Ok(took) => notes.slowest = notes.slowest.max(took),
        Err(failure) => notes.failures.push(failure),
    }
}
