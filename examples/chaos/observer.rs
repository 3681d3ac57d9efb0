//! Sees everything that happens in etcd: a watch of all keys from the first revision on, on each member,
//! past all paths that are cut, with nothing but etcd's own protocol in between.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use goo_etcd::etcd_client::{Client, EventType, GetOptions, WatchOptions, WatchResponse};
use goo_etcd::testing::{Etcd, EtcdCluster};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::record::{Change, Clock, Epoch, Extension};

/// How long one request to a member may take; it may be paused or without a leader.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How often each member is asked who leads.
const LEADER_POLL: Duration = Duration::from_millis(200);

/// The pause before a watch is opened again.
const REOPEN: Duration = Duration::from_millis(50);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Watches until it is dropped. It reads each revision once, from the member that tells it first; since
/// it watches all keys, a revision that it missed would show as a gap.
pub struct Observer {
    seen: Arc<Mutex<Seen>>,
    clock: Clock,
    cluster: EtcdCluster,
    _tasks: Vec<AbortOnDropHandle<()>>,
}

struct Seen {
    epochs: Vec<Epoch>,
    extensions: Vec<Extension>,
    /// Revisions that were never told, which no etcd should do.
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

    /// Takes what was said of the leader, and the last term that is known. A term has one leader, and
    /// terms begin anew with each history.
    fn heard_of_leader(
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

    /// Takes what a watch of an epoch told; false if that epoch is over.
    fn take(&mut self, epoch: usize, response: &WatchResponse, at: Duration) -> bool {
        if epoch + 1 != self.epochs.len() {
            return false;
        }
        let known_to = self.present().known_to;
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let revision = kv.mod_revision();
            // A response has all of a revision or nothing of it.
            if revision <= known_to {
                continue;
            }
            let before = self.present().known_to;
            if revision > before + 1 {
                self.gaps
                    .push(format!("etcd told of {revision} after {before}"));
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

/// What a member says of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    pub term: u64,
    /// The leader's id; 0 while there is none.
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

    /// Up to which revision of the present history everything is known.
    pub fn known_to(&self) -> i64 {
        lock(&self.seen).present().known_to
    }

    /// All histories so far.
    pub fn epochs(&self) -> Vec<Epoch> {
        lock(&self.seen).epochs.clone()
    }

    pub fn extensions(&self) -> Vec<Extension> {
        lock(&self.seen).extensions.clone()
    }

    pub fn gaps(&self) -> Vec<String> {
        lock(&self.seen).gaps.clone()
    }

    /// A lease may last longer.
    pub fn extended(&self, extension: Extension) {
        lock(&self.seen).extensions.push(extension);
    }

    /// The changes of the present history, up to now: etcd is asked for its revision, and all changes
    /// up to that one are waited for.
    ///
    /// # Errors
    ///
    /// When no member answers.
    pub async fn up_to_now(&self) -> Result<Vec<Change>> {
        let revision = self.ask(GetOptions::new().with_keys_only()).await?;
        while self.known_to() < revision {
            sleep(Duration::from_millis(5)).await;
        }
        Ok(lock(&self.seen).present().changes.clone())
    }

    /// etcd's revision, from a quorum.
    async fn ask(&self, options: GetOptions) -> Result<i64> {
        let mut last = "no member runs".into();
        for member in self.cluster.members().iter().filter(|m| m.is_running()) {
            match timeout(PATIENCE, revision_of(member, options.clone())).await {
                Ok(Ok(revision)) => return Ok(revision),
                Ok(Err(error)) => last = error,
                Err(_) => last = format!("{} does not answer", member.name()).into(),
            }
        }
        Err(last)
    }

    /// Waits until everything is known that this member alone has, without a quorum.
    ///
    /// # Errors
    ///
    /// When that takes more than a few seconds.
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
            .map_err(|_| format!("{} told nothing more", member.name()))?
    }

    /// The present history is over, since no member runs and all will be wiped. `whole` if it is certain
    /// that all of it is known.
    pub fn end_epoch(&self, whole: bool) {
        let now = self.clock.now();
        let mut seen = lock(&self.seen);
        let present = seen.present();
        present.ended = Some(now);
        present.whole = whole;
        seen.epochs.push(new_epoch(now));
    }
}

fn new_epoch(began: Duration) -> Epoch {
    Epoch {
        began,
        // The revision of an etcd in which nothing has happened.
        known_to: 1,
        ..Epoch::default()
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn revision_of(member: &Etcd, options: GetOptions) -> Result<i64> {
    let answer = member
        .client()
        .await?
        .get("revision", Some(options))
        .await?;
    let header = answer.header().ok_or("an answer without a header")?;
    Ok(header.revision())
}

/// What a member says of the cluster.
pub async fn leadership(client: &mut Client) -> Result<Leadership> {
    let status = timeout(PATIENCE, client.status()).await??;
    Ok(Leadership {
        term: status.raft_term(),
        leader: status.leader(),
        committed: status.raft_index(),
        applied: status.raft_applied_index(),
    })
}

/// Follows one member, through everything that is done to it.
async fn follow(member: Etcd, seen: Arc<Mutex<Seen>>, clock: Clock) {
    loop {
        let (epoch, known_to) = {
            let mut seen = lock(&seen);
            (seen.epochs.len() - 1, seen.present().known_to)
        };
        // Whatever ends it, it is opened again from where all of them together are.
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
                if response.canceled() || !lock(seen).take(epoch, &response, clock.now()) {
                    return Ok(());
                }
                let told = response.events().iter().filter_map(|event| event.kv());
                last = told.map(|kv| kv.mod_revision()).fold(last, i64::max);
            }
            // Silent for long while others told more: it may be a stream that nobody serves.
            Err(_) => {
                let mut seen = lock(seen);
                if seen.epochs.len() != epoch + 1 || seen.present().known_to > last {
                    return Ok(());
                }
            }
        }
    }
}

/// Notes when the leader changes, and as long as there is none or nobody says who it is.
async fn follow_leaders(cluster: EtcdCluster, seen: Arc<Mutex<Seen>>, clock: Clock) {
    let mut clients: Vec<Option<Client>> = cluster.members().iter().map(|_| None).collect();
    let mut known = (0, 0);
    let mut looked = clock.now();
    loop {
        let asked = clients
            .iter_mut()
            .zip(cluster.members())
            .map(|(client, member)| timeout(LEADER_POLL, ask_leader(client, member)));
        let answers = join_all(asked).await.into_iter().flatten().flatten();
        let now = answers
            .max_by_key(|answer| answer.term)
            .filter(|answer| answer.leader != 0);
        let (from, at) = (looked, clock.now());
        looked = at;
        lock(&seen).heard_of_leader(now, &mut known, (from, at));
        sleep(LEADER_POLL).await;
    }
}

async fn ask_leader(client: &mut Option<Client>, member: &Etcd) -> Option<Leadership> {
    let mut asked = match client.take() {
        Some(client) => client,
        None => member.client().await.ok()?,
    };
    let answer = leadership(&mut asked).await.ok()?;
    *client = Some(asked);
    Some(answer)
}
