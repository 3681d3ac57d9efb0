//! Which names are looked up at a time, and which one is next.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

/// The most look-ups at a time of names of each [`Rank`] or a worse one. The first is the number
/// of threads.
pub(super) const LIMITS: [usize; 3] = [16, 12, 8];

/// A look-up that takes longer does not make a name [`Quick`](Rank::Quick). Name servers that work
/// respond within milliseconds, and resolvers repeat a lost request after seconds.
const SLOW: Duration = Duration::from_secs(1);

/// How long a name keeps its turn after a caller has asked for the name, and how long addresses
/// that no caller has received are kept. Callers that have timed out ask again after their
/// connect backoff, by default 36 s at most.
const KEPT: Duration = Duration::from_secs(60);

/// How many names of a rank are remembered. Beyond that all are forgotten, and are like new names.
const REMEMBERED: usize = 4_096;

/// The addresses of a name, with port 0, or why there are none.
pub(super) type Found = Result<Arc<[SocketAddr]>, Arc<str>>;

/// A caller's side of a look-up.
pub(super) type Caller = watch::Receiver<Option<Found>>;

/// The result of the last look-up of a name, from the best to the worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// The name resolved within [`SLOW`].
    Quick,
    /// The name resolved slowly, or has not been looked up.
    New,
    /// The name did not resolve.
    Failing,
}

impl Rank {
    const WORST_FIRST: [Self; 3] = [Self::Failing, Self::New, Self::Quick];

    /// The rank after a look-up.
    pub(super) fn after(found: &Found, took: Duration) -> Self {
        match found {
            Err(_) => Self::Failing,
            Ok(_) if took > SLOW => Self::New,
            Ok(_) => Self::Quick,
        }
    }
}

/// A name that is being looked up.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) host: Arc<str>,
    pub(super) rank: Rank,
    /// The receivers are the callers.
    pub(super) result: watch::Sender<Option<Found>>,
}

/// The names that are wanted. Knows neither threads nor the resolver.
#[derive(Default)]
pub(super) struct Queue {
    /// The names that wait and those that are being looked up.
    pending: HashMap<Arc<str>, Pending>,
    /// The names that wait, in the order in which they were first wanted.
    waiting: VecDeque<(Rank, Arc<str>)>,
    /// How many look-ups of each [`Rank`] run.
    running: [usize; 3],
    /// The addresses that no caller has received, and when they were found.
    unclaimed: HashMap<Arc<str>, (Caller, Instant)>,
    quick: HashSet<Arc<str>>,
    failing: HashSet<Arc<str>>,
}

struct Pending {
    result: watch::Sender<Option<Found>>,
    /// When a caller last asked for the name.
    wanted: Instant,
    is_waiting: bool,
}

impl Queue {
    /// Joins the pending look-up of a name, or queues the name. A name that waits already keeps
    /// its turn.
    pub(super) fn join(&mut self, host: &str, now: Instant) -> Caller {
        if let Some((caller, ended)) = self.unclaimed.remove(host)
            && now < ended + KEPT
        {
            return caller;
        }
        if let Some(pending) = self.pending.get_mut(host) {
            pending.wanted = now;
            return pending.result.subscribe();
        }
        let (result, caller) = watch::channel(None);
        let host: Arc<str> = host.into();
        let rank = self.rank(&host);
        self.waiting.push_back((rank, Arc::clone(&host)));
        let pending = Pending {
            result,
            wanted: now,
            is_waiting: true,
        };
        self.pending.insert(host, pending);
        caller
    }

    /// Starts the next look-up if there is room for one.
    pub(super) fn start_next(&mut self, now: Instant) -> Option<Job> {
        loop {
            let worst = Rank::WORST_FIRST
                .into_iter()
                .find(|rank| self.has_room(*rank))?;
            let index = self.waiting.iter().position(|(rank, _)| *rank <= worst)?;
            let (rank, host) = self.waiting.remove(index)?;
            let pending = self.pending.get_mut(&host)?;
            if pending.result.receiver_count() == 0 && now >= pending.wanted + KEPT {
                self.pending.remove(&host);
                continue;
            }
            pending.is_waiting = false;
            self.running[rank as usize] += 1;
            let result = pending.result.clone();
            return Some(Job { host, rank, result });
        }
    }

    /// Whether a name of this rank may start. If so, names of better ranks may, too.
    fn has_room(&self, rank: Rank) -> bool {
        let running_from = |rank: usize| self.running[rank..].iter().sum::<usize>();
        (0..=rank as usize).all(|rank| running_from(rank) < LIMITS[rank])
    }

    /// Ends a look-up, after which the name has this rank. The result is sent afterwards, because
    /// wakers must not run under the queue's lock.
    pub(super) fn finish(&mut self, job: &Job, found: &Found, rank: Rank, now: Instant) {
        self.running[job.rank as usize] -= 1;
        self.set_rank(&job.host, rank);
        self.pending.remove(&job.host);
        if found.is_ok() && job.result.receiver_count() == 0 {
            self.unclaimed.retain(|_, (_, ended)| now < *ended + KEPT);
            let unclaimed = (job.result.subscribe(), now);
            self.unclaimed.insert(Arc::clone(&job.host), unclaimed);
        }
    }

    fn rank(&self, host: &str) -> Rank {
        if self.quick.contains(host) {
            Rank::Quick
        } else if self.failing.contains(host) {
            Rank::Failing
        } else {
            Rank::New
        }
    }

    fn set_rank(&mut self, host: &Arc<str>, rank: Rank) {
        self.quick.remove(host);
        self.failing.remove(host);
        let names = match rank {
            Rank::Quick => &mut self.quick,
            Rank::Failing => &mut self.failing,
            Rank::New => return,
        };
        if names.len() >= REMEMBERED {
            names.clear();
        }
        names.insert(Arc::clone(host));
    }

    /// Whether a name waits for a thread.
    pub(super) fn is_waiting(&self, host: &str) -> bool {
        let pending = self.pending.get(host);
        pending.is_some_and(|pending| pending.is_waiting)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.waiting.is_empty() && self.running == [0; 3]
    }
}
