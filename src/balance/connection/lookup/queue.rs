//! Which names are looked up at a time, and which one is next.
//!
//! A look-up that hangs cannot be told from one that takes a little longer, and cannot be ended. So
//! threads are withheld beforehand from names that are more likely to hang, and from a channel that
//! has many look-ups running already:
//!
//! | look-ups at a time                                  | process | channel |
//! |-----------------------------------------------------|---------|---------|
//! | all                                                 |      16 |      12 |
//! | of names that did not resolve within 1 s last time  |      12 |       8 |
//! | of these, of names that did not resolve             |       8 |       4 |
//!
//! Within these limits the channels take turns, and each serves its names in the order in which
//! they were first wanted.
//!
//! The longest that a name waits for a thread, if every hanging look-up takes the time T (glibc's
//! resolver: 10 s for each name server that does not respond):
//!
//! - A name that resolved within 1 s last time does not wait for names that did not, because 4
//!   threads are for such names alone, in its channel and in the process. If N of these hang now
//!   and were wanted before it in its channel, the name waits T for every 4 of them.
//! - A new name does not wait for names of another channel that hang, because 4 threads are for
//!   other channels. If C channels have hanging names, the name waits T for every 12 of C + 1.
//!   Etcd's clients have channels of their own, so that the names of services do not delay theirs.
//! - A new name behind N new names of its channel that hang waits T for every 8 of them: 1,250 s
//!   for 1,000 names and T = 10 s. If it is behind failing names that hang as well, for every 4.
//!   Next time all of these are failing names, and do not delay new ones.
//! - A failing name behind N failing names of its channel that hang waits T for every 4 of them.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::history::{Found, History, KEPT, Rank};

/// The most look-ups at a time of names of each [`Rank`] or a worse one.
type Limits = [usize; 3];

/// The limits for all channels together. The first is the number of threads.
pub(super) const OF_PROCESS: Limits = [16, 12, 8];

/// The limits of one channel.
pub(super) const OF_CHANNEL: Limits = [12, 8, 4];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ChannelId(u64);

/// A name that is being looked up.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) host: Arc<str>,
    channel: ChannelId,
    rank: Rank,
    started: Instant,
}

/// The caller's side of a look-up.
pub(super) enum Joined {
    /// The addresses from a look-up that ended after its callers had given up.
    Found(Arc<[SocketAddr]>),
    Pending(watch::Receiver<Option<Found>>),
}

/// The names that are wanted. Knows neither threads nor the resolver.
#[derive(Default)]
pub(super) struct Queue {
    /// The names that wait and those that are being looked up.
    pending: HashMap<Arc<str>, Pending>,
    /// The channels that have a waiting name or a running look-up.
    channels: HashMap<ChannelId, Channel>,
    /// The channels that have a waiting name. The first has the next turn.
    turns: VecDeque<ChannelId>,
    running: Running,
    history: History,
    /// Counts the names that were queued.
    queued: u64,
    last_channel: u64,
}

struct Pending {
    /// The receivers are the callers.
    result: watch::Sender<Option<Found>>,
    rank: Rank,
    /// When a caller last asked for the name.
    wanted: Instant,
    /// The channels in which the name waits. Empty once the look-up runs.
    waits_in: Vec<ChannelId>,
}

#[derive(Default)]
struct Channel {
    /// The waiting names of each [`Rank`] in order, with their numbers.
    waiting: [VecDeque<(u64, Arc<str>)>; 3],
    running: Running,
}

/// How many look-ups of each [`Rank`] or a worse one run.
#[derive(Debug, Default)]
struct Running([usize; 3]);

impl Running {
    fn has_room(&self, rank: Rank, limits: Limits) -> bool {
        let mut counts = self.0.iter().zip(limits).take(rank as usize + 1);
        counts.all(|(running, limit)| *running < limit)
    }

    fn add(&mut self, rank: Rank) {
        let counts = self.0.iter_mut().take(rank as usize + 1);
        counts.for_each(|running| *running += 1);
    }

    fn remove(&mut self, rank: Rank) {
        let counts = self.0.iter_mut().take(rank as usize + 1);
        counts.for_each(|running| *running -= 1);
    }
}

impl Channel {
    fn has_waiting(&self) -> bool {
        self.waiting.iter().any(|names| !names.is_empty())
    }

    fn is_idle(&self) -> bool {
        self.running.0[0] == 0 && !self.has_waiting()
    }

    /// The first name for which there is room.
    fn next(&self, of_process: &Running) -> Option<&Arc<str>> {
        let firsts = Rank::ALL.iter().filter_map(|rank| {
            let has_room =
                of_process.has_room(*rank, OF_PROCESS) && self.running.has_room(*rank, OF_CHANNEL);
            self.waiting[*rank as usize].front().filter(|_| has_room)
        });
        let first = firsts.min_by_key(|(number, _)| *number);
        first.map(|(_, host)| host)
    }

    fn remove(&mut self, host: &Arc<str>, rank: Rank) {
        let names = &mut self.waiting[rank as usize];
        let index = names.iter().position(|(_, name)| Arc::ptr_eq(name, host));
        index.and_then(|index| names.remove(index));
    }
}

impl Queue {
    pub(super) fn add_channel(&mut self) -> ChannelId {
        self.last_channel += 1;
        ChannelId(self.last_channel)
    }

