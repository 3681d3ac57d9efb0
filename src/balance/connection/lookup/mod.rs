//! Looking up names, a few at a time in the whole process.
//!
//! The system's resolver blocks a thread, for ten seconds and more if no name server responds, and
//! cannot be cancelled. On tokio's blocking threads, a thousand such names would occupy all threads
//! and keep every file operation of the program waiting. So look-ups have threads of their own, at
//! most 16, which end when no name is left. Callers that want the same name share one look-up.
//!
//! [`queue`] decides which name is next, so that names which hang keep those waiting as little as
//! possible which do not. Each connector has its own share of the threads, and etcd's clients have
//! their own connectors.
//!
//! A name keeps its turn when its callers time out, because the turn may be longer than the connect
//! timeout. A look-up that has started goes on, and is joined by the next caller for its name. If
//! none has come when the look-up ends, the next one gets the addresses that were found.
//!
//! The queue belongs to the threads and not to the callers' tasks, because a runtime that is not
//! running at the moment must not hold up the look-ups of the others.

mod history;
mod queue;
#[cfg(test)]
mod queue_tests;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use parking_lot::Mutex;

use crate::instance::uncallable_ip_reason;
use history::Found;
use queue::{ChannelId, Job, Joined, Queue};

type Resolve = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// Looks up the names of one channel. Clones are of the same channel.
#[derive(Clone)]
pub(super) struct Lookups(Arc<Channel>);

/// A channel's share of the threads. Its waiting names are forgotten when it is dropped.
struct Channel {
    id: ChannelId,
    threads: Arc<Threads>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.threads.queue.lock().remove_channel(self.id);
    }
}

/// The threads and what they have to do.
struct Threads {
    resolve: Box<Resolve>,
    queue: Mutex<Queue>,
}

impl Lookups {
    /// The look-ups of another channel of this process, with the system's resolver.
    pub(super) fn of_process() -> Self {
        static THREADS: LazyLock<Arc<Threads>> =
            LazyLock::new(|| Threads::new(|host| Ok((host, 0).to_socket_addrs()?.collect())));
        Self::of_channel(&THREADS)
    }

    /// Look-ups with another resolver, which may block its thread.
    #[cfg(test)]
    pub(super) fn new(
        resolve: impl Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Self {
        Self::of_channel(&Threads::new(resolve))
    }

    /// Look-ups of another channel on the same threads.
    #[cfg(test)]
    pub(super) fn of_another_channel(&self) -> Self {
        Self::of_channel(&self.0.threads)
    }

    fn of_channel(threads: &Arc<Threads>) -> Self {
        let id = threads.queue.lock().add_channel();
        let threads = Arc::clone(threads);
        Self(Arc::new(Channel { id, threads }))
    }

    /// The addresses of a host, with this port.
    pub(super) async fn look_up(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
        let found = match self.join(host) {
            Joined::Found(found) => found,
            Joined::Pending(mut result) => {
                // A sender is dropped without a result only if its name has no receiver.
                let found = result.wait_for(Option::is_some).await;
                let found = found.ok().and_then(|found| found.clone());
                let found = found.ok_or("the look-up was cancelled")?;
                found.map_err(|error| error.to_string())?
            }
        };
        let with_port = found.iter().map(|address| {
            let mut address = *address;
            address.set_port(port);
            address
        });
        Ok(with_port.collect())
    }

    /// Whether the look-up of a host waits for those of other hosts.
    pub(super) fn is_waiting(&self, host: &str) -> bool {
        self.0.threads.queue.lock().is_waiting(host)
    }

    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.0.threads.queue.lock().is_empty()
    }

    fn join(&self, host: &str) -> Joined {
        let Channel { id, threads } = &*self.0;
        let joined = threads.queue.lock().join(host, *id, Instant::now());
        threads.start();
        joined
    }
}

impl Threads {
    fn new(
        resolve: impl Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            resolve: Box::new(resolve),
            queue: Mutex::default(),
        })
    }

    /// Starts a thread for each look-up that may run now.
    fn start(self: &Arc<Self>) {
        while let Some(job) = self.next() {
            let (threads, host) = (Arc::clone(self), Arc::clone(&job.host));
            let thread = std::thread::Builder::new().name("goo-etcd-lookup".to_owned());
            let of_thread = job.clone();
            if let Err(error) = thread.spawn(move || threads.work(of_thread)) {
                tracing::debug!(%host, %error, "cannot start a thread for a look-up");
                let result = self.queue.lock().release(&job);
                if let Some(result) = result {
                    let text = format!("cannot start a thread to look up the name: {error}");
                    result.send_replace(Some(Err(text.into())));
                }
            }
        }
    }

    fn next(&self) -> Option<Job> {
        self.queue.lock().start_next(Instant::now())
    }

    /// Looks up a name, and then others until none is left for this thread.
    fn work(self: Arc<Self>, first: Job) {
        let mut next = Some(first);
        while let Some(job) = next {
            // A panic is an error of this name and must not end the thread of the others.
            let resolve = || (self.resolve)(&job.host);
            let found = match std::panic::catch_unwind(AssertUnwindSafe(resolve)) {
                Ok(Ok(addresses)) => callable(addresses),
                Ok(Err(error)) => Err(format!("cannot look up the name: {error}").into()),
                Err(_) => Err("looking up the name panicked".into()),
            };
            let result = self.queue.lock().finish(&job, &found, Instant::now());
            if let Some(result) = result {
                result.send_replace(Some(found));
            }
            next = self.next();
            // The end of one look-up may make room for two, in different channels.
            self.start();
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
