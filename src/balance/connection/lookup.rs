//! Looking up names, a few at a time in the whole process.
//!
//! The system's resolver blocks a thread, for ten seconds and more if no name server responds, and
//! cannot be cancelled. On tokio's blocking threads, a thousand such names would occupy all threads
//! and keep every file operation of the program waiting. So look-ups have threads of their own, at
//! most [`MAX_LOOKUPS`], and callers that want the same name share one look-up.
//!
//! A caller that gives up leaves the queue. A look-up that has started goes on without its callers,
//! keeps its place among the [`MAX_LOOKUPS`], and is joined by the next caller for its name.
//! Names that failed last time use at most [`MAX_FAILING`] of the places, so that names which do
//! not resolve cannot keep those waiting which do.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::sync::{Arc, LazyLock};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared, WeakShared};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::instance::uncallable_ip_reason;

/// The most look-ups that run at a time.
const MAX_LOOKUPS: usize = 16;

/// The most of them that are for names whose last look-up failed.
const MAX_FAILING: usize = 12;

/// How many failing names are remembered. Beyond that all are forgotten, which costs one more turn
/// among the others for each.
const REMEMBERED_FAILURES: usize = 4_096;

/// The addresses of a name, with port 0, or why there are none.
type Found = Result<Arc<[SocketAddr]>, Arc<str>>;

type Resolve = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// Looks up names. Clones share the limit and the look-ups.
#[derive(Clone)]
pub(super) struct Lookups(Arc<Inner>);

struct Inner {
    resolve: Box<Resolve>,
    places: Arc<Semaphore>,
    failing_places: Arc<Semaphore>,
    failing: Mutex<HashSet<Arc<str>>>,
    pending: Mutex<HashMap<Arc<str>, Pending>>,
}

/// A look-up that has not ended.
struct Pending {
    id: u64,
    lookup: WeakShared<BoxFuture<'static, Found>>,
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
            places: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            failing_places: Arc::new(Semaphore::new(MAX_FAILING)),
            failing: Mutex::default(),
            pending: Mutex::default(),
        }))
    }

    /// The addresses of a host, with this port.
    pub(super) async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let found = self.join(host).await.map_err(|error| error.to_string())?;
        let with_port = found.iter().map(|address| {
            let mut address = *address;
            address.set_port(port);
            address
        });
        Ok(with_port.collect())
    }

    /// The pending look-up of a host, or a new one.
    fn join(&self, host: &str) -> Shared<BoxFuture<'static, Found>> {
        let mut pending = self.0.pending.lock();
        if let Some(lookup) = pending.get(host).and_then(|found| found.lookup.upgrade()) {
            return lookup;
        }
        let host: Arc<str> = host.into();
        let id = fastrand::u64(..);
        let lookup = run(Arc::clone(&self.0), Arc::clone(&host), id)
            .boxed()
            .shared();
        if let Some(weak) = lookup.downgrade() {
            pending.insert(host, Pending { id, lookup: weak });
        }
        lookup
    }
}

/// Removes a pending look-up when it ends or when its last caller gives up.
struct Removal {
    inner: Arc<Inner>,
    host: Arc<str>,
    id: u64,
}

impl Drop for Removal {
    fn drop(&mut self) {
        let mut pending = self.inner.pending.lock();
        // After the last caller has gone, another may have started a new look-up.
        if pending.get(&self.host).is_some_and(|now| now.id == self.id) {
            pending.remove(&self.host);
        }
    }
}

/// Waits for a place, and looks up a host in a thread.
fn run(inner: Arc<Inner>, host: Arc<str>, id: u64) -> impl Future<Output = Found> + Send {
    let removal = Removal { inner, host, id };
    async move {
        let (inner, host) = (&removal.inner, &removal.host);
        let is_failing = inner.failing.lock().contains(host);
        let failing_place = match is_failing {
            true => acquire(&inner.failing_places).await,
            false => None,
        };
        let place = acquire(&inner.places).await;
        // Held by the thread, so that callers who come after all others gave up can join.
        let this = inner
            .pending
            .lock()
            .get(host)
            .and_then(|now| now.lookup.upgrade());
        let (result_tx, result) = oneshot::channel();
        let (thread_inner, thread_host) = (Arc::clone(inner), Arc::clone(host));
        let thread = std::thread::Builder::new()
            .name("goo-etcd-lookup".to_owned())
            .spawn(move || {
                let found = thread_inner.resolve(&thread_host);
                let _ = result_tx.send(found);
                drop((place, failing_place, this));
            });
        if let Err(error) = thread {
            return Err(format!("cannot start a thread to look up the name: {error}").into());
        }
        // The sender is dropped without a result only if the resolver panics.
        result
            .await
            .unwrap_or_else(|_| Err("looking up the name panicked".into()))
    }
}

/// Waits in the queue for a place. `None` only if the semaphore is closed, which never happens.
async fn acquire(places: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(places).acquire_owned().await.ok()
}

impl Inner {
    /// Looks up a host, and blocks the thread meanwhile.
    fn resolve(&self, host: &Arc<str>) -> Found {
        let found = match (self.resolve)(host) {
            Ok(addresses) => callable(addresses),
            Err(error) => Err(format!("cannot look up the name: {error}").into()),
        };
        let mut failing = self.failing.lock();
        if found.is_ok() {
            failing.remove(host);
        } else {
            if failing.len() >= REMEMBERED_FAILURES {
                failing.clear();
            }
            failing.insert(Arc::clone(host));
        }
        found
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
        gate.wait_until_started(MAX_LOOKUPS).await;
        gate.set_open(true);
        for caller in callers {
            let found = caller.await.unwrap().unwrap();
            assert_eq!(found, [SocketAddr::from(([10, 0, 0, 1], 80))]);
        }
        assert_eq!(gate.state.lock().unwrap().most, MAX_LOOKUPS);
        assert_eq!(gate.started().len(), 1_000);
        assert!(lookups.0.pending.lock().is_empty());
    }

    #[tokio::test]
    async fn callers_share_the_look_up_of_a_name() {
        let (gate, lookups) = Gate::new();
        // All join before the look-up can end.
        let callers: Vec<_> = (0..100).map(|_| lookups.join("name")).collect();
        gate.set_open(true);
        for found in futures::future::join_all(callers).await {
            found.unwrap();
        }
        assert_eq!(gate.started(), ["name"]);
        // A result is not kept.
        lookups.look_up("name", 80).await.unwrap();
        assert_eq!(gate.started(), ["name", "name"]);
    }

    #[tokio::test]
    async fn cancelled_caller_leaves_the_queue() {
        let (gate, lookups) = Gate::new();
        let running: Vec<_> = (0..MAX_LOOKUPS)
            .map(|n| spawn(&lookups, format!("name-{n}")))
            .collect();
        gate.wait_until_started(MAX_LOOKUPS).await;
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
        assert!(lookups.0.pending.lock().is_empty());
    }

    #[tokio::test]
    async fn abandoned_look_up_is_joined() {
        let (gate, lookups) = Gate::new();
        let abandoned = spawn(&lookups, "name");
        gate.wait_until_started(1).await;
        abandoned.abort();
        assert!(abandoned.await.unwrap_err().is_cancelled());
        let joined = spawn(&lookups, "name");
        tokio::task::yield_now().await;
        gate.set_open(true);
        joined.await.unwrap().unwrap();
        assert_eq!(gate.started(), ["name"]);
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
        assert!(lookups.0.pending.lock().is_empty());
        // The place is given back.
        let all = u32::try_from(MAX_LOOKUPS).unwrap();
        let _all = lookups.0.places.acquire_many(all).await.unwrap();
    }
}
