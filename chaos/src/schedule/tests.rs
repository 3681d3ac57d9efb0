use std::collections::BTreeSet;

use super::*;
use crate::record::Scope;

const THREE_MINUTES: Duration = Duration::from_secs(180);

fn all(schedule: &Schedule) -> impl Iterator<Item = &Planned> {
    let Schedule {
        members,
        paths,
        manual_edits,
        servers,
    } = schedule;
    let paths = paths.iter().flatten();
    members
        .iter()
        .chain(paths)
        .chain(manual_edits)
        .chain(servers)
}

#[test]
fn seed_determines_the_schedule() {
    let schedule = Schedule::new(7, THREE_MINUTES);
    assert_eq!(schedule, Schedule::new(7, THREE_MINUTES));
    assert_ne!(schedule, Schedule::new(8, THREE_MINUTES));
}

#[test]
fn three_minutes_have_every_kind_of_fault() {
    for seed in 0..200 {
        let schedule = Schedule::new(seed, THREE_MINUTES);
        let kinds: BTreeSet<String> = all(&schedule)
            .map(|planned| match &planned.fault {
                Fault::Cut(path) | Fault::Blackhole(path) => {
                    let of_client = matches!(path, Path::Client(_));
                    let cut = matches!(planned.fault, Fault::Cut(_));
                    format!("path {of_client} {cut}")
                }
                Fault::CorruptKey(_, damage) => format!("{damage:?}"),
                fault => format!("{:?}", std::mem::discriminant(fault)),
            })
            .collect();
        assert_eq!(kinds.len(), 9 + 4 + 4 + 3 + 3, "seed {seed}: {kinds:?}");
    }
}

#[test]
fn faults_of_a_lane_do_not_overlap() {
    for seed in 0..200 {
        let schedule = Schedule::new(seed, THREE_MINUTES);
        for planned in all(&schedule) {
            assert!(planned.at + planned.lasts <= THREE_MINUTES - QUIET);
        }
        let [clients, servers] = &schedule.paths;
        for lane in [&schedule.members, clients, servers, &schedule.manual_edits] {
            for pair in lane.windows(2) {
                assert!(
                    pair[0].at + pair[0].lasts < pair[1].at,
                    "seed {seed}: {pair:?}"
                );
            }
        }
    }
}

#[test]
fn about_twenty_servers_run_throughout() {
    for seed in 0..200 {
        let mut there: BTreeSet<Name> = Schedule::first_servers().into_iter().collect();
        for planned in &Schedule::new(seed, THREE_MINUTES).servers {
            match &planned.fault {
                Fault::KillServer(name, successor) | Fault::TerminateServer(name, successor) => {
                    assert!(there.remove(name), "seed {seed}: {name} is not there");
                    there.extend(successor);
                }
                Fault::Join(names) => there.extend(names),
                other => panic!("{other} in the servers' lane"),
            }
            assert!((SERVERS..=MANY + 6).contains(&there.len()), "seed {seed}");
            let paths = there.iter().filter(|name| name.path().is_some());
            assert_eq!(paths.count(), SERVER_PATHS);
        }
    }
}

#[test]
fn shortest_run_has_faults() {
    for seed in 0..200 {
        assert!(
            all(&Schedule::new(seed, SHORTEST)).count() >= 3,
            "seed {seed}"
        );
    }
}

#[test]
fn each_minute_has_a_long_pause() {
    const REST: Duration = Duration::from_secs(8);
    for seed in 0..200 {
        let planned = Schedule::new(seed, Duration::from_secs(60)).members;
        let mut pauses = planned
            .windows(2)
            .map(|pair| pair[1].at - pair[0].at - pair[0].lasts);
        assert!(
            pauses.any(|pause| pause >= REST),
            "seed {seed}: {planned:?}"
        );
    }
}

#[test]
fn each_minute_has_an_undisturbed_shutdown() {
    /// Upper bounds for undoing a fault, and for leaving, of which 1 s is draining.
    const UNDOING: Duration = Duration::from_secs(4);
    const LEAVING: Duration = Duration::from_secs(2);
    for seed in 0..200 {
        let schedule = Schedule::new(seed, Duration::from_secs(60));
        let is_in_the_way = |planned: &Planned, name: Name, at: Duration| {
            Scope::of(&planned.fault).is_some_and(|scope| scope.includes(name))
                && planned.at <= at + LEAVING
                && planned.at + planned.lasts + UNDOING >= at
        };
        let mut leaving = schedule.servers.iter().filter_map(|planned| {
            let Fault::TerminateServer(name, _) = planned.fault else {
                return None;
            };
            Some((name, planned.at))
        });
        let judged = leaving
            .any(|(name, at)| !all(&schedule).any(|planned| is_in_the_way(planned, name, at)));
        assert!(judged, "seed {seed}: {schedule:?}");
    }
}

#[test]
fn a_third_of_the_servers_have_two_ids() {
    let names = || Schedule::first_servers().into_iter();
    let twice = names().filter(|name| name.ids().count() == 2);
    assert_eq!(twice.count(), SERVERS.div_ceil(3));
    let ids: BTreeSet<String> = names()
        .flat_map(|name| [name, name.successor()])
        .flat_map(Name::ids)
        .collect();
    assert_eq!(ids.len(), 2 * (SERVERS + SERVERS.div_ceil(3)));
}
