//! Records everything that happens in etcd, by a watch of all keys from the first revision on each
//! member. The watches bypass all cut paths and use plain etcd-client.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use goo_etcd::etcd_client::{Client, EventType, GetOptions, WatchOptions, WatchResponse};
use goo_etcd::testing::{Etcd, EtcdCluster};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::record::{Change, Clock, Epoch, Extension};

/// Timeout of one request to a member, which may be paused or without a leader.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// The interval between two polls of each member for the leader.
const LEADER_POLL: Duration = Duration::from_millis(200);

/// The pause before a watch is reopened.
const REOPEN: Duration = Duration::from_millis(50);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Watches until dropped. Each revision is recorded once, from the first member that reports it.
/// Because all keys are watched, a missed revision shows as a gap.
pub struct Observer {
    seen: Arc<Mutex<Seen>>,
    clock: Clock,
    cluster: EtcdCluster,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

struct Seen {
    epochs: Vec<Epoch>,
    extensions: Vec<Extension>,
    /// Revisions that no member reported. A correct etcd has none.
    gaps: Vec<String>,
}

impl Seen {
    fn present(&mut self) -> &mut Epoch {
        if self.epochs.is_empty() {
            self.epochs.push(Epoch::default());
        }
        let last = self.epochs.len() - 1;
        &mut self.epochs[last]
    }

    /// Records the reported leader and the latest known term. A term has one leader; terms restart
    /// with each history.
    fn record_leader(
        &mut self,
        said: Option<Leadership>,
        known: &mut (usize, u64),
        (from, to): (Duration, Duration),
    ) {
        let Some(said) = said else {
            self.extensions.push(Extension::Standstill { from, to });
            return;
        };
        let term = (self.epochs.len(), said.term);
        if term > *known {
            *known = term;
            self.extensions.push(Extension::Leader { at: to });
        }
    }

    /// Records the events of a watch. Returns false if the watch's epoch is over.
    fn take(&mut self, epoch: usize, response: &WatchResponse, at: Duration) -> bool {
        if epoch + 1 != self.epochs.len() {
            return false;
        }
        let known_to = self.present().known_to;
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let revision = kv.mod_revision();
            // A response contains all events of a revision or none.
            if revision <= known_to {
                continue;
            }
            let before = self.present().known_to;
            if revision > before + 1 {
                self.gaps
                    .push(format!("etcd reported revision {revision} after {before}"));
            }
            let present = self.present();
            present.known_to = revision;
            present.changes.push(Change {
                at,
                revision,
                key: String::from_utf8_lossy(kv.key()).into_owned(),
                create_revision: kv.create_revision(),
                lease: kv.lease(),
                value: match event.event_type() {
                    EventType::Put => Some(kv.value().to_vec()),
                    EventType::Delete => None,
                },
            });
        }
        true
    }
}

/// A member's report about the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    /// The leader's member id; 0 without a leader.
    pub leader: u64,
    pub committed: u64,
    pub applied: u64,
}

impl Observer {
    pub fn start(cluster: &EtcdCluster, clock: Clock) -> Self {
        let seen = Arc::new(Mutex::new(Seen {
            epochs: vec![new_epoch(clock.now())],
            extensions: Vec::new(),
            gaps: Vec::new(),
        }));
        let mut tasks: Vec<_> = cluster
            .members()
            .iter()
            .map(|member| tokio::spawn(follow(member.clone(), Arc::clone(&seen), clock)))
            .collect();
        let leaders = follow_leaders(cluster.clone(), Arc::clone(&seen), clock);
        tasks.push(tokio::spawn(leaders));
        Self {
            seen,
            clock,
            cluster: cluster.clone(),
            _tasks: tasks.into_iter().map(AbortOnDropHandle::new).collect(),
        }
    }

    /// The last revision of the current history up to which every change is recorded.
    pub fn known_to(&self) -> i64 {
        self.seen.lock().present().known_to
    }

    /// All histories, the current one last.
    pub fn epochs(&self) -> Vec<Epoch> {
        self.seen.lock().epochs.clone()
    }

    pub fn extensions(&self) -> Vec<Extension> {
        self.seen.lock().extensions.clone()
    }

    pub fn gaps(&self) -> Vec<String> {
        self.seen.lock().gaps.clone()
    }

    /// Adds a reason why leases may last longer.
    pub fn add_extension(&self, extension: Extension) {
        self.seen.lock().extensions.push(extension);
    }

    /// The changes of the current history until now: reads etcd's current revision, then waits
    /// until the observer has recorded all changes up to it.
    ///
    /// # Errors
    ///
    /// If no member responds.
    pub async fn changes_until_now(&self) -> Result<Vec<Change>> {
        let revision = self
            .current_revision(GetOptions::new().with_keys_only())
            .await?;
        while self.known_to() < revision {
            sleep(Duration::from_millis(5)).await;
        }
        Ok(self.seen.lock().present().changes.clone())
    }

