use std::collections::BTreeSet;

use super::*;
use crate::record::Whom;

const THREE_MINUTES: Duration = Duration::from_secs(180);

fn all(schedule: &Schedule) -> impl Iterator<Item = &Planned> {
    let Schedule {
        members,
        paths,
        by_hand,
        servers,
    } = schedule;
    let paths = paths.iter().flatten();
    members.iter().chain(paths).chain(by_hand).chain(servers)
}

#[test]
fn a_seed_always_gives_the_same_schedule_and_another_one_another() {
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
        assert_eq!(kinds.len(), 7 + 4 + 4 + 3 + 3, "seed {seed}: {kinds:?}");
    }
}

#[test]
fn faults_of_a_lane_do_not_overlap_and_all_end_before_the_quiet_time() {
    for seed in 0..200 {
        let schedule = Schedule::new(seed, THREE_MINUTES);
        for planned in all(&schedule) {
            assert!(planned.at + planned.lasts <= THREE_MINUTES - QUIET);
        }
        let [clients, servers] = &schedule.paths;
        for lane in [&schedule.members, clients, servers, &schedule.by_hand] {
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
fn about_twenty_servers_are_there_throughout_and_each_ends_once() {
    for seed in 0..200 {
        let mut there: BTreeSet<Name> = Schedule::first_servers().into_iter().collect();
        for planned in &Schedule::new(seed, THREE_MINUTES).servers {
            match &planned.fault {
                Fault::KillServer(name, heir) | Fault::EndServer(name, heir) => {
                    assert!(there.remove(name), "seed {seed}: {name} is not there");
                    there.extend(heir);
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
fn the_shortest_run_has_faults() {
    for seed in 0..200 {
        assert!(
            all(&Schedule::new(seed, SHORTEST)).count() >= 3,
            "seed {seed}"
        );
    }
}

#[test]
fn a_minute_has_a_time_in_which_etcd_comes_to_rest() {
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
fn a_minute_has_a_server_that_is_asked_to_leave_with_nothing_in_its_way() {
    /// What undoing a fault may take, and leaving, of which a second is for draining.
    const UNDOING: Duration = Duration::from_secs(4);
    const LEAVING: Duration = Duration::from_secs(2);
    for seed in 0..200 {
        let schedule = Schedule::new(seed, Duration::from_secs(60));
        let is_in_the_way = |planned: &Planned, name: Name, at: Duration| {
            Whom::disturbed_by(&planned.fault).is_some_and(|whom| whom.has(name))
                && planned.at <= at + LEAVING
                && planned.at + planned.lasts + UNDOING >= at
        };
        let mut leaving = schedule.servers.iter().filter_map(|planned| {
            let Fault::EndServer(name, _) = planned.fault else {
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
fn a_third_of_the_servers_have_two_ids_and_no_two_servers_share_one() {
    let names = || Schedule::first_servers().into_iter();
    let twice = names().filter(|name| name.ids().count() == 2);
    assert_eq!(twice.count(), SERVERS.div_ceil(3));
    let ids: BTreeSet<String> = names()
        .flat_map(|name| [name, name.heir()])
        .flat_map(Name::ids)
        .collect();
    assert_eq!(ids.len(), 2 * (SERVERS + SERVERS.div_ceil(3)));
}
