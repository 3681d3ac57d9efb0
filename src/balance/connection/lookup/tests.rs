//! The queue in simulated time, and the look-ups on real threads, with resolvers that hang.

use std::collections::{BTreeMap, HashMap};
use std::sync::Condvar;
use std::time::Duration;

use super::queue::LIMITS;
use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// How long a look-up hangs: glibc's default with one name server.
const HANG: Duration = Duration::from_secs(10);

/// A process in simulated time. Names that start with `hang` fail after [`HANG`], those that start
/// with `slow` are found after 6 s, and others after 5 ms. Names that start with `service` may hang
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

    fn join(&mut self, host: &str) -> Caller {
        let caller = self.queue.join(host, self.epoch + self.now);
        self.start();
        caller
    }

    fn join_all(&mut self, prefix: &str, count: usize) -> Vec<Caller> {
        let names = (0..count).map(|n| format!("{prefix}-{n}"));
        names.map(|name| self.join(&name)).collect()
    }

    /// Looks up names to the end.
    fn look_up_all(&mut self, prefix: &str, count: usize) {
        let _callers = self.join_all(prefix, count);
        while !self.queue.is_empty() {
            self.advance(SECOND);
        }
    }

    fn takes(&self, host: &str) -> Duration {
        match host {
            _ if host.starts_with("hang") => HANG,
            _ if host.starts_with("service") && self.services_hang => HANG,
            _ if host.starts_with("slow") => 6 * SECOND,
            _ => 5 * MILLISECOND,
        }
    }

    /// Starts a look-up as a join and the end of a look-up do. No second one may have room.
    fn start(&mut self) {
        let Some(job) = self.queue.start_next(self.epoch + self.now) else {
            return;
        };
        self.starts.insert(Arc::clone(&job.host), self.now);
        self.count += 1;
        let end = self.now + self.takes(&job.host);
        self.running.insert((end, self.count), job);
        assert!(self.queue.start_next(self.epoch + self.now).is_none());
        assert!(self.running.len() <= LIMITS[0]);
    }

    /// Lets time pass.
    fn advance(&mut self, time: Duration) {
        let until = self.now + time;
        while let Some(first) = self.running.first_entry()
            && first.key().0 <= until
        {
            let ((at, _), job) = first.remove_entry();
            self.now = at;
            let took = at - self.starts[&job.host];
            let found = match took == HANG {
                true => Err("timed out".into()),
                false => Ok([([10, 0, 0, 1], 0).into()].into()),
            };
            let rank = Rank::after(&found, took);
            let now = self.epoch + self.now;
            self.queue.finish(&job, &found, rank, now);
            job.result.send_replace(Some(found));
            self.start();
        }
        self.now = until;
    }

    /// How long a name waits for a thread that a caller wants now. Returns at the look-up's end.
    fn wait_of(&mut self, host: &str) -> Duration {
        let begun = self.now;
        let caller = self.join(host);
        while caller.borrow().is_none() {
            self.advance(MILLISECOND);
        }
        self.starts[host] - begun
    }
}

#[test]
fn quick_name_waits_for_no_hanging_names() {
    let mut process = Process::new();
    process.wait_of("quick");
    let _callers = process.join_all("hang", 1_000);
    while process.now < 1_000 * SECOND {
        assert_eq!(process.wait_of("quick"), Duration::ZERO);
        process.advance(1_700 * MILLISECOND);
    }
}

#[test]
fn new_name_waits_for_no_failing_names() {
    let mut process = Process::new();
    process.look_up_all("hang", 50);
    let _callers = process.join_all("hang", 50);
    assert_eq!(process.running.len(), LIMITS[2]);
    assert_eq!(process.wait_of("new"), Duration::ZERO);
    // A slow name is no failing one.
    process.wait_of("slow");
    assert_eq!(process.wait_of("slow"), Duration::ZERO);
}

#[test]
fn slow_names_leave_threads_to_quick_ones() {
    let mut process = Process::new();
    process.look_up_all("slow", 20);
    let _callers = process.join_all("slow", 20);
    assert_eq!(process.running.len(), LIMITS[1]);
}

#[test]
fn new_name_behind_new_ones_waits_for_its_turn() {
    let mut process = Process::new();
    let _callers = process.join_all("hang", 1_000);
    // 12 at a time.
    assert_eq!(process.wait_of("new"), 83 * HANG);
}

#[test]
fn new_name_behind_new_and_failing_ones_waits_for_its_turn() {
    let mut process = Process::new();
    process.look_up_all("hang", 1_000);
    let _failing = process.join_all("hang", 1_000);
    let _new = process.join_all("hang-too", 100);
    // 4 new ones at a time.
    assert_eq!(process.wait_of("new"), 25 * HANG);
}

