//! Of times of calm.

use super::*;
use crate::check::calm;
use crate::record::{Disturbance, Whom};
use crate::schedule::Path;

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
