//! The results of past look-ups.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The addresses of a name, with port 0, or why there are none.
pub(super) type Found = Result<Arc<[SocketAddr]>, Arc<str>>;

/// A look-up that takes longer does not make a name [`Quick`](Rank::Quick). Name servers that work
/// respond within milliseconds, and resolvers repeat a lost request after seconds.
const SLOW: Duration = Duration::from_secs(1);

/// How long a name keeps its turn after a caller has asked for the name, and how long addresses
/// that no caller has received are kept. Callers that have timed out ask again after their
/// connect backoff, by default 36 s at most.
pub(super) const KEPT: Duration = Duration::from_secs(60);

/// How many names of a kind are remembered. Beyond that all are forgotten, and are like new names.
const REMEMBERED: usize = 4_096;

/// The result of the last look-up of a name, from the best to the worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rank {
    /// The name resolved within [`SLOW`].
    Quick,
    /// The name resolved slowly, or has not been looked up.
    New,
    /// The name did not resolve.
    Failing,
}

impl Rank {
    pub(super) const ALL: [Self; 3] = [Self::Quick, Self::New, Self::Failing];

    /// The rank after a look-up.
    pub(super) fn after(found: &Found, took: Duration) -> Self {
        match found {
            Err(_) => Self::Failing,
            Ok(_) if took > SLOW => Self::New,
            Ok(_) => Self::Quick,
        }
    }
}

/// The ranks of names, and the addresses that no caller has received.
#[derive(Default)]
pub(super) struct History {
    quick: HashSet<Arc<str>>,
    failing: HashSet<Arc<str>>,
    /// The addresses, and when they were found.
    unclaimed: HashMap<Arc<str>, (Arc<[SocketAddr]>, Instant)>,
}

impl History {
    pub(super) fn rank(&self, host: &str) -> Rank {
        if self.quick.contains(host) {
            Rank::Quick
        } else if self.failing.contains(host) {
            Rank::Failing
        } else {
            Rank::New
        }
    }

    pub(super) fn set_rank(&mut self, host: &Arc<str>, rank: Rank) {
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

    pub(super) fn keep_unclaimed(
        &mut self,
        host: &Arc<str>,
        found: &Arc<[SocketAddr]>,
        now: Instant,
    ) {
        if self.unclaimed.len() >= REMEMBERED {
            self.unclaimed.clear();
        }
        let found = (Arc::clone(found), now);
        self.unclaimed.insert(Arc::clone(host), found);
    }

    pub(super) fn take_unclaimed(&mut self, host: &str, now: Instant) -> Option<Arc<[SocketAddr]>> {
        let (found, at) = self.unclaimed.remove(host)?;
        (now < at + KEPT).then_some(found)
    }
}
