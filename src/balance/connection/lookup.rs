//! Looking up names, a few at a time in the whole process.
//!
//! The system's resolver blocks a thread, for ten seconds and more if no name server responds, and
//! cannot be cancelled. On tokio's blocking threads, a thousand such names would occupy all threads
//! and keep every file operation of the program waiting. So look-ups have threads of their own, at
//! most [`MAX_THREADS`], which end when no name is left. Callers that want the same name share one
//! look-up.
//!
//! A name whose callers have all given up is skipped when its turn comes. A look-up that has
//! started goes on, and is joined by the next caller for its name. Names that failed last time use
//! at most [`MAX_FAILING`] of the threads, so that names which do not resolve cannot keep those
//! waiting which do.
//!
//! The queue belongs to the threads and not to the callers' tasks, because a runtime that is not
//! running at the moment must not hold up the look-ups of the others.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::instance::uncallable_ip_reason;

/// The most look-ups that run at a time.
const MAX_THREADS: usize = 16;

/// The most of them that are for names whose last look-up failed.
const MAX_FAILING: usize = 12;

/// How many failing names are remembered. Beyond that all are forgotten, which costs one more turn
/// among the others for each.
const REMEMBERED_FAILURES: usize = 4_096;

/// The addresses of a name, with port 0, or why there are none.
type Found = Result<Arc<[SocketAddr]>, Arc<str>>;

type Resolve = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// Looks up names. Clones share the threads and the look-ups.
#[derive(Clone)]
pub(super) struct Lookups(Arc<Inner>);

struct Inner {
    resolve: Box<Resolve>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Names that wait for a thread, in order.
    waiting: VecDeque<Arc<str>>,
    /// The names in `waiting` and those that are being looked up. The receivers are their callers.
    pending: HashMap<Arc<str>, watch::Sender<Option<Found>>>,
    threads: usize,
    /// How many of `threads` look up a name in `failing`.
    failing_threads: usize,
    /// Names whose last look-up failed.
    failing: HashSet<Arc<str>>,
}

/// A name that a thread looks up.
struct Job {
    host: Arc<str>,
    was_failing: bool,
}

impl Lookups {
    /// The look-ups of this process, with the system's resolver.
    pub(super) fn of_process() -> Self {
        static LOOKUPS: LazyLock<Lookups> =
            LazyLock::new(|| Lookups::new(|host: &str| Ok((host, 0).to_socket_addrs()?.collect())));
        LOOKUPS.clone()
    }

    /// Look-ups with another resolver, which may block its thread.
    pub(super) fn new(
        resolve: impl Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner {
            resolve: Box::new(resolve),
            state: Mutex::default(),
        }))
    }

    /// The addresses of a host, with this port.
    pub(super) async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let mut result = self.join(host)?;
        // A sender is dropped without a result only if its name has no receiver.
        let found = result.wait_for(Option::is_some).await;
        let found = found.ok().and_then(|found| found.clone());
        let found = found.ok_or("the look-up was cancelled")?;
        let found = found.map_err(|error| error.to_string())?;
        let with_port = found.iter().map(|address| {
            let mut address = *address;
            address.set_port(port);
            address
        });
        Ok(with_port.collect())
    }

    /// Joins the pending look-up of a host, or queues a new one.
    fn join(&self, host: &str) -> Result<watch::Receiver<Option<Found>>, String> {
        let mut state = self.0.state.lock();
        if let Some(pending) = state.pending.get(host) {
            return Ok(pending.subscribe());
        }
        let host: Arc<str> = host.into();
        let (result_tx, result) = watch::channel(None);
        state.pending.insert(Arc::clone(&host), result_tx);
        state.waiting.push_back(Arc::clone(&host));
        if state.threads == MAX_THREADS {
            return Ok(result);
        }
        let inner = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("goo-etcd-lookup".to_owned());
        match thread.spawn(move || inner.work()) {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                state.pending.remove(&host);
                state.waiting.retain(|waiting| *waiting != host);
                return Err(format!(
                    "cannot start a thread to look up the name: {error}"
                ));
            }
            // The other threads come to this name later.
            Err(_) => {}
        }
        Ok(result)
    }
}

impl Inner {
    /// Looks up names until none is left.
    fn work(&self) {
        while let Some(job) = self.take_job() {
            // A panic is an error of this name and must not end the thread of the others.
            let resolve = || (self.resolve)(&job.host);
            let found = match std::panic::catch_unwind(AssertUnwindSafe(resolve)) {
                Ok(Ok(addresses)) => callable(addresses),
                Ok(Err(error)) => Err(format!("cannot look up the name: {error}").into()),
                Err(_) => Err("looking up the name panicked".into()),
            };
            self.finish(&job, found);
        }
    }

