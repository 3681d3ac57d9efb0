//! Performs the actions of the state machine: lists, watches and waits.

use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep};

use super::event::{Action, Event, Fingerprint, Page};
use super::list_watch::{ListWatch, WatchStream};
use super::publisher::Publisher;
use super::state::ListWatchState;
use crate::backoff::Backoff;
use crate::client::etcd_error::EtcdError;
use crate::error::{Error, Result};
use crate::time::sleep_until;

/// Keys per page of a list. A registration has a few hundred bytes, so a page stays well under the
/// limit of a message (2 MiB by default).
const PAGE_SIZE: i64 = 1_000;

/// A watch that was open for this long was not lost to a fault that still lasts, so the backoff
/// starts over.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// If a list and the opening of its watch take longer than this together, the driver verifies that
/// both are of the same history. Stopping, wiping and starting etcd takes longer.
const VERIFY_AFTER: Duration = Duration::from_millis(500);

/// After the loss of a watch, the next list starts at a random moment within this time: a thousand
/// clients of one member lose their watches together, and a list is their most expensive request.
const RELIST_WITHIN: Duration = Duration::from_millis(500);

/// Performs the actions of one [`ListWatchState`].
#[derive(Debug)]
pub(super) struct Driver<S> {
    list_watch: S,
    /// Halved when a page exceeds the size of a message.
    page_size: i64,
    backoff: Backoff,
    /// When the first page of the last list was requested.
    list_started: Instant,
    /// When the watch was opened, until its loss is handled.
    watch_opened: Option<Instant>,
}

impl<S: ListWatch> Driver<S> {
    pub(super) fn new(list_watch: S) -> Self {
        Self {
            list_watch,
            page_size: PAGE_SIZE,
            backoff: Backoff::for_etcd(),
            list_started: Instant::now(),
            watch_opened: None,
        }
    }

    /// Lists the range and opens the watch, without retries after an error, because the caller
    /// wants to know it. Lists again if etcd was compacted or wiped between list and watch, and
    /// reports so before it creates the watch. Otherwise the watch ends, and `follow` lists again.
    pub(super) async fn list_and_watch(
        &mut self,
        state: &mut ListWatchState<S::Watch>,
    ) -> Result<()> {
        while !state.is_live() {
            let event = match self.perform(state.action()).await {
                Err(error) if is_history_lost(&error) => lost_event(&error),
                result => result?,
            };
            state.step(event, SystemTime::now());
        }
        Ok(())
    }

    /// Follows the range and publishes its changes until the client is closed. Lists again after
    /// every other error.
    pub(super) async fn follow(
        &mut self,
        state: &mut ListWatchState<S::Watch>,
        publisher: &mut Publisher<'_>,
    ) {
        self.watch_opened = state.is_live().then(Instant::now);
        loop {
            let result = tokio::select! {
                biased;
                result = self.perform(state.action()) => result,
                // Interrupts only a wait for changes, which is cancel-safe: while the snapshot is
                // stale, nothing stays pending.
                () = sleep_until(publisher.deadline()) => {
                    publisher.publish(state);
                    continue;
                }
            };
            let is_closed = result.as_ref().is_err_and(Error::is_closed);
            let event = result.unwrap_or_else(|error| {
                tracing::debug!(service = state.service(), %error, "list or watch failed");
                lost_event(&error)
            });
            let changed = state.step(event, SystemTime::now());
            publisher.update(state, changed);
            if is_closed {
                return;
            }
        }
    }

    async fn perform(&mut self, action: Action<'_, S::Watch>) -> Result<Event<S::Watch>> {
        match action {
            Action::List { from, revision } => {
                if revision.is_none() {
                    self.list_started = Instant::now();
                }
                Ok(Event::Page(self.list(from, revision).await?))
            }
            Action::Watch {
                from_revision,
                listed,
            } => {
                let watch = self.open_watch(from_revision, listed).await?;
                self.watch_opened = Some(Instant::now());
                Ok(Event::WatchOpened(watch))
            }
            Action::Receive(watch) => Ok(Event::Changes(watch.next().await?)),
            Action::Backoff => {
                sleep(self.next_pause()).await;
                Ok(Event::BackoffElapsed)
            }
        }
    }

    async fn list(&mut self, from: &[u8], revision: Option<i64>) -> Result<Page> {
        loop {
            match self.list_watch.list(from, revision, self.page_size).await {
                // The page exceeds the message limit: request fewer keys from here on.
                Err(error)
                    if self.page_size > 1 && EtcdError::of(&error) == EtcdError::TooLarge =>
                {
                    self.page_size /= 2;
                }
                result => return result,
            }
        }
    }

    async fn open_watch(&mut self, from_revision: i64, listed: Fingerprint) -> Result<S::Watch> {
        let watch = self.list_watch.watch(from_revision).await?;
        // A watch from a future revision is silent until that revision exists. A member that lags
        // behind gets there, but an etcd that was wiped would hide its new history up to there.
        let seen = from_revision - 1;
        if watch.revision() < seen {
            let now = self.list_watch.current_revision().await?;
            if now < seen {
                return Err(Error::RevisionWentBack { seen, now });
            }
        }
        // An etcd that was wiped and has passed the listed revision since has other keys there.
        if self.list_started.elapsed() > VERIFY_AFTER
            && self.list_watch.fingerprint(seen).await? != listed
        {
            return Err(Error::DataReplaced {
                operation: self.list_watch.operation(),
            });
        }
        Ok(watch)
    }

    /// The pause before the next list: a random moment after the loss of a watch, a backoff after
    /// further failures.
    fn next_pause(&mut self) -> Duration {
        match self.watch_opened.take() {
            Some(opened) => {
                if opened.elapsed() >= STABLE_AFTER {
                    self.backoff.reset();
                }
                RELIST_WITHIN.mul_f64(fastrand::f64())
            }
            None => self.backoff.next(),
        }
    }
}

fn lost_event<W>(error: &Error) -> Event<W> {
    Event::Lost {
        reason: error.to_string(),
    }
}

/// Whether a new list would succeed, because etcd has compacted or replaced the listed history.
fn is_history_lost(error: &Error) -> bool {
    matches!(
        error,
        Error::RevisionWentBack { .. } | Error::DataReplaced { .. }
    ) || EtcdError::of(error) == EtcdError::Compacted
}

#[cfg(test)]
mod tests;
#[cfg(all(test, feature = "testing"))]
mod tests_on_etcd;
