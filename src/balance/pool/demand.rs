//! Turns to connect for waiting calls.
//!
//! A waiting call cuts the pause before the next attempt to connect short, but not the pauses of
//! all endpoints: a channel with a thousand endpoints that closed their idle connections would make
//! a thousand connections for one call. As many attempts run at a time as calls wait. The next
//! paused connection follows when an attempt fails or takes long, or when other calls have taken
//! all streams of the connection that was made.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::endpoint::Endpoint;
use crate::balance::connection::Capacity;

/// How long an attempt keeps its turn at most. "Connection Attempt Delay" of RFC 8305, section 5,
/// which gRPC's pick_first uses too (gRFC A61).
const TURN: Duration = Duration::from_millis(250);

/// The connections that pause until a call waits, and the attempts that are made for waiting calls.
#[derive(Debug)]
pub(crate) struct Demand {
    /// Knows how many calls wait.
    capacity: Arc<Capacity>,
    line: Mutex<Line>,
}

#[derive(Debug, Default)]
struct Line {
    /// In the order in which they began to wait for a call.
    paused: BTreeMap<u64, Paused>,
    /// How many connections have begun to wait for a call.
    tickets: u64,
    /// The connections whose turns have not ended, by the tickets that they had.
    turns: BTreeMap<u64, ConnectionSlot>,
}

#[derive(Debug)]
struct Paused {
    slot: ConnectionSlot,
    sender: oneshot::Sender<Turn>,
}

/// One of the connections of an endpoint.
#[derive(Debug)]
struct ConnectionSlot {
    endpoint: Arc<Endpoint>,
    index: usize,
}

impl Demand {
    pub(crate) fn new(capacity: Arc<Capacity>) -> Self {
        Self {
            capacity,
            line: Mutex::default(),
        }
    }

    /// Waits until a connection of an endpoint should be made for a waiting call.
    pub(super) async fn wait_for_turn(
        self: &Arc<Self>,
        endpoint: &Arc<Endpoint>,
        index: usize,
    ) -> Turn {
        let (sender, receiver) = oneshot::channel();
        let endpoint = Arc::clone(endpoint);
        let slot = ConnectionSlot { endpoint, index };
        let _place = self.join(Paused { slot, sender });
        // Calls may wait already.
        self.give_turns();
        match receiver.await {
            Ok(turn) => turn,
            // Unreachable, because the sender stays in the line until it is used.
            Err(_) => std::future::pending().await,
        }
    }

    fn join(&self, paused: Paused) -> Place<'_> {
        let mut line = self.line.lock();
        let ticket = line.tickets;
        line.tickets += 1;
        line.paused.insert(ticket, paused);
        Place {
            demand: self,
            ticket,
        }
    }

    /// Gives turns until there are as many as calls that wait. Called whenever a call waits, a
    /// connection pauses, or a turn ends.
    pub(super) fn give_turns(self: &Arc<Self>) {
        while let Some((ticket, sender)) = self.next() {
            let demand = Arc::clone(self);
            let turn = Turn { demand, ticket };
            // Fails if the pause is over. Dropping the turn then gives it to the next one.
            let _ = sender.send(turn);
        }
    }

    /// Takes the first connection that should be made for a call, and counts its turn.
    fn next(&self) -> Option<(u64, oneshot::Sender<Turn>)> {
        let line = &mut *self.line.lock();
        let waiting = self.capacity.waiting();
        if waiting == 0 || line.paused.is_empty() {
            return None;
        }
        if line.turns.len() >= waiting {
            // The calls that still wait cannot use these connections.
            line.turns
                .retain(|_, slot| !slot.endpoint.is_slot_full(slot.index));
        }
        if line.turns.len() >= waiting {
            return None;
        }
        // Draining endpoints get no calls.
        let mut paused = line.paused.iter();
        let (&ticket, _) = paused.find(|(_, paused)| paused.slot.endpoint.accepts_calls())?;
        let Paused { slot, sender } = line.paused.remove(&ticket)?;
        line.turns.insert(ticket, slot);
        Some((ticket, sender))
    }
}

/// Leaves the line when dropped.
struct Place<'a> {
    demand: &'a Demand,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let left = self.demand.line.lock().paused.remove(&self.ticket);
        drop(left);
    }
}

/// The turn of a connection to be made for a waiting call. Ends when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    demand: Arc<Demand>,
    ticket: u64,
}

impl Turn {
    /// Runs an attempt to connect, and what follows if it succeeds. The turn ends with it, or after
    /// [`TURN`]. An attempt that takes longer continues beside that of the next turn.
    pub(super) async fn run<T>(turn: Option<Self>, attempt: impl Future<Output = T>) -> T {
        let mut attempt = pin!(attempt);
        if turn.is_some()
            && let Ok(output) = timeout(TURN, &mut attempt).await
        {
            return output;
        }
        drop(turn);
        attempt.await
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let ended = self.demand.line.lock().turns.remove(&self.ticket);
        drop(ended);
        self.demand.give_turns();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::balance::connection::Target;
    use crate::instance::Instance;

    #[tokio::test(start_paused = true)]
    async fn turn_of_a_pause_that_is_over_goes_to_the_next() {
        let capacity = Arc::<Capacity>::default();
        let demand = Arc::new(Demand::new(Arc::clone(&capacity)));
        let instance = Instance::new("echo", "host:1");
        let target = Target::new(&instance, false).unwrap();
        let endpoint = Arc::new(Endpoint::new(target, &instance, 1));
        let mut over = Box::pin(demand.wait_for_turn(&endpoint, 0));
        let mut next = Box::pin(demand.wait_for_turn(&endpoint, 0));
        let mut last = Box::pin(demand.wait_for_turn(&endpoint, 0));
        assert!((&mut over).now_or_never().is_none());
        assert!((&mut next).now_or_never().is_none());
        assert!((&mut last).now_or_never().is_none());

        capacity.set_waiting(1);
        demand.give_turns();
        assert!((&mut next).now_or_never().is_none());
        drop(over);
        let turn = (&mut next).now_or_never().unwrap();
        assert!((&mut last).now_or_never().is_none());
        capacity.set_waiting(0);
        drop(turn);
        assert!((&mut last).now_or_never().is_none());
        capacity.set_waiting(1);
        assert!(demand.wait_for_turn(&endpoint, 0).now_or_never().is_none());
        assert!((&mut last).now_or_never().is_some());
    }
}
