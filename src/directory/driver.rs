//! Does for the directory's state machine what it asks for: lists, watches, waits.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;
use tonic::Code;

use super::cache::{self, Cache, Keeper};
use super::merge::Source;
use super::state::{Entry, Input, Machine, Todo};
use crate::backoff::Backoff;
use crate::client::Client;
use crate::client::{EventType, GetOptions, RawWatch, SortOrder, SortTarget, WatchOptions};
use crate::error::{Error, Result};
use crate::snapshot::Freshness;

/// Keys per page of a list. A registration is a few hundred bytes, so that a page stays well under
/// the limit of one message (2 MiB by default).
const PAGE: i64 = 1_000;

/// A watch that held for so long was not lost because of a fault that is still there, so that the
/// next wait is short again.
const QUIET: Duration = Duration::from_secs(10);

/// How long a list and the opening of its watch may take together without a look at whether both are of
/// one etcd. To be stopped, wiped and started takes longer.
const OF_ONE_ETCD: Duration = Duration::from_millis(500);

/// Within which time those that lost their watch list anew, each at a random moment of it: a thousand
/// clients of one member lose theirs together, and a list is the most that they ask of etcd.
const RELIST_WITHIN: Duration = Duration::from_millis(500);

/// The least time between two snapshots that show changes. A change that comes alone is shown at once; of
/// a stream of them, of a thousand a second, several are shown together: each snapshot of ten thousand
/// instances takes milliseconds to make and to compare.
const SHOW_EVERY: Duration = Duration::from_millis(20);

/// Lists for the first time and opens the watch, without retries: what etcd says now is what the
/// caller wants to know. Only a compaction or a wipe in the middle is no answer.
pub(super) async fn begin(client: &Client, machine: &mut Machine) -> Result<RawWatch> {
    let todo = machine.start();
    begin_with(client, machine, todo).await
}

/// The same where there may be a file of what was last known: without an answer from etcd that is shown,
/// and there is no watch yet. What etcd refuses is an error with a file as well.
pub(super) async fn begin_or_restore(
    client: &Client,
    machine: &mut Machine,
    cache: Option<&Cache>,
) -> Result<Option<RawWatch>> {
    let known = match cache.cloned() {
        Some(cache) => tokio::task::spawn_blocking(move || cache.load()).await,
        None => Ok(None),
    };
    let Ok(Some(mut known)) = known else {
        return begin(client, machine).await.map(Some);
    };
    let begun = tokio::time::timeout(cache::LIST_WITHIN, begin(client, machine)).await;
    let why = match begun {
        Ok(Ok(watch)) => return Ok(Some(watch)),
        Ok(Err(error)) if error.is_permanent() || matches!(error, Error::Closed { .. }) => {
            return Err(error);
        }
        Ok(Err(error)) => error.to_string(),
        Err(_) => "etcd has not answered yet".to_owned(),
    };
    if let Freshness::Stale { reason, .. } = &mut known.freshness {
        *reason = format!("{reason}, for {why}").into();
    }
    tracing::warn!(
        service = machine.service(),
        instances = known.len(),
        reason = why,
        "beginning with the instances that were last known"
    );
    machine.restore(known);
    Ok(None)
}

async fn begin_with(client: &Client, machine: &mut Machine, mut todo: Todo) -> Result<RawWatch> {
    let mut page = PAGE;
    let mut pauses = Backoff::for_etcd();
    let mut begun = Instant::now();
    loop {
        if let Todo::List { revision: None, .. } = todo {
            begun = Instant::now();
        }
        let heard = match todo {
            Todo::List { from, revision } => list(client, machine, from, revision, &mut page).await,
            Todo::Watch { from_revision } => {
                match watch(client, machine, from_revision, begun).await {
                    Ok(watch) => {
                        machine.step(Input::Watching, SystemTime::now());
                        return Ok(watch);
                    }
                    Err(error) => Err(error),
                }
            }
            Todo::Listen | Todo::RelistAfterBackoff => {
                tokio::time::sleep(pauses.next()).await;
                todo = machine.start();
                continue;
            }
        };
        let input = match heard {
            Err(error) if is_of_the_past(&error) => Input::Lost {
                reason: error.to_string(),
            },
            heard => heard?,
        };
        (todo, _) = machine.step(input, SystemTime::now());
    }
}

/// Whether another list would be another answer: history was compacted meanwhile, or is another one.
fn is_of_the_past(error: &Error) -> bool {
    is_compacted(error)
        || matches!(error, Error::RevisionWentBack { .. })
        || error.code() == Some(Code::Aborted)
}

