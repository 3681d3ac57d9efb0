//! The driver against a scripted etcd, in paused time.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use super::*;
use crate::directory::event::{Changes, KeyValueAt};
use crate::directory::merge::MergedView;
use crate::directory::publisher::PUBLISH_INTERVAL;
use crate::format::EtcdNaming;
use crate::snapshot::{Freshness, Snapshot};

type State = ListWatchState<FakeWatch>;

/// The resolution of tokio's timer, by which a sleep may be longer.
const TICK: Duration = Duration::from_millis(1);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Request {
    List { revision: Option<i64>, limit: i64 },
    Watch { from_revision: i64 },
    CurrentRevision,
    Fingerprint { revision: i64 },
}

/// The responses to come, per kind of request. A request without a response waits forever.
#[derive(Default)]
struct Script {
    lists: VecDeque<Result<Page>>,
    /// How long each list takes.
    list_takes: Duration,
    watches: VecDeque<Result<FakeWatch>>,
    current_revisions: VecDeque<i64>,
    fingerprints: VecDeque<Fingerprint>,
    /// The requests so far, with their time.
    requests: Vec<(Instant, Request)>,
}

/// A scripted etcd. Clones share the script.
#[derive(Clone, Default)]
struct FakeEtcd(Arc<Mutex<Script>>);

impl FakeEtcd {
    fn lists(&self, result: Result<Page>) -> &Self {
        self.0.lock().lists.push_back(result);
        self
    }

    /// Opens the next watch at `revision`. The returned sender sends its changes.
    fn watches(&self, revision: i64) -> mpsc::UnboundedSender<Result<Changes>> {
        let (sender, changes) = mpsc::unbounded_channel();
        let watch = FakeWatch { revision, changes };
        self.0.lock().watches.push_back(Ok(watch));
        sender
    }

    fn refuses_watch(&self, error: Error) -> &Self {
        self.0.lock().watches.push_back(Err(error));
        self
    }

    fn record(&self, request: Request) {
        self.0.lock().requests.push((Instant::now(), request));
    }

    fn requests(&self) -> Vec<Request> {
        let script = self.0.lock();
        script.requests.iter().map(|(_, r)| r.clone()).collect()
    }

    /// The times of the lists so far.
    fn list_times(&self) -> Vec<Instant> {
        let script = self.0.lock();
        let is_list = |request: &Request| matches!(request, Request::List { .. });
        let lists = script.requests.iter().filter(|(_, r)| is_list(r));
        lists.map(|(at, _)| *at).collect()
    }
}

impl ListWatch for FakeEtcd {
    type Watch = FakeWatch;

    fn operation(&self) -> String {
        "list \"services/a/\"".to_owned()
    }

    async fn list(&self, _from: &[u8], revision: Option<i64>, limit: i64) -> Result<Page> {
        self.record(Request::List { revision, limit });
        let (response, takes) = {
            let mut script = self.0.lock();
            (script.lists.pop_front(), script.list_takes)
        };
        sleep(takes).await;
        or_pending(response).await
    }

    async fn watch(&self, from_revision: i64) -> Result<FakeWatch> {
        self.record(Request::Watch { from_revision });
        let response = self.0.lock().watches.pop_front();
        or_pending(response).await
    }

    async fn current_revision(&self) -> Result<i64> {
        self.record(Request::CurrentRevision);
        let response = self.0.lock().current_revisions.pop_front();
        or_pending(response.map(Ok)).await
    }

    async fn fingerprint(&self, revision: i64) -> Result<Fingerprint> {
        self.record(Request::Fingerprint { revision });
        let response = self.0.lock().fingerprints.pop_front();
        or_pending(response.map(Ok)).await
    }
}

async fn or_pending<T>(response: Option<Result<T>>) -> Result<T> {
    match response {
        Some(response) => response,
        None => std::future::pending().await,
    }
}

struct FakeWatch {
    revision: i64,
    changes: mpsc::UnboundedReceiver<Result<Changes>>,
}

impl WatchStream for FakeWatch {
    fn revision(&self) -> i64 {
        self.revision
    }

    async fn next(&mut self) -> Result<Changes> {
        or_pending(self.changes.recv().await).await
    }
}

fn state() -> State {
    ListWatchState::new(Arc::new(EtcdNaming), "services".into(), "a".into())
}

