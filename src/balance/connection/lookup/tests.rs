//! The look-ups on real threads, with a resolver that blocks.

use std::sync::Condvar;
use std::time::Duration;

use tokio::sync::watch;

use super::queue::{OF_CHANNEL, OF_PROCESS};
use super::*;

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

/// Joins the look-up of a host, which has no unclaimed addresses.
fn pending(lookups: &Lookups, host: &str) -> watch::Receiver<Option<Found>> {
    match lookups.join(host) {
        Joined::Pending(result) => result,
        Joined::Found(_) => panic!("{host} has unclaimed addresses"),
    }
}

#[tokio::test]
async fn a_few_run_at_a_time_and_all_end() {
    let (gate, lookups) = Gate::new();
    let others = [(); 3].map(|()| lookups.of_another_channel());
    let callers: Vec<_> = (0..1_000)
        .map(|n| spawn(&others[n % 3], format!("name-{n}")))
        .collect();
    gate.wait_until_started(OF_PROCESS[1]).await;
    gate.set_open(true);
    for caller in callers {
        let found = caller.await.unwrap().unwrap();
        assert_eq!(found, [SocketAddr::from(([10, 0, 0, 1], 80))]);
    }
    assert_eq!(gate.started().len(), 1_000);
    assert!(lookups.is_idle());
    // Names that have resolved may use all threads.
    gate.set_open(false);
    let callers: Vec<_> = (0..1_000)
        .map(|n| spawn(&others[n % 3], format!("name-{n}")))
        .collect();
    gate.wait_until_started(1_000 + OF_PROCESS[0]).await;
    gate.set_open(true);
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(gate.state.lock().unwrap().most, OF_PROCESS[0]);
}

#[tokio::test]
async fn callers_share_the_look_up_of_a_name() {
    let (gate, lookups) = Gate::new();
    // All join before the look-up can end.
    let callers: Vec<_> = (0..100).map(|_| pending(&lookups, "name")).collect();
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
async fn timed_out_caller_keeps_the_turn() {
    let (gate, lookups) = Gate::new();
    let running: Vec<_> = (0..OF_CHANNEL[1])
        .map(|n| spawn(&lookups, format!("name-{n}")))
        .collect();
    gate.wait_until_started(OF_CHANNEL[1]).await;
    let waiting = lookups.look_up("waiting", 80);
    let waited = tokio::time::timeout(Duration::from_millis(1), waiting).await;
    assert!(waited.is_err() && lookups.is_waiting("waiting"));
    let next = spawn(&lookups, "next");
    gate.set_open(true);
    next.await.unwrap().unwrap();
    for running in running {
        running.await.unwrap().unwrap();
    }
    while !lookups.is_idle() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // The addresses are there for the caller's next attempt.
    gate.set_open(false);
    let found = lookups.look_up("waiting", 80).await.unwrap();
    assert_eq!(found, [SocketAddr::from(([10, 0, 0, 1], 80))]);
    let started = gate.started();
    assert_eq!(started.iter().filter(|name| *name == "waiting").count(), 1);
}

#[tokio::test]
async fn hanging_names_leave_threads_to_known_ones() {
    let (gate, lookups) = Gate::new();
    gate.set_open(true);
    lookups.look_up("good", 80).await.unwrap();
    gate.set_open(false);
    let callers: Vec<_> = (0..1_000)
        .map(|n| spawn(&lookups, format!("bad-{n}")))
        .collect();
    gate.wait_until_started(1 + OF_CHANNEL[1]).await;
    let good = spawn(&lookups, "good");
    gate.wait_until_started(2 + OF_CHANNEL[1]).await;
    let etcd = spawn(&lookups.of_another_channel(), "etcd");
    gate.wait_until_started(3 + OF_CHANNEL[1]).await;
    assert_eq!(gate.started()[1 + OF_CHANNEL[1]..], ["good", "etcd"]);
    gate.set_open(true);
    good.await.unwrap().unwrap();
    etcd.await.unwrap().unwrap();
    for caller in callers {
        caller.await.unwrap().unwrap_err();
    }
}

#[tokio::test]
async fn abandoned_look_up_is_joined() {
    let (gate, lookups) = Gate::new();
    let abandoned = spawn(&lookups, "name");
    gate.wait_until_started(1).await;
    abandoned.abort();
    assert!(abandoned.await.unwrap_err().is_cancelled());
    let mut joined = pending(&lookups, "name");
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

#[test]
fn each_connector_has_a_share_of_its_own() {
    let [services, etcd] = [(); 2].map(|()| Lookups::of_process());
    assert!(Arc::ptr_eq(&services.0.threads, &etcd.0.threads));
    assert_ne!(services.0.id, etcd.0.id);
}

#[tokio::test]
async fn panic_of_the_resolver_is_an_error() {
    let lookups = Lookups::new(|_: &str| panic!("a bug"));
    let error = lookups.look_up("name", 80).await.unwrap_err();
    assert_eq!(error, "looking up the name panicked");
    assert!(lookups.is_idle());
    // The thread goes on.
    let error = lookups.look_up("other", 80).await.unwrap_err();
    assert_eq!(error, "looking up the name panicked");
}