fn is_compacted(error: &Error) -> bool {
    match error {
        Error::Compacted { .. } => true,
        // etcd's `ErrGRPCCompacted`, which has a code that others have too.
        Error::Rpc { status, .. } => status.message().contains("has been compacted"),
        _ => false,
    }
}

/// Follows one source, in one task at a time.
pub(super) struct Follower {
    client: Client,
    cache: Option<Cache>,
    /// Of whoever follows. `None` when the client is closed: with the last source ends what is shown.
    turn: Mutex<Option<Turn>>,
}

struct Turn {
    machine: Machine,
    /// The watch that was opened for the first who follows.
    watching: Option<RawWatch>,
    source: Source,
}

impl Follower {
    pub(super) fn new(
        client: Client,
        machine: Machine,
        watching: Option<RawWatch>,
        source: Source,
        cache: Option<Cache>,
    ) -> Arc<Self> {
        let turn = Turn {
            machine,
            watching,
            source,
        };
        Arc::new(Self {
            client,
            cache,
            turn: Mutex::new(Some(turn)),
        })
    }

    /// Follows etcd from when nobody else does, until nobody looks any more or the client is closed.
    pub(super) async fn follow(self: Arc<Self>) {
        let mut following = Following(self.turn.lock().await);
        if let Some(turn) = &mut *following.0 {
            let keeper = self.cache.clone().map(Keeper::of);
            follow(&self.client, turn, keeper).await;
            *following.0 = None;
        }
    }
}

/// Whoever follows. It may end in other ways than by being done: with its runtime, or in a panic.
struct Following<'a>(MutexGuard<'a, Option<Turn>>);

impl Drop for Following<'_> {
    fn drop(&mut self) {
        if let Some(turn) = &*self.0 {
            turn.source.abandon();
        }
    }
}

/// Until the client is closed.
async fn follow(client: &Client, turn: &mut Turn, keeper: Option<Keeper>) {
    let Turn {
        machine,
        watching,
        source,
    } = turn;
    let mut backoff = Backoff::for_etcd();
    let mut page = PAGE;
    let mut open = watching.take();
    let mut todo = match open {
        Some(_) => Todo::Listen,
        // From a file, or after another who followed.
        None => {
            let reason = "not listed anew yet".into();
            machine.step(Input::Lost { reason }, SystemTime::now());
            machine.start()
        }
    };
    let show = |machine: &mut Machine| {
        let snapshot = machine.snapshot();
        if let Some(keeper) = keeper.as_ref().filter(|_| snapshot.freshness.is_live()) {
            keeper.keep(&snapshot);
        }
        source.show(snapshot);
    };
    // That of the first list is shown already.
    if let (Some(keeper), Some(_)) = (&keeper, &open) {
        keeper.keep(&machine.snapshot());
    }
    let mut opened = Instant::now();
    let mut begun = Instant::now();
    let mut shown = Instant::now();
    let mut unshown = false;
    loop {
        if let Todo::List { revision: None, .. } = todo {
            begun = Instant::now();
        }
        let heard = match todo {
            Todo::List { from, revision } => list(client, machine, from, revision, &mut page).await,
            Todo::Watch { from_revision } => {
                match watch(client, machine, from_revision, begun).await {
                    Ok(watch) => {
                        open = Some(watch);
                        opened = Instant::now();
                        Ok(Input::Watching)
                    }
                    Err(error) => Err(error),
                }
            }
            Todo::Listen => match &mut open {
                Some(watch) if unshown => {
                    match tokio::time::timeout_at(shown + SHOW_EVERY, events(watch)).await {
                        Ok(heard) => heard,
                        Err(_) => {
                            show(machine);
                            (shown, unshown) = (Instant::now(), false);
                            todo = Todo::Listen;
                            continue;
                        }
                    }
                }
                Some(watch) => events(watch).await,
                None => unreachable!("the machine listens only to the watch that it asked for"),
            },
            Todo::RelistAfterBackoff => {
                let wait = if open.take().is_some() {
                    if opened.elapsed() >= QUIET {
                        backoff.reset();
                    }
                    RELIST_WITHIN.mul_f64(fastrand::f64())
                } else {
                    backoff.next()
                };
                tokio::time::sleep(wait).await;
                todo = machine.start();
                continue;
            }
        };
        let closed = matches!(heard, Err(Error::Closed { .. }));
        let input = heard.unwrap_or_else(|error| {
            tracing::debug!(service = machine.service(), %error, "lost etcd");
            Input::Lost {
                reason: error.to_string(),
            }
        });
        let news;
        (todo, news) = machine.step(input, SystemTime::now());
        let may_wait = matches!(todo, Todo::Listen) && shown.elapsed() < SHOW_EVERY;
        unshown |= news;
        if unshown && !may_wait {
            show(machine);
            (shown, unshown) = (Instant::now(), false);
        }
        if closed {
            return;
        }
    }
}