fn entry(id: &str, mod_revision: i64) -> KeyValueAt {
    KeyValueAt {
        key: format!("services/a/{id}").into_bytes(),
        create_revision: mod_revision,
        mod_revision,
        value: Some(format!(r#"{{"Addr":"h:{mod_revision}"}}"#).into_bytes()),
    }
}

/// A complete list of one instance per revision.
fn page(mod_revisions: &[i64], revision: i64) -> Result<Page> {
    let entries = mod_revisions.iter().map(|at| entry(&at.to_string(), *at));
    Ok(Page {
        entries: entries.collect(),
        more: false,
        revision,
    })
}

/// A new instance at `revision`.
fn put(revision: i64) -> Result<Changes> {
    Ok(Changes {
        entries: vec![entry(&revision.to_string(), revision)],
        revision,
    })
}

fn rpc(status: Status) -> Error {
    Error::Rpc {
        operation: "list \"services/a/\"".into(),
        status: Box::new(status),
    }
}

fn unavailable_error() -> Error {
    rpc(Status::unavailable("the network is cut"))
}

fn compacted_error() -> Error {
    rpc(Status::out_of_range(
        "etcdserver: mvcc: required revision has been compacted",
    ))
}

/// The list requests that a state without a watch causes, and the watch after them.
fn list_then_watch(from_revision: i64) -> Vec<Request> {
    let (revision, limit) = (None, PAGE_SIZE);
    vec![
        Request::List { revision, limit },
        Request::Watch { from_revision },
    ]
}

/// A driver that follows the scripted etcd in a task.
struct Following {
    merged: watch::Receiver<Arc<Snapshot>>,
    task: AbortOnDropHandle<()>,
}

impl Following {
    fn start(etcd: &FakeEtcd, mut state: State) -> Self {
        let (mut inputs, merged) = MergedView::start(vec![state.snapshot()]);
        let (input, mut driver) = (inputs.remove(0), Driver::new(etcd.clone()));
        let task = tokio::spawn(async move {
            let mut publisher = Publisher::new(&input, None);
            driver.follow(&mut state, &mut publisher).await;
        });
        Self {
            merged,
            task: AbortOnDropHandle::new(task),
        }
    }

    /// Starts from a live state with one instance, at revision 10.
    async fn start_live(etcd: &FakeEtcd) -> (Self, mpsc::UnboundedSender<Result<Changes>>) {
        let mut state = state();
        let changes = etcd.lists(page(&[3], 10)).watches(10);
        let mut driver = Driver::new(etcd.clone());
        driver.list_and_watch(&mut state).await.unwrap();
        (Self::start(etcd, state), changes)
    }

    /// Waits for the next snapshot.
    async fn next(&mut self) -> Arc<Snapshot> {
        self.merged.changed().await.unwrap();
        Arc::clone(&self.merged.borrow_and_update())
    }

    async fn until_live(&mut self) -> Arc<Snapshot> {
        let is_live = |snapshot: &Arc<Snapshot>| snapshot.freshness().is_live();
        let snapshot = self.merged.wait_for(is_live).await.unwrap();
        Arc::clone(&snapshot)
    }
}

fn stale_reason(snapshot: &Snapshot) -> String {
    match snapshot.freshness() {
        Freshness::Stale { reason, .. } => reason.to_string(),
        Freshness::Live => panic!("the snapshot is live"),
    }
}

mod list_and_watch {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn returns_the_error_of_the_first_list() {
        let etcd = FakeEtcd::default();
        etcd.lists(Err(unavailable_error()));
        let started = Instant::now();
        let result = Driver::new(etcd.clone()).list_and_watch(&mut state()).await;
        assert!(result.is_err_and(|error| error.code() == Some(Code::Unavailable)));
        assert_eq!(started.elapsed(), Duration::ZERO);
        assert_eq!(etcd.requests().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn lists_again_after_a_compaction() {
        let etcd = FakeEtcd::default();
        etcd.lists(page(&[3], 10))
            .refuses_watch(compacted_error())
            .lists(page(&[15], 20))
            .watches(20);
        let mut state = state();
        let mut driver = Driver::new(etcd.clone());
        driver.list_and_watch(&mut state).await.unwrap();
        assert_eq!(state.snapshot().revision(), 20);
        assert_eq!(state.snapshot().len(), 1);
        assert_eq!(
            etcd.requests(),
            [list_then_watch(11), list_then_watch(21)].concat()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn lists_again_if_the_revision_went_back() {
        let etcd = FakeEtcd::default();
        etcd.lists(page(&[3], 10)).watches(4);
        etcd.0.lock().current_revisions.push_back(4);
        etcd.lists(page(&[2], 5)).watches(5);
        let mut state = state();
        let mut driver = Driver::new(etcd.clone());
        driver.list_and_watch(&mut state).await.unwrap();
        assert_eq!(state.snapshot().revision(), 5);
        let mut expected = list_then_watch(11);
        expected.push(Request::CurrentRevision);
        expected.extend(list_then_watch(6));
        assert_eq!(etcd.requests(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn accepts_a_member_that_lags_behind() {
        let etcd = FakeEtcd::default();
        etcd.lists(page(&[3], 10)).watches(4);
        etcd.0.lock().current_revisions.push_back(10);
        let mut driver = Driver::new(etcd.clone());
        driver.list_and_watch(&mut state()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn verifies_the_history_after_a_slow_list() {
        let etcd = FakeEtcd::default();
        etcd.0.lock().list_takes = VERIFY_AFTER + Duration::from_millis(1);
        etcd.lists(page(&[3], 10)).watches(10);
        // Another history has passed the listed revision meanwhile.
        let other = Fingerprint {
            count: 1,
            newest: 9,
        };
        etcd.lists(page(&[9], 12)).watches(12);
        etcd.0.lock().fingerprints.extend([other, other]);
        let mut state = state();
        let mut driver = Driver::new(etcd.clone());
        driver.list_and_watch(&mut state).await.unwrap();
        assert_eq!(state.snapshot().revision(), 12);
        let mut expected = list_then_watch(11);
        expected.push(Request::Fingerprint { revision: 10 });
        expected.extend(list_then_watch(13));
        expected.push(Request::Fingerprint { revision: 12 });
        assert_eq!(etcd.requests(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn halves_the_page_when_a_response_is_too_large() {
        let etcd = FakeEtcd::default();
        let too_large = || rpc(Status::out_of_range("the message is too large"));
        etcd.lists(Err(too_large()))
            .lists(Err(too_large()))
            .lists(page(&[3], 10))
            .watches(10);
        let mut driver = Driver::new(etcd.clone());
        driver.list_and_watch(&mut state()).await.unwrap();
        let limits: Vec<i64> = etcd
            .requests()
            .into_iter()
            .filter_map(|request| match request {
                Request::List { limit, .. } => Some(limit),
                _ => None,
            })
            .collect();
        assert_eq!(limits, [1_000, 500, 250]);
    }
}

mod follow {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn lists_until_it_succeeds() {
        let etcd = FakeEtcd::default();
        for _ in 0..3 {
            etcd.lists(Err(unavailable_error()));
        }
        let _changes = etcd.lists(page(&[3], 10)).watches(10);
        let mut following = Following::start(&etcd, state());
        let snapshot = following.until_live().await;
        assert_eq!(snapshot.len(), 1);
        // The backoff starts at 50 ms and grows by 1.6, times a random factor of 0.5 to 1.
        let times = etcd.list_times();
        for (pair, millis) in times.windows(2).zip([50.0, 80.0, 128.0]) {
            let pause = (pair[1] - pair[0]).as_secs_f64() * 1_000.0;
            assert!((millis / 2.0..millis + 1.1).contains(&pause), "{pause}");
        }
        assert_eq!(times.len(), 4);
    }

    #[tokio::test(start_paused = true)]
    async fn lost_watch_is_stale_at_once_then_listed_again() {
        let etcd = FakeEtcd::default();
        let (mut following, changes) = Following::start_live(&etcd).await;
        let lost_at = Instant::now();
        changes.send(Err(unavailable_error())).unwrap();
        let stale = following.next().await;
        assert_eq!(lost_at.elapsed(), Duration::ZERO);
        let reason = stale_reason(&stale);
        assert!(reason.contains("the network is cut"), "{reason}");
        assert_eq!(stale.len(), 1);

        // The first list after the loss fails, and the second one succeeds.
        let _changes = etcd
            .lists(Err(rpc(Status::unavailable("still down"))))
            .lists(page(&[3, 11], 12))
            .watches(12);
        let failed = following.next().await;
        let reason = stale_reason(&failed);
        assert!(reason.contains("still down"), "{reason}");
        let listed = following.next().await;
        assert_eq!(listed.len(), 2);
        assert_eq!(stale_reason(&listed), reason);
        let live = following.until_live().await;
        assert_eq!(live.revision(), 12);
        let times = etcd.list_times();
        assert_eq!(times.len(), 3);
        let first = times[1] - lost_at;
        assert!(first <= RELIST_WITHIN + TICK, "{first:?}");
        let second = times[2] - times[1];
        assert!(second <= Duration::from_millis(50) + TICK, "{second:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn compaction_lists_again() {
        let etcd = FakeEtcd::default();
        let (mut following, changes) = Following::start_live(&etcd).await;
        let compact_revision = 15;
        changes
            .send(Err(Error::Compacted { compact_revision }))
            .unwrap();
        assert!(!following.next().await.freshness().is_live());
        let _changes = etcd.lists(page(&[12], 20)).watches(20);
        let live = following.until_live().await;
        assert_eq!(live.revision(), 20);
        assert_eq!(live.len(), 1);
    }

    /// The pause between the first and the second list after the loss of a watch that was open for
    /// `open_for`, after ten failed lists before that watch.
    async fn pause_after_a_watch_of(open_for: Duration) -> Duration {
        let etcd = FakeEtcd::default();
        for _ in 0..10 {
            etcd.lists(Err(unavailable_error()));
        }
        let changes = etcd.lists(page(&[3], 10)).watches(10);
        let mut following = Following::start(&etcd, state());
        following.until_live().await;
        sleep(open_for).await;
        etcd.lists(Err(unavailable_error())).lists(page(&[3], 10));
        let _changes = etcd.watches(10);
        changes.send(Err(unavailable_error())).unwrap();
        following.next().await;
        following.until_live().await;
        let times = etcd.list_times();
        times[times.len() - 1] - times[times.len() - 2]
    }

    #[tokio::test(start_paused = true)]
    async fn stable_watch_resets_the_backoff() {
        let pause = pause_after_a_watch_of(STABLE_AFTER).await;
        assert!(pause <= Duration::from_millis(50) + TICK, "{pause:?}");
        let pause = pause_after_a_watch_of(STABLE_AFTER / 2).await;
        assert!(pause >= Duration::from_millis(500), "{pause:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn changes_within_the_interval_are_one_snapshot() {
        let etcd = FakeEtcd::default();
        let (mut following, changes) = Following::start_live(&etcd).await;
        // A change that comes alone is published at once.
        sleep(PUBLISH_INTERVAL).await;
        let first_at = Instant::now();
        changes.send(put(11)).unwrap();
        assert_eq!(following.next().await.revision(), 11);
        assert_eq!(first_at.elapsed(), Duration::ZERO);

        // Changes within the interval after it are published together, at its end.
        for revision in 12..=14 {
            sleep(PUBLISH_INTERVAL / 5).await;
            changes.send(put(revision)).unwrap();
        }
        assert_eq!(following.next().await.revision(), 14);
        let took = first_at.elapsed();
        assert!(
            (PUBLISH_INTERVAL..=PUBLISH_INTERVAL + TICK).contains(&took),
            "{took:?}"
        );

        // Without a change there is no snapshot.
        let more = tokio::time::timeout(Duration::from_secs(1), following.next());
        assert!(more.await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn loss_within_the_interval_is_published_at_once() {
        let etcd = FakeEtcd::default();
        let (mut following, changes) = Following::start_live(&etcd).await;
        let started = Instant::now();
        changes.send(put(11)).unwrap();
        changes.send(Err(unavailable_error())).unwrap();
        let stale = following.next().await;
        assert!(!stale.freshness().is_live());
        // With the pending change.
        assert_eq!(stale.revision(), 11);
        assert_eq!(started.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn ends_stale_when_the_client_is_closed() {
        let etcd = FakeEtcd::default();
        let (mut following, changes) = Following::start_live(&etcd).await;
        let name = "main".into();
        changes.send(Err(Error::Closed { name })).unwrap();
        let stale = following.next().await;
        assert!(stale_reason(&stale).contains("closed"));
        following.task.await.unwrap();
        // The last input is dropped, so streams of snapshots end.
        assert!(following.merged.changed().await.is_err());
        assert_eq!(etcd.requests(), list_then_watch(11));
    }
}