    /// The current revision, by a linearizable read.
    async fn current_revision(&self, options: GetOptions) -> Result<i64> {
        let mut last = "no member runs".into();
        for member in self.cluster.members().iter().filter(|m| m.is_running()) {
            match timeout(PATIENCE, revision_of(member, options.clone())).await {
                Ok(Ok(revision)) => return Ok(revision),
                Ok(Err(error)) => last = error,
                Err(_) => last = format!("{} does not respond", member.name()).into(),
            }
        }
        Err(last)
    }

    /// Waits until the observer has recorded everything that this one member has, without a quorum.
    ///
    /// # Errors
    ///
    /// If that takes more than 4 s.
    pub async fn catch_up_with(&self, member: &Etcd) -> Result<()> {
        let catch_up = async {
            let revision = revision_of(member, GetOptions::new().with_serializable()).await?;
            while self.known_to() < revision {
                sleep(Duration::from_millis(5)).await;
            }
            Ok(())
        };
        timeout(PATIENCE * 2, catch_up)
            .await
            .map_err(|_| format!("{} reported no more revisions", member.name()))?
    }

    /// Ends the current history, while no member runs and before all are wiped. `whole` says that
    /// every change of it is certainly recorded.
    pub fn end_epoch(&self, whole: bool) {
        let now = self.clock.now();
        let mut seen = self.seen.lock();
        let present = seen.present();
        present.ended = Some(now);
        present.whole = whole;
        seen.epochs.push(new_epoch(now));
    }
}

fn new_epoch(began: Duration) -> Epoch {
    Epoch {
        began,
        // The revision of an empty etcd.
        known_to: 1,
        ..Epoch::default()
    }
}

async fn revision_of(member: &Etcd, options: GetOptions) -> Result<i64> {
    let response = member
        .client()
        .await?
        .get("revision", Some(options))
        .await?;
    let header = response.header().ok_or("a response without a header")?;
    Ok(header.revision())
}

/// Asks a member for its report about the cluster.
pub async fn leadership(client: &mut Client) -> Result<Leadership> {
    let status = timeout(PATIENCE, client.status()).await??;
    Ok(Leadership {
        term: status.raft_term(),
        leader: status.leader(),
        committed: status.raft_index(),
        applied: status.raft_applied_index(),
    })
}

/// Watches one member and reopens the watch after every fault.
async fn follow(member: Etcd, seen: Arc<Mutex<Seen>>, clock: Clock) {
    loop {
        let (epoch, known_to) = {
            let mut seen = seen.lock();
            (seen.epochs.len() - 1, seen.present().known_to)
        };
        // On any error, the watch is reopened at the revision that all watches together have
        // reached.
        let _ = follow_stream(&member, epoch, known_to, &seen, clock).await;
        sleep(REOPEN).await;
    }
}

async fn follow_stream(
    member: &Etcd,
    epoch: usize,
    known_to: i64,
    seen: &Mutex<Seen>,
    clock: Clock,
) -> Result<()> {
    let options = WatchOptions::new()
        .with_all_keys()
        .with_start_revision(known_to + 1);
    let open = async {
        Ok::<_, Box<dyn std::error::Error + Send + Sync>>(
            member.client().await?.watch("", Some(options)).await?,
        )
    };
    let mut stream = timeout(PATIENCE, open).await??;
    let mut last = known_to;
    loop {
        match timeout(PATIENCE, stream.message()).await {
            Ok(message) => {
                let Some(response) = message? else {
                    return Ok(());
                };
                if response.canceled() || !seen.lock().take(epoch, &response, clock.now()) {
                    return Ok(());
                }
                let told = response.events().iter().filter_map(|event| event.kv());
                last = told.map(|kv| kv.mod_revision()).fold(last, i64::max);
            }
            // Other members reported more revisions while this stream was silent: the stream may be
            // dead.
            Err(_) => {
                let mut seen = seen.lock();
                if seen.epochs.len() != epoch + 1 || seen.present().known_to > last {
                    return Ok(());
                }
            }
        }
    }
}

/// Records changes of the leader, and the times without a known leader.
async fn follow_leaders(cluster: EtcdCluster, seen: Arc<Mutex<Seen>>, clock: Clock) {
    let mut clients: Vec<Option<Client>> = cluster.members().iter().map(|_| None).collect();
    let mut known = (0, 0);
    let mut looked = clock.now();
    loop {
        let asked = clients
            .iter_mut()
            .zip(cluster.members())
            .map(|(client, member)| timeout(LEADER_POLL, query_leader(client, member)));
        let responses = join_all(asked).await.into_iter().flatten().flatten();
        let now = responses
            .max_by_key(|response| response.term)
            .filter(|response| response.leader != 0);
        let (from, at) = (looked, clock.now());
        looked = at;
        seen.lock().record_leader(now, &mut known, (from, at));
        sleep(LEADER_POLL).await;
    }
}

async fn query_leader(client: &mut Option<Client>, member: &Etcd) -> Option<Leadership> {
    let mut asked = match client.take() {
        Some(client) => client,
        None => member.client().await.ok()?,
    };
    let response = leadership(&mut asked).await.ok()?;
    *client = Some(asked);
    Some(response)
}
