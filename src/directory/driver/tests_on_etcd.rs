//! The driver against a real etcd.

use std::sync::Arc;

use super::*;
use crate::client::{Client, RawWatch};
use crate::config::Config;
use crate::directory::event::KeyValueAt;
use crate::directory::follower::Follower;
use crate::directory::list_watch::EtcdRange;
use crate::directory::merge::MergedView;
use crate::format::EtcdNaming;
use crate::testing::Etcd;

type State = ListWatchState<RawWatch>;

async fn connect(etcd: &Etcd) -> Client {
    let config = Config::builder().endpoints([etcd.endpoint()]);
    Client::connect("main", config.build().unwrap())
        .await
        .unwrap()
}

fn state() -> State {
    ListWatchState::new(Arc::new(EtcdNaming), "services".into(), "a".into())
}

fn range(client: &Client, state: &State) -> EtcdRange {
    EtcdRange::new(client.clone(), state.range().clone())
}

async fn put(client: &Client, id: &str) {
    let key = format!("services/a/{id}");
    let value = r#"{"Addr":"h:1"}"#;
    client.put(key, value, None).await.unwrap();
}

/// Lists the range, and returns the start revision of its watch and the fingerprint of the list.
async fn list(driver: &mut Driver<EtcdRange>, state: &mut State) -> (i64, Fingerprint) {
    loop {
        let event = match state.action() {
            Action::Watch {
                from_revision,
                listed,
            } => return (from_revision, listed),
            action => driver.perform(action).await.unwrap(),
        };
        state.step(event, SystemTime::now());
    }
}

#[tokio::test]
async fn refuses_a_watch_after_etcd_was_wiped() {
    let etcd = Etcd::start().await.unwrap();
    let client = connect(&etcd).await;
    let mut state = state();
    let mut driver = Driver::new(range(&client, &state));
    let (next, listed) = list(&mut driver, &mut state).await;

    driver.list_started = Instant::now();
    assert!(driver.open_watch(next, listed).await.is_ok());
    // As if the list had been of a revision that a wiped etcd has not reached.
    let error = driver.open_watch(next + 1, listed).await.err();
    assert!(
        matches!(
            error,
            Some(Error::RevisionWentBack { seen, now }) if seen == next && now == next - 1
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn lists_again_if_a_wiped_etcd_passed_the_listed_revision() {
    let etcd = Etcd::start().await.unwrap();
    let client = connect(&etcd).await;
    for id in ["ghost", "stays"] {
        put(&client, id).await;
    }
    let mut state = state();
    let mut driver = Driver::new(range(&client, &state));
    let (next, listed) = list(&mut driver, &mut state).await;
    let long_ago = Instant::now() - VERIFY_AFTER * 2;

    // Later changes of the same history do not matter.
    put(&client, "later").await;
    driver.list_started = long_ago;
    assert!(driver.open_watch(next, listed).await.is_ok());

    etcd.wipe_and_restart().await.unwrap();
    while client.current_revision(b"x").await.map_or(0, |now| now) <= next + 5 {
        put(&client, "stays").await;
    }
    // Only the fingerprint reveals it.
    driver.list_started = Instant::now();
    assert!(driver.open_watch(next, listed).await.is_ok());
    driver.list_started = long_ago;
    let error = driver.open_watch(next, listed).await.err();
    assert!(error.as_ref().is_some_and(is_history_lost), "{error:?}");
}

#[tokio::test]
async fn compaction_between_list_and_watch_leaves_no_ghosts() {
    let etcd = Etcd::start().await.unwrap();
    let client = connect(&etcd).await;
    put(&client, "ghost").await;
    put(&client, "stays").await;
    let mut state = state();
    let range = range(&client, &state);
    let mut driver = Driver::new(range.clone());
    let (from_revision, listed) = list(&mut driver, &mut state).await;

    client.delete("services/a/ghost", None).await.unwrap();
    put(&client, "newborn").await;
    etcd.compact().await.unwrap();

    // etcd creates the watch, then cancels it with the reason.
    driver.list_started = Instant::now();
    let mut canceled = driver.open_watch(from_revision, listed).await.unwrap();
    let error = WatchStream::next(&mut canceled).await.err();
    assert!(matches!(error, Some(Error::Compacted { .. })), "{error:?}");

    // A follower that gets such a watch lists again.
    let with_ghost = state.snapshot();
    assert_eq!(with_ghost.len(), 2);
    driver.list_started = Instant::now();
    let spent = driver.open_watch(from_revision, listed).await.unwrap();
    state.step(Event::WatchOpened(spent), SystemTime::now());
    let (mut inputs, mut merged) = MergedView::start(vec![with_ghost]);
    let follower = Follower::new(range.clone(), state, inputs.remove(0), None);
    let task = tokio::spawn(follower.run());
    let truth = merged.wait_for(|snapshot| {
        let keys: Vec<&str> = snapshot.iter().map(|(key, _)| key.as_str()).collect();
        keys == ["services/a/newborn", "services/a/stays"] && snapshot.freshness().is_live()
    });
    let truth = tokio::time::timeout(Duration::from_secs(30), truth).await;
    assert!(truth.is_ok(), "the ghost stays");
    drop(truth);
    task.abort();

    // A page that is pinned to a compacted revision makes the list start over as well.
    let mut state = self::state();
    let mut driver = Driver::new(range);
    let page = Page {
        entries: vec![KeyValueAt {
            key: b"services/a/".to_vec(),
            create_revision: 1,
            mod_revision: 1,
            value: None,
        }],
        more: true,
        revision: from_revision - 1,
    };
    state.step(Event::Page(page), SystemTime::now());
    assert!(matches!(
        state.action(),
        Action::List { revision: Some(pinned), .. } if pinned == from_revision - 1
    ));
    driver.list_and_watch(&mut state).await.unwrap();
    assert_eq!(state.snapshot().len(), 2);
}
