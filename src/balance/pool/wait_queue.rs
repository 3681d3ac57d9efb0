//! The calls that wait for a stream, in the order in which they came.
//!
//! Streams are handed to the waiting calls: the task that serves the queue reserves a stream for
//! the first call, wakes it, and goes on with the next one. If each call reserved its stream itself
//! when it is woken, a call whose caller does not poll it, for example because another branch of a
//! `select!` is being executed, would hold up all calls behind it. Here such a call holds no more
//! than the one stream that it was given.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::balance::connection::Capacity;

/// A queue of waiting calls, each described by a `C`, for items of the type `T`.
#[derive(Debug)]
pub(crate) struct WaitQueue<C, T> {
    line: Mutex<Line<C, T>>,
    capacity: Arc<Capacity>,
}

#[derive(Debug)]
struct Line<C, T> {
    waiters: BTreeMap<Ticket, Waiter<C, T>>,
    /// How many tickets were given out.
    tickets: u64,
    /// Whether calls are no longer served.
    is_closed: bool,
}

/// A place in the queue. A call that waits again, because its attempt reached no server or is
/// retried, comes before all calls that started later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Ticket {
    call_started: Instant,
    number: u64,
}

#[derive(Debug)]
struct Waiter<C, T> {
    call: C,
    sender: oneshot::Sender<T>,
}

impl<C, T> WaitQueue<C, T> {
    pub(crate) fn new(capacity: Arc<Capacity>) -> Self {
        let line = Line {
            waiters: BTreeMap::new(),
            tickets: 0,
            is_closed: false,
        };
        Self {
            line: Mutex::new(line),
            capacity,
        }
    }

    /// Waits until the call is served. Returns `None` if it was refused or the queue is closed.
    ///
    /// Dropping the future leaves the queue. An item that the call was given by then is dropped.
    pub(crate) async fn wait(&self, call_started: Instant, call: C) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        let _place = self.join(call_started, Waiter { call, sender });
        // Whatever was free before the call had its place is found now.
        self.capacity.notify();
        receiver.await.ok()
    }

    fn join(&self, call_started: Instant, waiter: Waiter<C, T>) -> Place<'_, C, T> {
        let mut line = self.line.lock();
        let ticket = Ticket {
            call_started,
            number: line.tickets,
        };
        line.tickets += 1;
        if !line.is_closed {
            line.waiters.insert(ticket, waiter);
            self.capacity.set_waiting(line.waiters.len());
        }
        Place {
            queue: self,
            ticket,
        }
    }

    fn leave(&self, ticket: Ticket) {
        let mut line = self.line.lock();
        let left = line.waiters.remove(&ticket);
        self.capacity.set_waiting(line.waiters.len());
        drop(line);
        drop(left);
    }

    /// Gives the first call what `reserve` returns for it. Returns false if no call waits, or if
    /// there is nothing for the first one.
    pub(crate) fn serve_first(&self, reserve: impl FnOnce(&C) -> Option<T>) -> bool {
        let mut line = self.line.lock();
        let Some(first) = line.waiters.first_entry() else {
            return false;
        };
        let Some(item) = reserve(&first.get().call) else {
            return false;
        };
        let waiter = first.remove();
        self.capacity.set_waiting(line.waiters.len());
        drop(line);
        // Fails if the call is about to leave. Dropping the item then makes it free again.
        let _ = waiter.sender.send(item);
        true
    }

    /// Ends the wait of every call, now and later.
    pub(crate) fn close(&self) {
        self.line.lock().is_closed = true;
        self.refuse(|_| true);
    }

    /// Ends the wait of each call that `is_refused` matches.
    pub(crate) fn refuse(&self, is_refused: impl Fn(&C) -> bool) {
        let mut line = self.line.lock();
        let waiters = std::mem::take(&mut line.waiters);
        let (refused, others): (BTreeMap<_, _>, _) = waiters
            .into_iter()
            .partition(|(_, waiter)| is_refused(&waiter.call));
        line.waiters = others;
        self.capacity.set_waiting(line.waiters.len());
        drop(line);
        drop(refused);
    }
}

/// Leaves the queue when dropped.
struct Place<'a, C, T> {
    queue: &'a WaitQueue<C, T>,
    ticket: Ticket,
}