    /// Takes the next name, or gives the thread up.
    fn take_job(&self) -> Option<Job> {
        let state = &mut *self.state.lock();
        let may_take_failing = state.failing_threads < MAX_FAILING;
        let mut index = 0;
        while let Some(host) = state.waiting.get(index) {
            let was_failing = state.failing.contains(host);
            let is_wanted = (state.pending.get(host)).is_some_and(|job| job.receiver_count() > 0);
            if is_wanted && was_failing && !may_take_failing {
                index += 1;
                continue;
            }
            let host = state.waiting.remove(index)?;
            if is_wanted {
                state.failing_threads += usize::from(was_failing);
                return Some(Job { host, was_failing });
            }
            state.pending.remove(&host);
        }
        state.threads -= 1;
        None
    }

    /// Records and publishes a result.
    fn finish(&self, job: &Job, found: Found) {
        let mut state = self.state.lock();
        state.failing_threads -= usize::from(job.was_failing);
        if found.is_ok() {
            state.failing.remove(&job.host);
        } else {
            if state.failing.len() >= REMEMBERED_FAILURES {
                state.failing.clear();
            }
            state.failing.insert(Arc::clone(&job.host));
        }
        let result = state.pending.remove(&job.host);
        drop(state);
        if let Some(result) = result {
            result.send_replace(Some(found));
        }
    }
}

/// The addresses that a client may call. A name may stand for 0.0.0.0, as filters in name servers
/// respond for blocked names, and then the client would call itself.
fn callable(addresses: Vec<SocketAddr>) -> Found {
    let refused = addresses
        .iter()
        .find_map(|address| Some((address.ip(), uncallable_ip_reason(address.ip())?)));
    let is_callable = |address: &SocketAddr| uncallable_ip_reason(address.ip()).is_none();
    let callable: Arc<[SocketAddr]> = addresses.into_iter().filter(is_callable).collect();
    match refused {
        _ if !callable.is_empty() => Ok(callable),
        Some((ip, reason)) => Err(format!("the name stands for {ip}: {reason}").into()),
        None => Err("the name has no address".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::Duration;

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

    #[tokio::test]
    async fn a_few_run_at_a_time_and_all_end() {
        let (gate, lookups) = Gate::new();
        let callers: Vec<_> = (0..1_000)
            .map(|n| spawn(&lookups, format!("name-{n}")))
            .collect();
        gate.wait_until_started(MAX_THREADS).await;
        gate.set_open(true);
        for caller in callers {
            let found = caller.await.unwrap().unwrap();
            assert_eq!(found, [SocketAddr::from(([10, 0, 0, 1], 80))]);
        }
        assert_eq!(gate.state.lock().unwrap().most, MAX_THREADS);
        assert_eq!(gate.started().len(), 1_000);
        assert!(lookups.0.state.lock().pending.is_empty());
    }

    #[tokio::test]
    async fn callers_share_the_look_up_of_a_name() {
        let (gate, lookups) = Gate::new();
        // All join before the look-up can end.
        let callers: Vec<_> = (0..100).map(|_| lookups.join("name").unwrap()).collect();
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
    async fn cancelled_caller_leaves_the_queue() {
        let (gate, lookups) = Gate::new();
        let running: Vec<_> = (0..MAX_THREADS)
            .map(|n| spawn(&lookups, format!("name-{n}")))
            .collect();
        gate.wait_until_started(MAX_THREADS).await;
        let waiting = lookups.look_up("cancelled", 80);
        let waited = tokio::time::timeout(Duration::from_millis(1), waiting).await;
        assert!(waited.is_err());
        let next = spawn(&lookups, "next");
        gate.set_open(true);
        next.await.unwrap().unwrap();
        for running in running {
            running.await.unwrap().unwrap();
        }
        assert!(!gate.started().contains(&"cancelled".to_owned()));
        assert!(lookups.0.state.lock().pending.is_empty());
    }

    #[tokio::test]
    async fn abandoned_look_up_is_joined() {
        let (gate, lookups) = Gate::new();
        let abandoned = spawn(&lookups, "name");
        gate.wait_until_started(1).await;
        abandoned.abort();
        assert!(abandoned.await.unwrap_err().is_cancelled());
        let mut joined = lookups.join("name").unwrap();
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
        assert_eq!(gate.started().len(), 41);
    }

    #[tokio::test]
    async fn failing_names_leave_places_to_others() {
        let (gate, lookups) = Gate::new();
        gate.set_open(true);
        let bad = || (0..20).map(|n| format!("bad-{n}"));
        for name in bad() {
            let error = lookups.look_up(&name, 80).await.unwrap_err();
            assert_eq!(error, "cannot look up the name: no such name");
        }
        gate.set_open(false);
        let callers: Vec<_> = bad().map(|name| spawn(&lookups, name)).collect();
        gate.wait_until_started(20 + MAX_FAILING).await;
        let good = spawn(&lookups, "good");
        gate.wait_until_started(20 + MAX_FAILING + 1).await;
        assert_eq!(gate.started().last().unwrap(), "good");
        gate.set_open(true);
        good.await.unwrap().unwrap();
        for caller in callers {
            caller.await.unwrap().unwrap_err();
        }
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
        assert!(lookups.0.state.lock().pending.is_empty());
        // The thread goes on.
        let error = lookups.look_up("other", 80).await.unwrap_err();
        assert_eq!(error, "looking up the name panicked");
    }
}
