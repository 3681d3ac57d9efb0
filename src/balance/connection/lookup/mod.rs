//! Looking up names, a few at a time in the whole process.
//!
//! The system's resolver blocks a thread, for ten seconds and more if no name server responds, and
//! cannot be cancelled. On tokio's blocking threads, a thousand such names would occupy all threads
//! and keep every file operation of the program waiting. So look-ups have threads of their own, at
//! most 16, which end when no name is left. The [`queue`] belongs to the threads and not to the
//! callers' tasks, because a runtime that is not running at the moment must not hold up the
//! look-ups of the others.
//!
//! Callers that want the same name at the same time share one look-up.
//!
//! A look-up that hangs cannot be told from one that takes a little longer, and cannot be ended. So
//! threads are withheld beforehand from names that are more likely to hang: names that did not
//! resolve within 1 s last time, or are new, use at most 12 threads, and of these, names that did
//! not resolve use at most 8. Within these limits, the name that was wanted first is next. Etcd's
//! own names need no other threads, because they have resolved before services are found in etcd.
//!
//! A name keeps its turn for 60 s after a caller has asked for it, because the turn may be longer
//! than the connect timeout. A look-up that has started goes on, and is joined by the next caller.
//!
//! If no caller is left when a look-up ends, the next caller within 60 s gets the addresses. With
//! a resolver that takes 6 s, a connect timeout of 5 s and a pause of 1 s and more after it, each
//! look-up would end between two callers, and the name would never be connected.
//!
//! The longest that a name waits for a thread, if every hanging look-up takes the time T (glibc's
//! resolver: 10 s for each name server that does not respond):
//!
//! - A name that resolved within 1 s last time waits for no names that did not. Behind N of its
//!   kind that hang now, the name waits T for every 4 of them.
//! - A new name does not wait for names that failed. Behind N new or quick ones that hang, the
//!   name waits T for every 12 of them (830 s for 1,000 names and T = 10 s), or for every 4 while 8
//!   failing names hang as well. Next time all of these are failing, and do not delay new ones.
//! - A failing name behind N names of any kind that hang waits T for every 8 of them.

mod queue;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use parking_lot::Mutex;

use crate::instance::uncallable_ip_reason;
use queue::{Caller, Found, Job, Queue, Rank};

type Resolve = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// Looks up names. Clones share the threads.
#[derive(Clone)]
pub(super) struct Lookups(Arc<Threads>);

/// The threads and what they have to do.
struct Threads {
    resolve: Box<Resolve>,
    queue: Mutex<Queue>,
}

impl Lookups {
    /// The look-ups of this process, with the system's resolver.
    pub(super) fn of_process() -> Self {
        static LOOKUPS: LazyLock<Lookups> =
            LazyLock::new(|| Lookups::new(|host| Ok((host, 0).to_socket_addrs()?.collect())));
        LOOKUPS.clone()
    }

    /// Look-ups with another resolver, which may block its thread.
    pub(super) fn new(
        resolve: impl Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Threads {
            resolve: Box::new(resolve),
            queue: Mutex::default(),
        }))
    }

    /// The addresses of a host, with this port.
    pub(super) async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let mut caller = self.join(host);
        // A sender is dropped without a result only if its name has no receiver.
        let found = caller.wait_for(Option::is_some).await;
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

    /// Whether the look-up of a host waits for those of other hosts.
    pub(super) fn is_waiting(&self, host: &str) -> bool {
        self.0.queue.lock().is_waiting(host)
    }

    fn join(&self, host: &str) -> Caller {
        let caller = self.0.queue.lock().join(host, Instant::now());
        self.0.start();
        caller
    }
}

impl Threads {
    /// Starts a thread for each look-up that may run now.
    fn start(self: &Arc<Self>) {
        while let Some(job) = self.next() {
            let (threads, of_thread) = (Arc::clone(self), job.clone());
            let thread = std::thread::Builder::new().name("goo-etcd-lookup".to_owned());
            if let Err(error) = thread.spawn(move || threads.work(of_thread)) {
                tracing::debug!(host = %job.host, %error, "cannot start a thread for a look-up");
                let text = format!("cannot start a thread to look up the name: {error}");
                self.finish(&job, Err(text.into()), job.rank);
            }
        }
    }

    fn next(&self) -> Option<Job> {
        self.queue.lock().start_next(Instant::now())
    }

    fn finish(&self, job: &Job, found: Found, rank: Rank) {
        let now = Instant::now();
        self.queue.lock().finish(job, &found, rank, now);
        job.result.send_replace(Some(found));
    }

    /// Looks up a name, and then others until none is left for this thread. The end of a look-up
    /// makes room for one other at most, so no further thread is needed.
    fn work(&self, first: Job) {
        let mut next = Some(first);
        while let Some(job) = next {
            let started = Instant::now();
            // A panic is an error of this name and must not end the thread of the others.
            let resolve = || (self.resolve)(&job.host);
            let found = match std::panic::catch_unwind(AssertUnwindSafe(resolve)) {
                Ok(Ok(addresses)) => callable(addresses),
                Ok(Err(error)) => Err(format!("cannot look up the name: {error}").into()),
                Err(_) => Err("looking up the name panicked".into()),
            };
            let rank = Rank::after(&found, started.elapsed());
            self.finish(&job, found, rank);
            next = self.next();
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
