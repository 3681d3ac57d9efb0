//! Of times of calm.

use super::*;
use crate::check::calm;
use crate::schedule::Path;

#[test]
fn a_server_that_is_not_registered_in_a_time_of_calm_is_found_although_it_is_later() {
    let id = NAMED.to_string();
    let right = "127.0.0.1:1000";
    let registered = || History::from(0.0).put(&id, right);
    // Deleted at 2 s.
    let back = |at: i64| registered().delete(&id).others(at).put(&id, right);
    let lost = |history: History, disturbances: &[Disturbance], life: Life| {
        calm::lost(&[life], &[history.0], disturbances, seconds(30.0)).violations
    };
    let by_hand = disturbed(Whom::Server(NAMED), 2.0, 2.0);
    let next = |whom, at| [by_hand, disturbed(whom, at, at + 1.0)];

    let found = lost(back(12), &next(Whom::Everybody, 8.0), life(None));
    assert_eq!(found.len(), 1);
    let said = "has no key services/chaos/s01-0, from 2.000 s to 7.000 s";
    assert!(found[0].contains(said), "{found:?}");
    let mine = Whom::Path(Path::Server(1));
    assert_eq!(lost(back(12), &next(mine, 8.0), life(None)).len(), 1);
    // It is back in the end of the calm, after more than 5 s.
    assert_eq!(lost(back(12), &[by_hand], life(None)).len(), 1);

    // Back in time, or with no time for that.
    assert_eq!(lost(back(6), &[by_hand], life(None)), [""; 0]);
    let soon = next(Whom::Everybody, 6.9);
    assert_eq!(lost(back(12), &soon, life(None)), [""; 0]);
    // What is done to others gives no time.
    let another = Whom::Path(Path::Server(2));
    assert_eq!(lost(back(12), &next(another, 6.9), life(None)).len(), 1);
    // It ended itself in between.
    let killed = life(Some((Ending::Killed, 6.0, 6.0)));
    assert_eq!(lost(back(12), &[by_hand], killed), [""; 0]);

    // It goes without anybody's doing, in a time of calm that it was right at the beginning of.
    let gone = registered().others(4).delete(&id);
    assert_eq!(lost(gone, &[by_hand], life(None)).len(), 1);
}

#[test]
fn the_second_key_of_a_server_is_not_forgotten() {
    let right = "127.0.0.1:1000";
    let mut twice = life(None);
    twice.name = TWICE;
    let one = || History::from(0.0).put("s00-0", right);
    let lost = |history: History| calm::lost(&[twice.clone()], &[history.0], &[], seconds(9.0));
    let found = lost(one()).violations;
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("s00-0-b"), "{found:?}");
    assert_eq!(lost(one().put("s00-0-b", right)).violations, [""; 0]);
}

#[test]
fn a_directory_that_is_apart_in_a_time_of_calm_is_found_although_it_converges_later() {
    // "a" at 1 s, "b" at 2 s.
    let epochs = [History::from(0.0).put("a", "h:1").put("b", "h:2").0];
    let first = || shown(1.1, 2, &[("a", "h:1")]);
    let second = |at| shown(at, 3, &[("a", "h:1"), ("b", "h:2")]);
    let apart = |shown: &[Shown], whom| {
        let next = disturbed(whom, 8.0, 9.0);
        calm::apart(0, shown, &epochs, &[next], seconds(13.0)).violations
    };
    let found = apart(&[first(), second(8.5)], Whom::Everybody);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("from 2.000 s to 7.000 s"), "{found:?}");
    assert!(
        found[0].contains("services/chaos/b is missing"),
        "{found:?}"
    );
    let mine = Whom::Path(Path::Client(0));
    assert_eq!(apart(&[first(), second(8.5)], mine).len(), 1);

    assert_eq!(apart(&[first(), second(6.9)], Whom::Everybody), [""; 0]);
}

#[test]
fn a_directory_that_agreed_in_a_time_of_calm_and_then_fell_silent_is_found() {
    // "a" at 1 s, "b" at 6 s, in a time of calm from 2 s on.
    let epochs = [History::from(0.0)
        .put("a", "h:1")
        .others(6)
        .put("b", "h:2")
        .0];
    let others = [("other", "h:1"), ("a", "h:1")];
    let first = || shown(5.1, 6, &others);
    let apart = |shown: &[Shown], until| {
        let faults = [
            disturbed(Whom::Everybody, 1.0, 2.0),
            disturbed(Whom::Everybody, until, 30.0),
        ];
        calm::apart(0, shown, &epochs, &faults, seconds(30.0)).violations
    };
    let found = apart(&[first()], 12.0);
    assert_eq!(found.len(), 1);
    assert!(found[0].contains("from 6.000 s to 11.000 s"), "{found:?}");
    // As soon as it shows the change, at whatever time within five seconds; or the calm is over before.
    let second = shown(10.9, 7, &[("other", "h:1"), ("a", "h:1"), ("b", "h:2")]);
    assert_eq!(apart(&[first(), second], 12.0), [""; 0]);
    assert_eq!(apart(&[first()], 10.9), [""; 0]);
}

#[test]
fn how_often_was_looked_is_counted_and_never_is_too_little_for_a_minute() {
    let epochs = [History::from(0.0).put("a", "h:1").others(6).0];
    let shown = [shown(0.5, 1, &[])];
    let windows = |disturbances: &[Disturbance]| {
        let judged = calm::apart(0, &shown, &epochs, disturbances, seconds(20.0));
        (judged.until(seconds(20.0)), judged.until(seconds(7.0)))
    };
    // From 0.5 s on, and after each of the changes at 1 s to 5 s; two of these ended by 7 s.
    assert_eq!(windows(&[]), (6, 3));
    // The machine stood still too often.
    let stalls = [4.0, 8.0, 12.0, 16.0].map(|at| disturbed(Whom::Everybody, at, at + 1.0));
    assert_eq!(windows(&stalls), (0, 0));

    let said = |seconds, [directories, registrations, leavings]: [usize; 3]| {
        let looks = Looks {
            directories,
            registrations,
            leavings,
        };
        too_little(Duration::from_secs(seconds), looks).is_some()
    };
    assert!(said(60, [0, 9, 9]) && said(60, [9, 0, 9]) && said(60, [9, 9, 0]));
    assert!(!said(60, [1, 1, 1]));
    // There may be no such time in a short run.
    assert!(!said(59, [0, 0, 0]));
}
