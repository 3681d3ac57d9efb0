//! A checker that cannot fail is worth nothing: each kind of violation, made up, is found; and what
//! only looks like one is not.

use super::*;
use crate::record::{Disturbance, SERVICE, Whom};
use crate::schedule::{Name, Path};

const TTL: Duration = Duration::from_secs(3);

const NAMED: Name = Name { place: 0, turn: 0 };

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn key(id: &str) -> String {
    range() + id
}

fn value(address: &str) -> Option<Vec<u8>> {
    Some(format!(r#"{{"Op":0,"Addr":"{address}"}}"#).into())
}

/// A history in which each change is of the next revision, from 2 on, a second after the other.
#[derive(Default)]
struct History(Epoch);

impl History {
    fn from(began: f64) -> Self {
        Self(Epoch {
            began: seconds(began),
            known_to: 1,
            ..Epoch::default()
        })
    }

    fn change(mut self, id: &str, value: Option<Vec<u8>>, lease: i64) -> Self {
        let epoch = &mut self.0;
        epoch.known_to += 1;
        let before = epoch.changes.iter().rfind(|change| change.key == key(id));
        let created = before.filter(|before| before.value.is_some());
        epoch.changes.push(Change {
            at: epoch.began + seconds((epoch.known_to - 1) as f64),
            revision: epoch.known_to,
            key: key(id),
            create_revision: created.map_or(epoch.known_to, |before| before.create_revision),
            lease,
            value,
        });
        self
    }

    fn put(self, id: &str, address: &str) -> Self {
        self.change(id, value(address), 7)
    }

    fn garbage(self, id: &str) -> Self {
        self.change(id, Some(b"garbage".to_vec()), 0)
    }

    fn delete(self, id: &str) -> Self {
        self.change(id, None, 0)
    }

    fn wiped(mut self, at: f64, whole: bool) -> Self {
        self.0.ended = Some(seconds(at));
        self.0.whole = whole;
        self
    }
}

fn shown(at: f64, revision: i64, instances: &[(&str, &str)]) -> Shown {
    let picture = instances.iter().map(|(id, address)| {
        let instance = Instance::new(SERVICE, *address).id(*id);
        (key(id), Arc::new(instance))
    });
    Shown {
        at: seconds(at),
        revision,
        picture: picture.collect(),
    }
}

fn divergences(shown: &[Shown], epochs: Vec<History>) -> Vec<String> {
    let epochs: Vec<Epoch> = epochs.into_iter().map(|history| history.0).collect();
    directory(0, shown, &epochs).divergences
}

fn one_history() -> History {
    History::from(0.0)
        .put("a", "h:1")
        .put("b", "h:2")
        .delete("a")
        .put("a", "h:3")
}

#[test]
fn states_that_were_in_order_are_no_divergence_repeated_and_skipped_ones_included() {
    let shown = [
        shown(0.0, 1, &[]),
        shown(1.0, 2, &[("a", "h:1")]),
        shown(1.5, 2, &[("a", "h:1")]),
        shown(4.0, 4, &[("b", "h:2")]),
        shown(9.0, 5, &[("a", "h:3"), ("b", "h:2")]),
    ];
    assert_eq!(divergences(&shown, vec![one_history()]), [""; 0]);
}

#[test]
fn a_missing_a_superfluous_and_a_wrong_instance_are_each_found() {
    for (picture, said) in [
        (vec![("a", "h:1")], "services/chaos/b is missing"),
        (
            vec![("a", "h:1"), ("b", "h:2"), ("c", "h:9")],
            "services/chaos/c should not be there",
        ),
        (
            vec![("a", "h:1"), ("b", "h:8")],
            "services/chaos/b is shown at h:8",
        ),
    ] {
        let found = divergences(&[shown(3.0, 3, &picture)], vec![one_history()]);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("revision 3"), "{found:?}");
        assert!(found[0].contains(said), "{found:?}");
    }
}

#[test]
fn a_right_picture_under_a_wrong_revision_is_found() {
    let found = divergences(
        &[shown(3.0, 4, &[("a", "h:1"), ("b", "h:2")])],
        vec![one_history()],
    );
    assert_eq!(found.len(), 1);
}

#[test]
fn going_back_in_revision_is_found() {
    let back = [
        shown(3.0, 3, &[("a", "h:1"), ("b", "h:2")]),
        shown(4.0, 2, &[("a", "h:1")]),
    ];
    let found = divergences(&back, vec![one_history()]);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("back from revision 3"), "{found:?}");
}