async fn list(
    client: &Client,
    machine: &Machine,
    from: Vec<u8>,
    revision: Option<i64>,
    limit: &mut i64,
) -> Result<Input> {
    let mut options = GetOptions::new().with_range(machine.range().end.clone());
    if let Some(revision) = revision {
        options = options.with_revision(revision);
    }
    let mut answer = loop {
        let page = options.clone().with_limit(*limit);
        match client.get(from.as_slice(), Some(page)).await {
            // More than a message may hold: then fewer keys at a time, from here on.
            Err(error) if *limit > 1 && is_too_large(&error) => *limit /= 2,
            answer => break answer?,
        }
    };
    let entries = answer
        .take_kvs()
        .into_iter()
        .map(|kv| {
            let (create_revision, mod_revision) = (kv.create_revision(), kv.mod_revision());
            let (key, value) = kv.into_key_value();
            Entry {
                key,
                create_revision,
                mod_revision,
                value: Some(value),
            }
        })
        .collect();
    Ok(Input::Page {
        entries,
        more: answer.more(),
        revision: answer.header().map_or(0, |header| header.revision()),
    })
}

/// Whether an answer was larger than a message may be, as opposed to a revision out of etcd's range.
fn is_too_large(error: &Error) -> bool {
    match error {
        Error::Rpc { status, .. } => {
            status.code() == Code::OutOfRange && !status.message().starts_with("etcdserver")
        }
        _ => false,
    }
}

/// `begun` is when the list was.
async fn watch(
    client: &Client,
    machine: &Machine,
    from_revision: i64,
    begun: Instant,
) -> Result<RawWatch> {
    let range = machine.range();
    let options = WatchOptions::new()
        .with_range(range.end.clone())
        .with_start_revision(from_revision);
    let watch = client.open_watch(range.start.clone(), &options).await?;
    // A watch from a revision that is yet to come is silent until then. A member that lags behind
    // the list gets there; an etcd that was wiped since would hide its new history up to there.
    let seen = from_revision - 1;
    if watch.revision() < seen {
        let now = client.current_revision(&range.start).await?;
        if now < seen {
            return Err(Error::RevisionWentBack { seen, now });
        }
    }
    if begun.elapsed() > OF_ONE_ETCD {
        verify(client, machine, seen).await?;
    }
    Ok(watch)
}

/// Whether what was listed at a revision is what etcd had at that revision: one that was wiped meanwhile, and
/// has come further since, has something else there. What is compared is not all of it, but would be the
/// same by an unlikely accident only.
async fn verify(client: &Client, machine: &Machine, revision: i64) -> Result<()> {
    let range = machine.range();
    let newest = GetOptions::new()
        .with_range(range.end.clone())
        .with_revision(revision)
        .with_sort(SortTarget::Mod, SortOrder::Descend)
        .with_limit(1)
        .with_keys_only();
    let answer = client.get(range.start.clone(), newest).await?;
    let written = answer.kvs().first().map_or(0, |kv| kv.mod_revision());
    if (answer.count(), written) == machine.summary() {
        return Ok(());
    }
    Err(Error::Rpc {
        operation: format!("list {:?}", machine.service()),
        status: Box::new(tonic::Status::aborted(
            "etcd was wiped or restored while it was listed",
        )),
    })
}

async fn events(watch: &mut RawWatch) -> Result<Input> {
    let heard = watch.next().await?;
    let entries: Vec<Entry> = heard
        .events()
        .iter()
        .filter_map(|event| {
            let kv = event.kv()?;
            Some(Entry {
                key: kv.key().to_vec(),
                create_revision: kv.create_revision(),
                mod_revision: kv.mod_revision(),
                value: match event.event_type() {
                    EventType::Put => Some(kv.value().to_vec()),
                    EventType::Delete => None,
                },
            })
        })
        .collect();
    // Not the revision of the answer's header: to a watch that is catching up, etcd says its newest
    // there, before it has sent everything up to it.
    let revision = entries.iter().map(|entry| entry.mod_revision).max();
    Ok(Input::Events {
        entries,
        revision: revision.unwrap_or_default(),
    })
}

#[cfg(all(test, feature = "testing"))]
mod tests_on_etcd {
    use super::*;
    use crate::config::Config;
    use crate::format::EtcdNaming;
    use crate::testing::Etcd;

