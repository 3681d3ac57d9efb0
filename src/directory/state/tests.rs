use super::*;
use crate::directory::event::KeyValueAt;
use crate::format::{EtcdNaming, GoMicro};
use crate::instance::Instance;
use crate::snapshot::InstanceKey;

type State = ListWatchState<()>;

fn state() -> State {
    State::new(Arc::new(EtcdNaming), "services".into(), "a".into())
}

fn put(id: &str, mod_revision: i64, address: &str) -> KeyValueAt {
    KeyValueAt {
        key: format!("services/a/{id}").into_bytes(),
        create_revision: 1,
        mod_revision,
        value: Some(format!(r#"{{"Addr":"{address}"}}"#).into_bytes()),
    }
}

fn raw(id: &str, mod_revision: i64, value: &str) -> KeyValueAt {
    let value = Some(value.as_bytes().to_vec());
    KeyValueAt {
        value,
        ..put(id, mod_revision, "")
    }
}

fn delete(id: &str, mod_revision: i64) -> KeyValueAt {
    KeyValueAt {
        value: None,
        ..put(id, mod_revision, "")
    }
}

fn page(entries: Vec<KeyValueAt>, more: bool, revision: i64) -> Event<()> {
    Event::Page(Page {
        entries,
        more,
        revision,
    })
}

fn changes(entries: Vec<KeyValueAt>, revision: i64) -> Event<()> {
    Event::Changes(Changes { entries, revision })
}

fn lost_event() -> Event<()> {
    let reason = "cut".into();
    Event::Lost { reason }
}

fn opened_event() -> Event<()> {
    Event::WatchOpened(())
}

/// Returns whether the snapshot changed.
fn step(state: &mut State, event: Event<()>) -> bool {
    state.step(event, SystemTime::now())
}

/// Asserts that the next action is to watch from this revision.
fn assert_watches_from(state: &mut State, revision: i64) {
    let action = state.action();
    assert!(
        matches!(action, Action::Watch { from_revision, .. } if from_revision == revision),
        "{action:?}"
    );
}

/// The instances of the snapshot, as `id=address`.
fn shown_instances(state: &mut State) -> Vec<String> {
    state
        .snapshot()
        .iter()
        .map(|(key, instance)| {
            let id = key.as_str().trim_start_matches("services/a/");
            format!("{id}={}", instance.address)
        })
        .collect()
}

#[test]
fn pages_are_pinned_to_the_first_and_shown_when_complete() {
    let mut state = state();
    let from = b"services/a/".as_slice();
    let revision = None;
    assert_eq!(state.action(), Action::List { from, revision });

    assert!(!step(&mut state, page(vec![put("1", 3, "h:1")], true, 10)));
    let from = b"services/a/1\0".as_slice();
    let revision = Some(10);
    assert_eq!(state.action(), Action::List { from, revision });
    assert!(shown_instances(&mut state).is_empty());

    // The response to a pinned page carries the newest revision; the pinned revision counts.
    assert!(step(&mut state, page(vec![put("2", 4, "h:2")], false, 15)));
    assert_eq!(
        state.action(),
        Action::Watch {
            from_revision: 11,
            listed: Fingerprint {
                count: 2,
                newest: 4
            }
        }
    );
    assert_eq!(shown_instances(&mut state), ["1=h:1", "2=h:2"]);
    assert_eq!(state.snapshot().revision(), 10);

    // A list alone is not live, because its later changes go unnoticed.
    assert!(!state.snapshot().freshness().is_live());
    assert!(step(&mut state, opened_event()));
    assert_eq!(state.action(), Action::Receive(&mut ()));
    assert!(state.snapshot().freshness().is_live());
}

#[test]
fn batch_is_one_snapshot_and_its_repetition_none() {
    let mut state = state();
    step(&mut state, page(vec![put("1", 3, "h:1")], false, 10));
    step(&mut state, opened_event());
    let batch = || changes(vec![put("2", 11, "h:2"), delete("1", 11)], 11);
    assert!(step(&mut state, batch()));
    assert_eq!(state.action(), Action::Receive(&mut ()));
    assert_eq!(shown_instances(&mut state), ["2=h:2"]);
    assert!(!step(&mut state, batch()));
    assert_eq!(state.action(), Action::Receive(&mut ()));
    assert_eq!(shown_instances(&mut state), ["2=h:2"]);
}

#[test]
fn lost_watch_keeps_the_stale_snapshot_until_the_next_list() {
    let mut state = state();
    let listed = vec![put("1", 3, "h:1"), put("2", 3, "h:2")];
    step(&mut state, page(listed, false, 10));
    step(&mut state, opened_event());
    let kept = Arc::clone(state.snapshot().instances().next().unwrap());

    let first = SystemTime::UNIX_EPOCH;
    assert!(state.step(lost_event(), first));
    assert_eq!(state.action(), Action::Backoff);
    assert!(!step(&mut state, lost_event()));
    assert_eq!(state.action(), Action::Backoff);
    assert_eq!(shown_instances(&mut state), ["1=h:1", "2=h:2"]);
    let reason: Arc<str> = "cut".into();
    let since = first;
    assert_eq!(
        *state.snapshot().freshness(),
        Freshness::Stale { since, reason }
    );
    // The latest reason, since the loss.
    let reason: Arc<str> = "denied".into();
    let denied = Event::Lost {
        reason: reason.to_string(),
    };
    assert!(step(&mut state, denied));
    assert_eq!(
        *state.snapshot().freshness(),
        Freshness::Stale { since, reason }
    );

    assert!(!step(&mut state, Event::BackoffElapsed));
    assert!(matches!(
        state.action(),
        Action::List { revision: None, .. }
    ));
    step(&mut state, page(vec![put("1", 3, "h:1")], false, 20));
    assert_eq!(shown_instances(&mut state), ["1=h:1"]);
    let still_stale = state.snapshot().freshness().clone();
    assert!(matches!(still_stale, Freshness::Stale { since, .. } if since == first));
    step(&mut state, opened_event());
    assert!(state.snapshot().freshness().is_live());
    // The unchanged instance is the same allocation, so nobody reconnects to it.
    assert!(Arc::ptr_eq(
        &kept,
        state.snapshot().instances().next().unwrap()
    ));
}

#[test]
fn loss_between_pages_starts_the_list_over() {
    let mut state = state();
    step(&mut state, page(vec![put("1", 3, "h:1")], true, 10));
    step(&mut state, lost_event());
    step(&mut state, page(vec![put("2", 12, "h:2")], false, 12));
    assert_watches_from(&mut state, 13);
    assert_eq!(shown_instances(&mut state), ["2=h:2"]);
}

#[test]
fn restart_drops_the_watch_and_lists_without_a_backoff() {
    let mut state = state();
    step(&mut state, page(vec![put("1", 3, "h:1")], false, 10));
    step(&mut state, opened_event());
    state.restart("the task ended", SystemTime::UNIX_EPOCH);
    assert!(matches!(
        state.action(),
        Action::List { revision: None, .. }
    ));
    let (since, reason) = (SystemTime::UNIX_EPOCH, "the task ended".into());
    assert_eq!(
        *state.snapshot().freshness(),
        Freshness::Stale { since, reason }
    );
    assert_eq!(shown_instances(&mut state), ["1=h:1"]);
}

#[test]
fn undecodable_value_keeps_the_last_good_one() {
    let mut state = state();
    let listed = vec![put("1", 3, "h:1"), raw("2", 3, "nonsense")];
    step(&mut state, page(listed, false, 10));
    assert_eq!(shown_instances(&mut state), ["1=h:1"]);
    assert_eq!(state.snapshot().undecodable(), 1);
    step(&mut state, changes(vec![raw("1", 11, "nonsense")], 11));
    assert_eq!(shown_instances(&mut state), ["1=h:1"]);
    assert_eq!(state.snapshot().undecodable(), 2);
    // A re-list keeps it as well.
    step(&mut state, lost_event());
    let listed = vec![raw("1", 11, "nonsense"), put("2", 12, "h:2")];
    step(&mut state, page(listed, false, 12));
    assert_eq!(shown_instances(&mut state), ["1=h:1", "2=h:2"]);
    step(&mut state, changes(vec![delete("1", 13)], 13));
    assert_eq!(shown_instances(&mut state), ["2=h:2"]);
    assert_eq!(state.snapshot().undecodable(), 0);
}

#[test]
fn by_address_the_newest_key_of_an_address_counts() {
    let mut state = state().by_address();
    let zone = |id: &str, mod_revision, zone: &str| {
        let value = format!(r#"{{"Addr":"h:1","Metadata":{{"zone":"{zone}"}}}}"#);
        raw(id, mod_revision, &value)
    };
    let shown_zones = |state: &mut State| -> Vec<(String, Option<String>)> {
        let zone = |(key, instance): (&InstanceKey, &Arc<Instance>)| {
            (key.to_string(), instance.zone.clone())
        };
        state.snapshot().iter().map(zone).collect()
    };
    let at = |zone: &str| vec![("h:1".to_owned(), Some(zone.to_owned()))];
    let listed = vec![zone("1", 4, "new"), zone("2", 3, "old")];
    step(&mut state, page(listed, false, 10));
    assert_eq!(shown_zones(&mut state), at("new"));
    step(&mut state, changes(vec![zone("2", 11, "newer")], 11));
    assert_eq!(shown_zones(&mut state), at("newer"));
    // A loss before the next snapshot does not swallow the change.
    step(&mut state, changes(vec![delete("2", 12)], 12));
    step(&mut state, lost_event());
    assert_eq!(shown_zones(&mut state), at("new"));
    // The instance is gone with its last key.
    step(&mut state, changes(vec![delete("1", 13)], 13));
    assert_eq!(shown_zones(&mut state), []);
}

#[test]
fn instances_of_one_value_keep_their_keys() {
    let mut state = State::new(Arc::new(GoMicro), "services".into(), "a".into());
    let nodes = |mod_revision, ports: &[u16]| {
        // All nodes have one id, as careless writers do it.
        let node = |port| format!(r#"{{"id":"1","address":"h:{port}"}}"#);
        let nodes: Vec<String> = ports.iter().map(node).collect();
        let value = format!(r#"{{"nodes":[{}]}}"#, nodes.join(","));
        raw("1", mod_revision, &value)
    };
    let shown_keys = |state: &mut State| -> Vec<String> {
        let snapshot = state.snapshot();
        snapshot.iter().map(|(key, _)| key.to_string()).collect()
    };
    let (first, second) = ("services/a/1#h:1", "services/a/1#h:2");
    step(&mut state, page(vec![nodes(3, &[1])], false, 10));
    assert_eq!(shown_keys(&mut state), [first]);
    step(&mut state, changes(vec![nodes(11, &[2, 1])], 11));
    assert_eq!(shown_keys(&mut state), [first, second]);
    step(&mut state, changes(vec![nodes(12, &[2])], 12));
    assert_eq!(shown_keys(&mut state), [second]);
}

#[test]
fn recreated_key_has_no_last_good_value() {
    let recreated = |mod_revision| KeyValueAt {
        create_revision: mod_revision,
        ..raw("1", mod_revision, "nonsense")
    };
    let mut state = state();
    step(&mut state, page(vec![put("1", 3, "h:1")], false, 10));
    step(&mut state, lost_event());
    step(&mut state, page(vec![recreated(12)], false, 12));
    assert!(shown_instances(&mut state).is_empty());
    // The same holds for a key of another history.
    step(&mut state, changes(vec![put("2", 13, "h:2")], 13));
    step(&mut state, lost_event());
    step(&mut state, page(vec![raw("2", 3, "nonsense")], false, 4));
    assert!(shown_instances(&mut state).is_empty());
}

#[test]
fn wiped_etcd_is_followed_at_its_lower_revisions() {
    let mut state = state();
    step(&mut state, page(vec![put("1", 3, "h:1")], false, 10));
    step(&mut state, lost_event());
    step(&mut state, page(vec![put("1", 3, "h:9")], false, 4));
    assert_eq!(shown_instances(&mut state), ["1=h:9"]);
    assert_eq!(state.snapshot().revision(), 4);
    step(&mut state, changes(vec![put("2", 5, "h:2")], 5));
    assert_eq!(shown_instances(&mut state), ["1=h:9", "2=h:2"]);
}

#[test]
fn cached_instances_name_their_file_and_the_latest_failure() {
    let mut state = state();
    let since = SystemTime::UNIX_EPOCH;
    let cached = Snapshot {
        freshness: Freshness::Stale {
            since,
            reason: "read from a file".into(),
        },
        ..Snapshot::of("services/a/".into(), [])
    };
    state.restore(cached, "no response");
    let stale = |reason: &str| Freshness::Stale {
        since,
        reason: reason.into(),
    };
    let freshness = state.snapshot().freshness;
    assert_eq!(freshness, stale("read from a file: no response"));
    step(&mut state, lost_event());
    let freshness = state.snapshot().freshness;
    assert_eq!(freshness, stale("read from a file: cut"));
    // Listed instances are not those of the file.
    step(&mut state, page(Vec::new(), false, 10));
    step(&mut state, lost_event());
    let Freshness::Stale { since, reason } = state.snapshot().freshness else {
        panic!("the snapshot is live");
    };
    assert!(since > SystemTime::UNIX_EPOCH);
    assert_eq!(&*reason, "cut");
}