#[test]
fn a_revision_that_etcd_never_had_is_found() {
    let picture = [("a", "h:3"), ("b", "h:2")];
    let found = divergences(&[shown(9.0, 6, &picture)], vec![one_history()]);
    assert!(found[0].contains("history 0 ends at 5"), "{found:?}");
}

#[test]
fn after_a_wipe_the_revision_may_fall_once_and_not_before_the_wipe() {
    let histories = || {
        vec![
            one_history().wiped(10.0, true),
            History::from(10.0).put("a", "h:4"),
        ]
    };
    let old = |at| shown(at, 5, &[("a", "h:3"), ("b", "h:2")]);
    let new = |at| shown(at, 2, &[("a", "h:4")]);
    assert_eq!(divergences(&[old(9.0), new(12.0)], histories()), [""; 0]);
    // A directory that was cut off shows the old one for longer.
    assert_eq!(
        divergences(&[old(9.0), old(20.0), new(21.0)], histories()),
        [""; 0]
    );
    assert_eq!(divergences(&[old(9.0), new(9.5)], histories()).len(), 1);
    assert_eq!(
        divergences(&[old(9.0), new(12.0), old(13.0)], histories()).len(),
        1
    );
}

#[test]
fn a_mixture_of_two_histories_is_found() {
    let first = one_history().wiped(10.0, true);
    let second = History::from(10.0)
        .put("x", "h:5")
        .put("x", "h:6")
        .put("x", "h:7")
        .put("x", "h:8")
        .put("x", "h:9");
    // What a watch shows that goes on, from the old state, where the new history has got to.
    let mixed = shown(16.0, 6, &[("a", "h:3"), ("b", "h:2"), ("x", "h:9")]);
    let old = shown(9.0, 5, &[("a", "h:3"), ("b", "h:2")]);
    let found = divergences(&[old, mixed], vec![first, second]);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].contains("history 1: services/chaos/a should not be there"),
        "{found:?}"
    );
}

#[test]
fn beyond_the_known_end_of_a_wiped_history_is_unjudged_only_if_the_end_is_not_certain() {
    let late = [shown(9.9, 6, &[("c", "h:1")])];
    for (whole, divergences, unjudged) in [(true, 1, 0), (false, 0, 1)] {
        let epochs = [one_history().wiped(10.0, whole).0, History::from(10.0).0];
        let verdict = directory(0, &late, &epochs);
        assert_eq!(verdict.divergences.len(), divergences);
        assert_eq!(verdict.unjudged, unjudged);
    }
}

#[test]
fn a_damaged_value_may_show_what_the_same_key_was_and_nothing_else() {
    let history = || {
        vec![
            History::from(0.0)
                .put("a", "h:1")
                .delete("a")
                .put("a", "h:2")
                .put("a", "h:3")
                .garbage("a"),
        ]
    };
    for allowed in [&[][..], &[("a", "h:2")], &[("a", "h:3")]] {
        assert_eq!(divergences(&[shown(9.0, 6, allowed)], history()), [""; 0]);
    }
    let before_it_was_deleted = shown(9.0, 6, &[("a", "h:1")]);
    assert_eq!(divergences(&[before_it_was_deleted], history()).len(), 1);
}

fn life(end: Option<(Ending, f64, f64)>) -> Life {
    Life {
        name: NAMED,
        address: "127.0.0.1:1000".to_owned(),
        started: Duration::ZERO,
        end: end.map(|(how, signalled, gone)| End {
            how,
            signalled: seconds(signalled),
            gone: seconds(gone),
        }),
    }
}

fn failure(begun: f64, ended: f64, message: &str) -> Failure {
    Failure {
        client: 0,
        begun: seconds(begun),
        ended: seconds(ended),
        status: message.to_owned(),
        sent_to: sent_to(message),
    }
}

#[test]
fn a_call_may_fail_only_in_flight_on_a_server_that_was_killed() {
    let killed = [life(Some((Ending::Killed, 5.0, 5.01)))];
    let lost = "127.0.0.1:1000: connection lost: broken pipe";
    assert!(is_allowed(&failure(4.9, 5.02, lost), &killed));
    // Sent before its end was noticed.
    assert!(is_allowed(&failure(5.2, 5.3, lost), &killed));

    // It had ended long before.
    assert!(!is_allowed(&failure(5.3, 5.31, lost), &killed));
    // It failed before the server was killed.
    assert!(!is_allowed(&failure(4.8, 4.9, lost), &killed));
    // It was in flight elsewhere.
    let elsewhere = "127.0.0.1:2000: connection lost: broken pipe";
    assert!(!is_allowed(&failure(4.9, 5.02, elsewhere), &killed));
    // It was never sent.
    let nowhere = "no instances under services/chaos/ (waited 5s)";
    assert!(!is_allowed(&failure(4.9, 5.02, nowhere), &killed));
    // The server was asked to leave, or is still there.
    let left = [life(Some((Ending::Left, 5.0, 6.0)))];
    assert!(!is_allowed(&failure(4.9, 5.02, lost), &left));
    assert!(!is_allowed(&failure(4.9, 5.02, lost), &[life(None)]));
}