    #[tokio::test]
    async fn given_etcd_was_wiped_between_list_and_watch_then_the_watch_is_refused() {
        let etcd = Etcd::start().await.unwrap();
        let config = Config::builder().endpoints([etcd.endpoint()]);
        let client = Client::new("main", config.build().unwrap()).await.unwrap();
        let mut machine = Machine::new(Arc::new(EtcdNaming), "services".into(), "a".into());
        begin(&client, &mut machine).await.unwrap();
        let next = machine.snapshot().revision() + 1;
        let now = Instant::now();
        assert!(watch(&client, &machine, next, now).await.is_ok());
        let error = watch(&client, &machine, next + 1, now).await.err();
        assert!(
            matches!(error, Some(Error::RevisionWentBack { seen, now }) if seen == next && now == next - 1),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn given_etcd_was_wiped_between_list_and_watch_and_came_further_then_it_lists_anew() {
        let etcd = Etcd::start().await.unwrap();
        let config = Config::builder().endpoints([etcd.endpoint()]);
        let client = Client::new("main", config.build().unwrap()).await.unwrap();
        let put = async |key: &str| {
            let value = r#"{"Addr":"h:1"}"#;
            client.put(key, value, None).await.unwrap();
        };
        for id in ["ghost", "stays"] {
            put(&format!("services/a/{id}")).await;
        }
        let mut machine = Machine::new(Arc::new(EtcdNaming), "services".into(), "a".into());
        let open = begin(&client, &mut machine).await.unwrap();
        let next = machine.snapshot().revision() + 1;
        let long_ago = Instant::now() - OF_ONE_ETCD * 2;
        // It is what it was, also with changes since.
        put("services/a/later").await;
        assert!(watch(&client, &machine, next, long_ago).await.is_ok());
        etcd.wipe_and_restart().await.unwrap();
        while client.current_revision(b"x").await.map_or(0, |now| now) <= next + 5 {
            put("services/a/stays").await;
        }
        // Nothing else would tell.
        assert!(watch(&client, &machine, next, Instant::now()).await.is_ok());
        assert!(watch(&client, &machine, next, long_ago).await.is_err());
        drop(open);
    }

    #[tokio::test]
    async fn given_history_was_compacted_between_list_and_watch_then_it_lists_anew_without_ghosts()
    {
        let etcd = Etcd::start().await.unwrap();
        let config = Config::builder().endpoints([etcd.endpoint()]);
        let client = Client::new("main", config.build().unwrap()).await.unwrap();
        let put = async |id: &str| {
            let key = format!("services/a/{id}");
            client.put(key, r#"{"Addr":"h:1"}"#, None).await.unwrap();
        };
        put("ghost").await;
        put("stays").await;
        let mut machine = Machine::new(Arc::new(EtcdNaming), "services".into(), "a".into());
        begin(&client, &mut machine).await.unwrap();
        let from_revision = machine.snapshot().revision() + 1;

        client.delete("services/a/ghost", None).await.unwrap();
        put("newborn").await;
        etcd.compact().await.unwrap();

        let now = Instant::now();
        // etcd creates the watch, and takes it away again with the reason.
        let mut lost = watch(&client, &machine, from_revision, now).await.unwrap();
        assert!(
            events(&mut lost)
                .await
                .is_err_and(|error| is_compacted(&error))
        );
        let ghostly = machine.snapshot();
        assert_eq!(ghostly.len(), 2);
        let spent = watch(&client, &machine, from_revision, now).await.unwrap();
        let (mut sources, mut shown) = super::super::merge::Sources::begin(vec![ghostly]);
        let source = sources.remove(0);
        let follower = Follower::new(client.clone(), machine, Some(spent), source, None);
        let following = tokio::spawn(follower.follow());
        let truth = shown.wait_for(|snapshot| {
            let keys: Vec<&str> = snapshot.iter().map(|(key, _)| key.as_str()).collect();
            keys == ["services/a/newborn", "services/a/stays"] && snapshot.freshness().is_live()
        });
        let truth = tokio::time::timeout(Duration::from_secs(30), truth).await;
        assert!(truth.is_ok(), "the ghost stays");
        drop(truth);
        following.abort();

        let mut machine = Machine::new(Arc::new(EtcdNaming), "services".into(), "a".into());
        // A page that is pinned to what is compacted is no answer either.
        let (from, revision) = (b"services/a/".to_vec(), Some(from_revision - 1));
        let todo = Todo::List { from, revision };
        begin_with(&client, &mut machine, todo).await.unwrap();
        assert_eq!(machine.snapshot().len(), 2);
    }
}
