//! The queue in simulated time, with look-ups that hang.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::history::Found;
use super::queue::{ChannelId, Job, Joined, OF_CHANNEL, OF_PROCESS, Queue};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// How long a look-up hangs: glibc's default with one name server.
const HANG: Duration = Duration::from_secs(10);

type Caller = watch::Receiver<Option<Found>>;

/// A process in simulated time. Names that start with `hang` fail after [`HANG`], those that start
/// with `slow` are found after 3 s, and others after 5 ms. Names that start with `service` may hang
/// from some time on.
struct Process {
    queue: Queue,
    epoch: Instant,
    /// The time since the epoch.
    now: Duration,
    /// The running look-ups by the time at which they end, and a number.
    running: BTreeMap<(Duration, usize), Job>,
    /// When each name started last.
    starts: HashMap<Arc<str>, Duration>,
    count: usize,
    services_hang: bool,
}

impl Process {
    fn new() -> Self {
        Self {
            queue: Queue::default(),
            epoch: Instant::now(),
            now: Duration::ZERO,
            running: BTreeMap::new(),
            starts: HashMap::new(),
            count: 0,
            services_hang: false,
        }
    }

    fn join(&mut self, host: &str, channel: ChannelId) -> Joined {
        let joined = self.queue.join(host, channel, self.epoch + self.now);
        self.start();
        joined
    }

    /// A caller of a name that has to wait for the result.
    fn caller(&mut self, host: &str, channel: ChannelId) -> Caller {
        match self.join(host, channel) {
            Joined::Pending(caller) => caller,
            Joined::Found(_) => panic!("{host} has unclaimed addresses"),
        }
    }

    /// Callers of 1,000 names that hang.
    fn flood(&mut self, channel: ChannelId) -> Vec<Caller> {
        let names = (0..1_000).map(|n| format!("hang-{n}.{channel:?}"));
        names.map(|name| self.caller(&name, channel)).collect()
    }

    fn hangs(&self, host: &str) -> bool {
        host.starts_with("hang") || (host.starts_with("service") && self.services_hang)
    }

    fn start(&mut self) {
        while let Some(job) = self.queue.start_next(self.epoch + self.now) {
            let takes = match &*job.host {
                host if self.hangs(host) => HANG,
                host if host.starts_with("slow") => 3 * SECOND,
                _ => 5 * MILLISECOND,
            };
            self.starts.insert(Arc::clone(&job.host), self.now);
            self.count += 1;
            self.running.insert((self.now + takes, self.count), job);
        }
        assert!(self.running.len() <= OF_PROCESS[0]);
    }

    /// Lets time pass.
    fn advance(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(first) = self
            .running
            .first_entry()
            .filter(|job| job.key().0 <= until)
        {
            let ((at, _), job) = first.remove_entry();
            self.now = at;
            let found = match self.hangs(&job.host) {
                true => Err("timed out".into()),
                false => Ok([([10, 0, 0, 1], 0).into()].into()),
            };
            let result = self.queue.finish(&job, &found, self.epoch + self.now);
            if let Some(result) = result {
                result.send_replace(Some(found));
            }
            self.start();
        }
        self.now = until;
    }

    /// How long a name waits for a thread that a caller wants now.
    fn wait_of(&mut self, host: &str, channel: ChannelId) -> Duration {
        let begun = self.now;
        let caller = self.caller(host, channel);
        while self.queue.is_waiting(host) {
            self.advance(MILLISECOND);
        }
        let waited = self.starts[host] - begun;
        while caller.borrow().is_none() {
            self.advance(MILLISECOND);
        }
        waited
    }
}

#[test]
fn quick_name_waits_for_no_hanging_names() {
    let mut process = Process::new();
    let channels = [(); 3].map(|()| process.queue.add_channel());
    process.wait_of("quick", channels[0]);
    let _callers = channels.map(|channel| process.flood(channel));
    while process.now < 600 * SECOND {
        assert_eq!(process.wait_of("quick", channels[0]), Duration::ZERO);
        process.advance(1_700 * MILLISECOND);
    }
}

/// As etcd's names, which have a channel of their own.
#[test]
fn new_names_of_another_channel_wait_not_at_all() {
    let mut process = Process::new();
    let [services, etcd] = [(); 2].map(|()| process.queue.add_channel());
    let _callers = process.flood(services);
    for n in 0..200 {
        assert_eq!(process.wait_of(&format!("etcd-{n}"), etcd), Duration::ZERO);
        process.advance(777 * MILLISECOND);
    }
}

/// Twelve names of twelve channels are looked up in the time of one.
#[test]
fn new_name_waits_one_turn_if_many_channels_hang() {
    let mut process = Process::new();
    let callers: Vec<_> = (0..24)
        .map(|_| {
            let channel = process.queue.add_channel();
            process.flood(channel)
        })
        .collect();
    process.advance(1_000 * SECOND);
    let etcd = process.queue.add_channel();
    let waited = process.wait_of("etcd", etcd);
    assert!(waited <= 3 * HANG, "{waited:?}");
    drop(callers);
}

#[test]
fn new_name_behind_new_ones_waits_for_its_turn() {
    let mut process = Process::new();
    let channel = process.queue.add_channel();
    let callers = process.flood(channel);
    // 1,000 names, 8 at a time.
    assert_eq!(process.wait_of("new", channel), 125 * HANG);
    // All of them have failed and are wanted again.
    drop(callers);
    let _callers = process.flood(channel);
    assert_eq!(process.wait_of("other", channel), Duration::ZERO);
}