#[test]
fn where_a_call_was_sent_is_read_from_the_beginning_of_its_message() {
    let told = sent_to("127.0.0.1:1000: connection lost: reset");
    assert_eq!(told.as_deref(), Some("127.0.0.1:1000"));
    assert_eq!(
        sent_to("2 instances under services/chaos/: 127.0.0.1:1: refused"),
        None
    );
    assert_eq!(
        sent_to("the call's time of 10s is over, without an answer"),
        None
    );
}

#[test]
fn a_server_that_lives_and_is_not_registered_as_it_should_be_is_found() {
    let id = NAMED.to_string();
    let lives = [life(None)];
    let right = || History::from(0.0).put(&id, "127.0.0.1:1000");
    assert_eq!(lost(&lives, &right().0.changes), [""; 0]);

    for (history, said) in [
        (History::from(0.0), "has no key"),
        (right().delete(&id), "has no key"),
        (right().garbage(&id), "its key has garbage"),
        (
            right().put(&id, "127.0.0.1:1"),
            "its key has {\"Op\":0,\"Addr\":\"127.0.0.1:1\"}",
        ),
        (
            right().change(&id, value("127.0.0.1:1000"), 0),
            "has no lease",
        ),
    ] {
        let found = lost(&lives, &history.0.changes);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains(said), "{said} in {found:?}");
    }
    let dead = [life(Some((Ending::Killed, 0.0, 0.0)))];
    assert_eq!(lost(&dead, &[]), [""; 0]);
}

/// The ghosts of a server that was killed at 1 s, when its last look was taken at 60 s.
fn ghosts_of(history: History, extensions: &[(f64, Option<Path>)]) -> Vec<String> {
    let lives = [life(Some((Ending::Killed, 1.0, 1.0)))];
    let extensions: Vec<Extension> = extensions
        .iter()
        .map(|(at, path)| Extension {
            at: seconds(*at),
            path: *path,
        })
        .collect();
    ghosts(&lives, &[history.0], &extensions, TTL, seconds(60.0))
}

#[test]
fn a_key_that_outlives_its_server_by_more_than_its_lease_is_found() {
    let id = NAMED.to_string();
    let registered = || History::from(0.0).put(&id, "127.0.0.1:1000");
    // Deleted at 2 s, in time.
    assert_eq!(ghosts_of(registered().delete(&id), &[]), [""; 0]);
    // Never deleted.
    let found = ghosts_of(registered(), &[]);
    assert!(found[0].contains("is there at 60.000 s"), "{found:?}");
    // Deleted at 10 s, too late.
    let late = (0..7).fold(registered(), |history, _| history.put("other", "h:1"));
    let found = ghosts_of(late.put("other", "h:2").delete(&id), &[]);
    assert!(found[0].contains("was there until 10.000 s"), "{found:?}");
}

#[test]
fn a_lease_that_a_new_leader_has_extended_may_last_longer_and_only_that_one() {
    let id = NAMED.to_string();
    let late = |until: i64| {
        let mut history = History::from(0.0).put(&id, "127.0.0.1:1000");
        while history.0.known_to < until {
            history = history.put("other", "h:1");
        }
        history.delete(&id)
    };
    // Deleted at 10 s; without an extension it would have to go by 7 s.
    assert_eq!(ghosts_of(late(10), &[]).len(), 1);
    assert_eq!(ghosts_of(late(10), &[(5.0, None)]), [""; 0]);
    assert_eq!(
        ghosts_of(late(10), &[(5.0, Some(Path::Server(0)))]),
        [""; 0]
    );
    // Not before its end, not on another path, and not when it had to be gone already.
    assert_eq!(ghosts_of(late(10), &[(0.5, None)]).len(), 1);
    assert_eq!(
        ghosts_of(late(10), &[(5.0, Some(Path::Server(1)))]).len(),
        1
    );
    assert_eq!(ghosts_of(late(10), &[(7.5, None)]).len(), 1);
}