    /// Removes the waiting names of a channel that has no callers any more.
    pub(super) fn remove_channel(&mut self, id: ChannelId) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        for (_, host) in channel.waiting.iter_mut().flat_map(std::mem::take) {
            if let Some(pending) = self.pending.get_mut(&host) {
                pending.waits_in.retain(|channel| *channel != id);
                if pending.waits_in.is_empty() {
                    self.pending.remove(&host);
                }
            }
        }
        self.turns.retain(|turn| *turn != id);
        self.remove_if_idle(id);
    }

    /// Joins the pending look-up of a name, or queues the name. A name that waits already keeps
    /// its turn.
    pub(super) fn join(&mut self, host: &str, channel: ChannelId, now: Instant) -> Joined {
        if let Some(found) = self.history.take_unclaimed(host, now) {
            return Joined::Found(found);
        }
        if let Some((host, pending)) = self.pending.get_key_value(host) {
            let result = pending.result.subscribe();
            let is_waiting = !pending.waits_in.is_empty();
            let host = Arc::clone(host);
            self.want(&host, channel, is_waiting, now);
            return Joined::Pending(result);
        }
        let host: Arc<str> = host.into();
        let (sender, result) = watch::channel(None);
        let pending = Pending {
            result: sender,
            rank: self.history.rank(&host),
            wanted: now,
            waits_in: Vec::new(),
        };
        self.pending.insert(Arc::clone(&host), pending);
        self.want(&host, channel, true, now);
        Joined::Pending(result)
    }

    /// Records that a caller of this channel wants a pending name.
    fn want(&mut self, host: &Arc<str>, id: ChannelId, is_waiting: bool, now: Instant) {
        let Some(pending) = self.pending.get_mut(host) else {
            return;
        };
        pending.wanted = now;
        if !is_waiting || pending.waits_in.contains(&id) {
            return;
        }
        pending.waits_in.push(id);
        let channel = self.channels.entry(id).or_default();
        if !channel.has_waiting() {
            self.turns.push_back(id);
        }
        self.queued += 1;
        channel.waiting[pending.rank as usize].push_back((self.queued, Arc::clone(host)));
    }

    /// Starts the next look-up for which there is room.
    pub(super) fn start_next(&mut self, now: Instant) -> Option<Job> {
        let mut index = 0;
        while let Some(id) = self.turns.get(index).copied() {
            let next = self.channels.get(&id)?.next(&self.running);
            let Some(host) = next.map(Arc::clone) else {
                index += 1;
                continue;
            };
            let rank = self.unqueue(&host)?;
            if self.is_abandoned(&host, now) {
                self.pending.remove(&host);
                // A channel before this one may have lost its last waiting name, too.
                index = 0;
                continue;
            }
            self.running.add(rank);
            let channel = self.channels.entry(id).or_default();
            channel.running.add(rank);
            if channel.has_waiting() {
                self.turns.retain(|turn| *turn != id);
                self.turns.push_back(id);
            }
            return Some(Job {
                host,
                channel: id,
                rank,
                started: now,
            });
        }
        None
    }

    /// Removes a name from the queues of its channels.
    fn unqueue(&mut self, host: &Arc<str>) -> Option<Rank> {
        let pending = self.pending.get_mut(host)?;
        let rank = pending.rank;
        for id in std::mem::take(&mut pending.waits_in) {
            if let Some(channel) = self.channels.get_mut(&id) {
                channel.remove(host, rank);
                if !channel.has_waiting() {
                    self.turns.retain(|turn| *turn != id);
                }
                self.remove_if_idle(id);
            }
        }
        Some(rank)
    }

    fn is_abandoned(&self, host: &Arc<str>, now: Instant) -> bool {
        self.pending.get(host).is_none_or(|pending| {
            pending.result.receiver_count() == 0 && now >= pending.wanted + KEPT
        })
    }

    /// Records the result of a look-up, and returns the sender to its callers.
    pub(super) fn finish(
        &mut self,
        job: &Job,
        found: &Found,
        now: Instant,
    ) -> Option<watch::Sender<Option<Found>>> {
        let rank = Rank::after(found, now - job.started);
        self.history.set_rank(&job.host, rank);
        let result = self.release(job)?;
        if let (Ok(found), 0) = (found, result.receiver_count()) {
            self.history.keep_unclaimed(&job.host, found, now);
        }
        Some(result)
    }

    /// Ends a look-up without a result.
    pub(super) fn release(&mut self, job: &Job) -> Option<watch::Sender<Option<Found>>> {
        self.running.remove(job.rank);
        if let Some(channel) = self.channels.get_mut(&job.channel) {
            channel.running.remove(job.rank);
        }
        self.remove_if_idle(job.channel);
        let pending = self.pending.remove(&job.host)?;
        Some(pending.result)
    }

    /// Whether a name waits for a thread.
    pub(super) fn is_waiting(&self, host: &str) -> bool {
        let pending = self.pending.get(host);
        pending.is_some_and(|pending| !pending.waits_in.is_empty())
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.channels.is_empty() && self.turns.is_empty()
    }

    fn remove_if_idle(&mut self, id: ChannelId) {
        if self.channels.get(&id).is_some_and(Channel::is_idle) {
            self.channels.remove(&id);
        }
    }
}