#[test]
fn hanging_quick_names_leave_threads_to_other_channels() {
    let mut process = Process::new();
    let [services, etcd] = [(); 2].map(|()| process.queue.add_channel());
    let names: Vec<String> = (0..100).map(|n| format!("service-{n}")).collect();
    for name in &names {
        process.wait_of(name, services);
    }
    process.services_hang = true;
    let _callers: Vec<_> = names
        .iter()
        .map(|name| process.caller(name, services))
        .collect();
    assert_eq!(process.running.len(), OF_CHANNEL[0]);
    while process.now < 500 * SECOND {
        assert_eq!(process.wait_of("etcd", etcd), Duration::ZERO);
        process.advance(700 * MILLISECOND);
    }
}

#[test]
fn callers_that_time_out_do_not_lose_the_turn() {
    let mut process = Process::new();
    let channel = process.queue.add_channel();
    let _callers = process.flood(channel);
    let begun = process.now;
    let mut later = Vec::new();
    // Connect timeout 5 s, backoff 30 s; and ever more new names.
    let found = loop {
        match process.join("new", channel) {
            Joined::Found(found) => break found,
            Joined::Pending(caller) => {
                process.advance(5 * SECOND);
                assert!(caller.borrow().is_none());
            }
        }
        later.extend(process.flood(channel));
        let name = format!("hang-at-{:?}", process.now);
        later.push(process.caller(&name, channel));
        process.advance(25 * SECOND);
    };
    assert_eq!(found.len(), 1);
    assert_eq!(process.starts["new"] - begun, 125 * HANG);
    assert!(process.now - begun <= 125 * HANG + 30 * SECOND);
    // The addresses were for one caller.
    assert!(matches!(process.join("new", channel), Joined::Pending(_)));
}

#[test]
fn long_abandoned_name_is_not_looked_up() {
    let mut process = Process::new();
    let channel = process.queue.add_channel();
    let _callers = process.flood(channel);
    drop(process.caller("abandoned", channel));
    let wanted = process.caller("wanted", channel);
    process.advance(1_251 * SECOND);
    assert!(wanted.borrow().is_some());
    assert!(!process.starts.contains_key("abandoned"));
    assert!(process.queue.is_empty());
}

#[test]
fn unclaimed_addresses_are_kept_a_minute() {
    let mut process = Process::new();
    let channel = process.queue.add_channel();
    drop(process.caller("slow", channel));
    process.advance(62 * SECOND);
    assert!(matches!(process.join("slow", channel), Joined::Found(_)));
    drop(process.caller("slow", channel));
    process.advance(64 * SECOND);
    assert!(matches!(process.join("slow", channel), Joined::Pending(_)));
}

#[test]
fn failing_names_leave_threads_to_new_ones() {
    let mut process = Process::new();
    let channel = process.queue.add_channel();
    let names: Vec<String> = (0..50).map(|n| format!("hang-{n}")).collect();
    for name in &names {
        process.wait_of(name, channel);
    }
    let _callers: Vec<_> = names
        .iter()
        .map(|name| process.caller(name, channel))
        .collect();
    assert_eq!(process.running.len(), OF_CHANNEL[2]);
    assert_eq!(process.wait_of("new", channel), Duration::ZERO);
    // A slow name is no failing one.
    process.wait_of("slow", channel);
    assert_eq!(process.wait_of("slow", channel), Duration::ZERO);
}

#[test]
fn name_of_two_channels_is_looked_up_once() {
    let mut process = Process::new();
    let [services, other] = [(); 2].map(|()| process.queue.add_channel());
    let _callers = process.flood(services);
    let of_services = process.caller("shared", services);
    assert!(process.queue.is_waiting("shared"));
    let count = process.count;
    let of_other = process.caller("shared", other);
    process.advance(5 * MILLISECOND);
    assert!(of_services.borrow().is_some() && of_other.borrow().is_some());
    process.advance(2_000 * SECOND);
    assert_eq!(process.count, count + 1 + 1_000 - OF_CHANNEL[1]);
}

#[test]
fn dropped_channel_takes_its_names_along() {
    let mut process = Process::new();
    let [services, other] = [(); 2].map(|()| process.queue.add_channel());
    let callers = process.flood(services);
    let of_other = process.caller("hang-999.ChannelId(1)", other);
    drop(callers);
    process.queue.remove_channel(services);
    process.advance(2_000 * SECOND);
    assert_eq!(process.count, OF_CHANNEL[1] + 1);
    assert!(of_other.borrow().is_some());
    assert!(process.queue.is_empty());
}

/// Random joins, drops and ends leave nothing behind, and room is never left unused.
#[test]
fn queue_ends_empty_after_random_use() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut process = Process::new();
        let channels = [(); 4].map(|()| process.queue.add_channel());
        let mut callers = Vec::new();
        for _ in 0..2_000 {
            let kind = ["hang", "slow", "quick"][random.usize(..3)];
            let name = format!("{kind}-{}", random.u32(..60));
            if let Joined::Pending(caller) = process.join(&name, channels[random.usize(..4)]) {
                callers.push(caller);
            }
            if random.u32(..4) == 0 {
                callers.swap_remove(random.usize(..callers.len()));
            }
            process.advance(random.u32(..200) * MILLISECOND);
        }
        process.queue.remove_channel(channels[0]);
        process.advance(3_600 * SECOND);
        assert!(process.queue.is_empty(), "seed {seed}");
    }
}