#[test]
fn a_key_that_a_hand_has_taken_off_its_lease_is_nobodys_ghost() {
    let id = NAMED.to_string();
    let by_hand = History::from(0.0).put(&id, "127.0.0.1:1000").garbage(&id);
    assert_eq!(ghosts_of(by_hand, &[]), [""; 0]);
}

#[test]
fn whether_a_dead_server_is_still_there_is_told() {
    let id = NAMED.to_string();
    let lives = [life(Some((Ending::Killed, 1.0, 1.0)))];
    let registered = History::from(0.0).put(&id, "127.0.0.1:1000");
    assert!(any_dead(&lives, &registered.0.changes));
    assert!(!any_dead(&lives, &registered.delete(&id).0.changes));
}

#[test]
fn a_directory_that_has_not_converged_is_told_what_differs() {
    let changes = one_history().0.changes;
    let truth = shown(9.0, 5, &[("a", "h:3"), ("b", "h:2")]);
    assert_eq!(differences_now(&changes, &truth.picture), [""; 0]);
    let behind = shown(9.0, 4, &[("b", "h:2")]);
    let found = differences_now(&changes, &behind.picture);
    assert_eq!(found, ["services/chaos/a is missing"]);
}

/// Nothing was done but this.
fn disturbed(whom: Whom, from: f64, to: f64) -> Disturbance {
    Disturbance {
        from: seconds(from),
        to: seconds(to),
        whom,
    }
}

#[test]
fn a_server_that_is_not_registered_in_a_time_of_calm_is_found_although_it_is_later() {
    let id = NAMED.to_string();
    let right = "127.0.0.1:1000";
    // Registered at 1 s, deleted at 2 s, registered again at 12 s.
    let mut history = History::from(0.0).put(&id, right).delete(&id);
    while history.0.known_to < 12 {
        history = history.put("other", "h:1");
    }
    let epochs = [history.put(&id, right).0];
    let lost = |disturbances: &[Disturbance], life: Life| {
        calm::lost(&[life], &epochs, disturbances, seconds(30.0))
    };
    let by_hand = disturbed(Whom::Server(NAMED), 2.0, 2.0);
    let next = |whom, at| [by_hand, disturbed(whom, at, at + 1.0)];

    let found = lost(&next(Whom::Everybody, 8.0), life(None));
    assert_eq!(found.len(), 1);
    assert!(
        found[0].contains("has no key, from 3.000 s to 8.000 s"),
        "{found:?}"
    );
    let mine = Whom::Path(Path::Server(0));
    assert_eq!(lost(&next(mine, 8.0), life(None)).len(), 1);

    // Back in time, before the calm was over, or before it began.
    assert_eq!(lost(&next(Whom::Everybody, 13.0), life(None)), [""; 0]);
    assert_eq!(lost(&next(Whom::Everybody, 6.9), life(None)), [""; 0]);
    // It was done to others.
    let another = Whom::Path(Path::Server(1));
    assert_eq!(lost(&next(another, 8.0), life(None)), [""; 0]);
    // It ended itself in between.
    let killed = life(Some((Ending::Killed, 6.0, 6.0)));
    assert_eq!(lost(&[by_hand], killed), [""; 0]);
}

#[test]
fn a_directory_that_is_apart_in_a_time_of_calm_is_found_although_it_converges_later() {
    // "a" at 1 s, "b" at 2 s.
    let epochs = [History::from(0.0).put("a", "h:1").put("b", "h:2").0];
    let first = || shown(1.1, 2, &[("a", "h:1")]);
    let second = |at| shown(at, 3, &[("a", "h:1"), ("b", "h:2")]);
    let apart = |shown: &[Shown], whom| {
        let next = disturbed(whom, 8.0, 9.0);
        calm::apart(0, shown, &epochs, &[next], seconds(13.0))
    };
    let found = apart(&[first(), second(8.5)], Whom::Everybody);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("from 3.000 s to 8.000 s"), "{found:?}");
    assert!(
        found[0].contains("services/chaos/b is missing"),
        "{found:?}"
    );
    let mine = Whom::Path(Path::Client(0));
    assert_eq!(apart(&[first(), second(8.5)], mine).len(), 1);

    assert_eq!(apart(&[first(), second(7.9)], Whom::Everybody), [""; 0]);
    let another = Whom::Path(Path::Client(1));
    assert_eq!(apart(&[first(), second(8.5)], another), [""; 0]);
}