#[test]
fn quick_name_behind_quick_ones_waits_for_its_turn() {
    let mut process = Process::new();
    process.wait_of("quick");
    process.look_up_all("service", 100);
    process.services_hang = true;
    let _new = process.join_all("hang", 1_000);
    let _services = process.join_all("service", 100);
    assert_eq!(process.running.len(), LIMITS[0]);
    // 4 quick ones at a time.
    assert_eq!(process.wait_of("quick"), 25 * HANG);
}

#[test]
fn failing_name_behind_failing_ones_waits_for_its_turn() {
    let mut process = Process::new();
    process.look_up_all("hang", 101);
    let _callers = process.join_all("hang", 100);
    // 8 at a time.
    assert_eq!(process.wait_of("hang-100"), 12 * HANG);
}

#[test]
fn callers_that_time_out_do_not_lose_the_turn() {
    let mut process = Process::new();
    let _callers = process.join_all("hang", 1_000);
    let mut later = Vec::new();
    // Connect timeout 5 s, backoff 30 s; and ever more new names.
    loop {
        let caller = process.join("new");
        process.advance(5 * SECOND);
        if caller.borrow().is_some() {
            break;
        }
        drop(caller);
        later.extend(process.join_all(&format!("hang-at-{:?}", process.now), 20));
        process.advance(25 * SECOND);
    }
    assert_eq!(process.starts["new"], 83 * HANG);
    assert!(process.now <= 83 * HANG + 35 * SECOND);
}

#[test]
fn long_abandoned_name_is_not_looked_up() {
    let mut process = Process::new();
    let _callers = process.join_all("hang", 1_000);
    drop(process.join_all("abandoned", 30));
    let wanted = process.join("wanted");
    process.advance(84 * HANG);
    assert!(wanted.borrow().is_some());
    assert_eq!(process.count, 1_001);
    assert!(process.queue.is_empty());
}

/// The timeout and the pauses of etcd's clients, and a resolver that takes longer than both.
#[test]
fn look_up_longer_than_the_connect_timeout_is_used() {
    let mut process = Process::new();
    let first = process.join("slow");
    process.advance(5 * SECOND);
    assert!(first.borrow().is_none());
    drop(first);
    process.advance(2 * SECOND);
    assert!(process.join("slow").borrow().is_some());
    // The addresses were for one caller.
    assert!(process.join("slow").borrow().is_none());
}

#[test]
fn unclaimed_addresses_are_kept_a_minute() {
    let mut process = Process::new();
    for (kept, is_found) in [(59, true), (61, false)] {
        drop(process.join("quick"));
        process.advance(kept * SECOND);
        let caller = process.join("quick");
        assert_eq!(caller.borrow().is_some(), is_found);
        process.advance(SECOND);
    }
}

/// A failure may be over when the next caller comes.
#[test]
fn unclaimed_failure_is_not_kept() {
    let mut process = Process::new();
    drop(process.join("hang"));
    process.advance(HANG);
    assert!(process.join("hang").borrow().is_none());
}

#[test]
fn failing_names_are_forgotten_before_quick_ones() {
    let mut process = Process::new();
    process.wait_of("quick");
    process.look_up_all("hang", 5_000);
    // The first of them are like new names again.
    let _callers = process.join_all("hang", 100);
    assert_eq!(process.running.len(), LIMITS[1]);
    assert_eq!(process.wait_of("quick"), Duration::ZERO);
}

/// Random joins, drops and ends leave nothing behind.
#[test]
fn queue_ends_empty_after_random_use() {
    for seed in 0..20 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut process = Process::new();
        let mut callers = Vec::new();
        for _ in 0..2_000 {
            let kind = ["hang", "slow", "quick"][random.usize(..3)];
            callers.push(process.join(&format!("{kind}-{}", random.u32(..60))));
            if random.u32(..4) == 0 {
                callers.swap_remove(random.usize(..callers.len()));
            }
            process.advance(random.u32(..200) * MILLISECOND);
        }
        process.advance(3_600 * SECOND);
        assert!(process.queue.is_empty(), "seed {seed}");
    }
}

/// A resolver that blocks its threads until it is opened. Names that start with `bad` do not
/// resolve.
#[derive(Default)]
struct Gate {
    state: std::sync::Mutex<State>,
    opened: Condvar,
}

#[derive(Default)]
struct State {
    is_open: bool,
    running: usize,
    most: usize,
    started: Vec<String>,
}

impl Gate {
    fn new() -> (Arc<Self>, Lookups) {
        let gate = Arc::<Self>::default();
        let of_lookups = Arc::clone(&gate);
        let lookups = Lookups::new(move |host: &str| of_lookups.resolve(host));
        (gate, lookups)
    }

    fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        let mut state = self.state.lock().unwrap();
        state.started.push(host.to_owned());
        state.running += 1;
        state.most = state.most.max(state.running);
        let mut state = self
            .opened
            .wait_while(state, |state| !state.is_open)
            .unwrap();
        state.running -= 1;
        match host.starts_with("bad") {
            true => Err(io::Error::other("no such name")),
            false => Ok(vec![([10, 0, 0, 1], 0).into()]),
        }
    }

    fn set_open(&self, is_open: bool) {
        self.state.lock().unwrap().is_open = is_open;
        self.opened.notify_all();
    }

    fn started(&self) -> Vec<String> {
        self.state.lock().unwrap().started.clone()
    }

    async fn wait_until_started(&self, count: usize) {
        while self.started().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Starts a look-up in a task.
fn spawn(
    lookups: &Lookups,
    host: impl Into<String>,
) -> tokio::task::JoinHandle<Result<Vec<SocketAddr>, String>> {
    let (lookups, host) = (lookups.clone(), host.into());
    tokio::spawn(async move { lookups.look_up(&host, 80).await })
}

#[tokio::test]
async fn a_few_run_at_a_time_and_all_end() {
    let (gate, lookups) = Gate::new();
    let callers: Vec<_> = (0..1_000)
        .map(|n| spawn(&lookups, format!("name-{n}")))
        .collect();
    gate.wait_until_started(LIMITS[1]).await;
    gate.set_open(true);
    for caller in callers {
        let found = caller.await.unwrap().unwrap();
        assert_eq!(found, [SocketAddr::from(([10, 0, 0, 1], 80))]);
    }
    assert_eq!(gate.started().len(), 1_000);
    assert!(lookups.0.queue.lock().is_empty());
    // Names that have resolved may use all threads.
    gate.set_open(false);
    let callers: Vec<_> = (0..1_000)
        .map(|n| spawn(&lookups, format!("name-{n}")))
        .collect();
    gate.wait_until_started(1_000 + LIMITS[0]).await;
    gate.set_open(true);
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(gate.state.lock().unwrap().most, LIMITS[0]);
}

#[tokio::test]
async fn callers_share_the_look_up_of_a_name() {
    let (gate, lookups) = Gate::new();
    // All join before the look-up can end.
    let callers: Vec<_> = (0..100).map(|_| lookups.join("name")).collect();
    gate.set_open(true);
    for mut caller in callers {
        let found = caller.wait_for(Option::is_some).await.unwrap();
        assert!(matches!(&*found, Some(Ok(_))));
    }
    assert_eq!(gate.started(), ["name"]);
    // A result is not kept.
    lookups.look_up("name", 80).await.unwrap();
    assert_eq!(gate.started(), ["name", "name"]);
}

#[tokio::test]
async fn abandoned_look_up_is_joined() {
    let (gate, lookups) = Gate::new();
    let abandoned = spawn(&lookups, "name");
    gate.wait_until_started(1).await;
    abandoned.abort();
    assert!(abandoned.await.unwrap_err().is_cancelled());
    let mut joined = lookups.join("name");
    gate.set_open(true);
    joined.wait_for(Option::is_some).await.unwrap();
    assert_eq!(gate.started(), ["name"]);
}

/// As callers on a runtime that is not running at the moment.
#[tokio::test]
async fn unpolled_callers_hold_up_no_other() {
    let (gate, lookups) = Gate::new();
    let hosts: Vec<String> = (0..40).map(|n| format!("name-{n}")).collect();
    let mut unpolled: Vec<_> = hosts
        .iter()
        .map(|host| Box::pin(lookups.look_up(host, 80)))
        .collect();
    for lookup in &mut unpolled {
        assert!(futures::poll!(lookup).is_pending());
    }
    gate.set_open(true);
    lookups.look_up("other", 80).await.unwrap();
    gate.wait_until_started(41).await;
}

#[tokio::test]
async fn name_for_every_address_is_refused() {
    let of = |texts: &[&str]| {
        let found: Vec<SocketAddr> = texts.iter().map(|text| text.parse().unwrap()).collect();
        Lookups::new(move |_: &str| Ok(found.clone()))
    };
    for blocked in ["0.0.0.0:0", "[::]:0", "[::ffff:0.0.0.0]:0"] {
        let error = of(&[blocked]).look_up("blocked", 80).await.unwrap_err();
        assert!(error.starts_with("the name stands for"), "{error}");
    }
    let found = of(&["0.0.0.0:0", "10.0.0.1:0"]).look_up("mixed", 80).await;
    assert_eq!(found.unwrap(), ["10.0.0.1:80".parse().unwrap()]);
    let error = of(&[]).look_up("empty", 80).await.unwrap_err();
    assert_eq!(error, "the name has no address");
}

#[tokio::test]
async fn panic_of_the_resolver_is_an_error() {
    let lookups = Lookups::new(|_: &str| panic!("a bug"));
    let error = lookups.look_up("name", 80).await.unwrap_err();
    assert_eq!(error, "looking up the name panicked");
    assert!(lookups.0.queue.lock().is_empty());
    // The thread goes on.
    let error = lookups.look_up("other", 80).await.unwrap_err();
    assert_eq!(error, "looking up the name panicked");
}