impl<C, T> Drop for Place<'_, C, T> {
    fn drop(&mut self) {
        self.queue.leave(self.ticket);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::Poll;
    use std::time::Duration;

    use futures::poll;
    use tokio::time::advance;

    use super::*;

    /// Each call is described by whether it is refused.
    type Queue<T> = WaitQueue<bool, T>;
    type Waiting<'a, T> = Pin<Box<dyn Future<Output = Option<T>> + 'a>>;

    fn queue<T>() -> Queue<T> {
        WaitQueue::new(Arc::default())
    }

    /// Starts a call that waits.
    async fn start<'a, T>(queue: &'a Queue<T>, started: Instant, is_refused: bool) -> Waiting<'a, T>
    where
        T: std::fmt::Debug + PartialEq,
    {
        let mut waiting: Waiting<'a, T> = Box::pin(queue.wait(started, is_refused));
        assert_eq!(poll!(&mut waiting), Poll::Pending);
        waiting
    }

    #[tokio::test(start_paused = true)]
    async fn calls_are_served_in_order() {
        let (queue, now) = (queue(), Instant::now());
        let mut calls = [
            start(&queue, now, false).await,
            start(&queue, now, false).await,
            start(&queue, now, false).await,
        ];
        let mut items = [1, 2].into_iter();
        while queue.serve_first(|_| items.next()) {}
        assert_eq!(poll!(&mut calls[2]), Poll::Pending);
        assert_eq!(poll!(&mut calls[1]), Poll::Ready(Some(2)));
        assert_eq!(poll!(&mut calls[0]), Poll::Ready(Some(1)));
        assert!(queue.capacity.is_awaited());
        assert!(queue.serve_first(|_| Some(3)));
        assert!(!queue.capacity.is_awaited());
        assert!(!queue.serve_first(|_| Some(4)), "no call waits");
    }

    #[tokio::test(start_paused = true)]
    async fn call_that_waits_again_comes_before_later_ones() {
        let (queue, started) = (queue(), Instant::now());
        advance(Duration::from_millis(1)).await;
        let mut later = start(&queue, Instant::now(), false).await;
        let mut again = start(&queue, started, false).await;
        assert!(queue.serve_first(|_| Some(1)));
        assert_eq!(poll!(&mut later), Poll::Pending);
        assert_eq!(poll!(&mut again), Poll::Ready(Some(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn closed_queue_ends_waits_now_and_later() {
        let (queue, now) = (queue::<u32>(), Instant::now());
        let mut before = start(&queue, now, false).await;
        queue.close();
        assert_eq!(poll!(&mut before), Poll::Ready(None));
        assert_eq!(queue.wait(now, false).await, None);
        assert!(!queue.capacity.is_awaited());
    }

    #[tokio::test(start_paused = true)]
    async fn call_that_is_not_polled_holds_up_no_other() {
        let (queue, now) = (queue(), Instant::now());
        let unpolled = start(&queue, now, false).await;
        let mut next = start(&queue, now, false).await;
        assert!(queue.serve_first(|_| Some(1)));
        assert!(queue.serve_first(|_| Some(2)));
        assert_eq!(poll!(&mut next), Poll::Ready(Some(2)));
        drop(unpolled);
    }

    #[tokio::test(start_paused = true)]
    async fn cancelled_call_gives_its_item_back() {
        let (queue, now) = (queue(), Instant::now());
        let item = Arc::new(());
        let served = start(&queue, now, false).await;
        let cancelled = start(&queue, now, false).await;
        let mut last = start(&queue, now, false).await;
        assert!(queue.serve_first(|_| Some(Arc::clone(&item))));
        assert_eq!(Arc::strong_count(&item), 2);
        drop(served);
        assert_eq!(Arc::strong_count(&item), 1);
        drop(cancelled);
        assert!(queue.serve_first(|_| Some(Arc::clone(&item))));
        assert!(poll!(&mut last).is_ready());
        assert!(!queue.capacity.is_awaited());
    }

    #[tokio::test(start_paused = true)]
    async fn only_matching_calls_are_refused() {
        let (queue, now) = (queue(), Instant::now());
        let mut refused = start(&queue, now, true).await;
        let mut other = start(&queue, now, false).await;
        queue.refuse(|is_refused| *is_refused);
        assert_eq!(poll!(&mut refused), Poll::Ready(None));
        assert_eq!(poll!(&mut other), Poll::Pending);
        assert!(queue.serve_first(|_| Some(1)));
        assert_eq!(poll!(&mut other), Poll::Ready(Some(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn first_call_without_an_item_keeps_its_place() {
        let (queue, now) = (queue(), Instant::now());
        let mut first = start(&queue, now, false).await;
        let mut second = start(&queue, now, false).await;
        assert!(!queue.serve_first(|_| None));
        assert!(queue.serve_first(|_| Some(1)));
        assert_eq!(poll!(&mut first), Poll::Ready(Some(1)));
        assert_eq!(poll!(&mut second), Poll::Pending);
    }
}
