//! Elections.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Compare, Event, KeyValue};
use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::time::sleep;

use super::entry::QueueEntry;
use super::queue::Queue;
use crate::backoff::Backoff;
use crate::client::handle::Client;
use crate::client::watch::Watch;
use crate::error::{Error, Result};

/// The leadership of an election, from [`Client::campaign`].
///
/// A leadership is lost in the same cases as a [`Lock`](super::Lock), and needs the same caution.
/// Dropping it resigns in the background; [`resign`](Self::resign) waits until that is done.
#[derive(Debug)]
#[must_use = "dropping a `Leadership` resigns"]
pub struct Leadership {
    entry: QueueEntry,
}

/// Elections, shared with Go's `concurrency.Election` and `etcdctl elect` of the same name. Only
/// keys of the form `NAME/LEASE` count, as for [locks](Client::lock).
impl Client {
    /// Waits until this client is elected. [`leader`](Self::leader) and [`observe`](Self::observe)
    /// then show `value` to all clients.
    ///
    /// `ttl` is rounded up to whole seconds; etcd's minimum is 2 s. If this process dies or is cut
    /// off, the next client is elected after that time.
    ///
    /// The wait has no time limit. Dropping the future leaves the queue.
    ///
    /// # Errors
    ///
    /// The errors of [`Client::lock`].
    pub async fn campaign(
        &self,
        name: impl Into<Vec<u8>>,
        value: impl Into<Vec<u8>>,
        ttl: Duration,
    ) -> Result<Leadership> {
        let entry = QueueEntry::new(self, &name.into(), value.into(), ttl).await?;
        entry.wait_until_first().await?;
        Ok(Leadership { entry })
    }

    /// The leader's key and value; `None` while there is no leader.
    ///
    /// # Errors
    ///
    /// The errors of [`Client::get`].
    pub async fn leader(&self, name: impl Into<Vec<u8>>) -> Result<Option<KeyValue>> {
        Ok(Queue::new(self, &name.into()).first().await?.0)
    }

    /// Follows the leaders of an election and their values. See [`Leaders`].
    pub fn observe(&self, name: impl Into<Vec<u8>>) -> Leaders {
        let observer = LeaderObserver {
            queue: Queue::new(self, &name.into()),
            watch: None,
            latest: None,
        };
        let leaders = unfold(Some(observer), |observer| async {
            let mut observer = observer?;
            match observer.next().await {
                Ok(leader) => Some((Ok(leader), Some(observer))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Leaders {
            leaders: leaders.boxed(),
        }
    }
}

impl Leadership {
    /// The leader's key.
    pub fn key(&self) -> &[u8] {
        self.entry.key()
    }

    /// A fencing token: a number that grows with each leader, across all clients.
    ///
    /// The number is the create revision of [`key`](Self::key), as `Election.Rev()` in Go. Do not
    /// use `Election.Header().Revision`, which is another number.
    pub fn revision(&self) -> i64 {
        self.entry.revision()
    }

    /// A comparison for transactions, which holds only while this client is the leader.
    pub fn ownership(&self) -> Compare {
        self.entry.ownership()
    }

    /// Replaces the leader's value.
    ///
    /// Dropping the future cancels the call. The value may or may not have been replaced.
    ///
    /// # Errors
    ///
    /// - [`Error::LeaseNotFound`], [`Error::LeaseUnconfirmed`]: the leadership is lost.
    /// - [`Error::KeyLost`]: the leadership is lost, because another client deleted or overwrote
    ///   its key.
    /// - The errors of [`Client::put`].
    pub async fn proclaim(&self, value: impl Into<Vec<u8>>) -> Result<()> {
        self.entry.set_value(value.into()).await
    }

    /// Whether this client leads: no loss is known, and the TTL has not passed since the last
    /// confirmed renewal was sent. Once false, it stays false.
    pub fn is_held(&self) -> bool {
        self.entry.is_held()
    }

    /// Resolves with the reason when the leadership is lost or may be lost, at once if it is.
    /// Dropping the future has no effect.
    pub async fn lost(&self) -> Error {
        self.entry.lost().await
    }

    /// Resigns. Succeeds if the leadership was lost before.
    ///
    /// Dropping the future resigns in the background, as dropping the leadership does.
    ///
    /// # Errors
    ///
    /// The errors of [`Client::revoke`]. The next client is then elected when the lease expires.
    pub async fn resign(self) -> Result<()> {
        self.entry.release().await
    }
}

/// The leaders of an election, from [`Client::observe`].
///
/// Yields the current leader, then each new leader and each new value. If they change faster than
/// the stream is polled, only the latest is yielded. While etcd cannot be reached, the stream
/// yields nothing.
///
/// The stream ends after an error that no retry can help with: [`Error::Closed`], or [`Error::Rpc`]
/// if etcd refuses the user.
#[must_use = "streams do nothing unless polled"]
pub struct Leaders {
    leaders: BoxStream<'static, Result<KeyValue>>,
}

impl Stream for Leaders {
    type Item = Result<KeyValue>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.leaders.poll_next_unpin(cx)
    }
}

impl fmt::Debug for Leaders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaders").finish_non_exhaustive()
    }
}

/// The state of a [`Leaders`] stream.
struct LeaderObserver {
    queue: Queue,
    watch: Option<Watch>,
    /// The leader that was found last.
    latest: Option<KeyValue>,
}

impl LeaderObserver {
    async fn next(&mut self) -> Result<KeyValue> {
        let mut backoff = Backoff::for_etcd();
        loop {
            match self.wait_for_change().await {
                Ok(Some(leader)) => return Ok(leader),
                Ok(None) => backoff.reset(),
                Err(error) if error.is_permanent() => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "cannot follow the leader, retrying");
                    self.watch = None;
                    sleep(backoff.next()).await;
                }
            }
        }
    }

    /// Waits for a change in the queue. Returns the leader if it or its value is new.
    async fn wait_for_change(&mut self) -> Result<Option<KeyValue>> {
        if let Some(watch) = &mut self.watch {
            match watch.next().await {
                Some(Ok(changes)) => {
                    // Many other keys may change in the range of the queue.
                    if !changes.events().iter().any(|event| self.may_change(event)) {
                        return Ok(None);
                    }
                }
                Some(Err(Error::Closed { name })) => return Err(Error::Closed { name }),
                // The leaders since then are not needed, so another watch starts from now.
                _ => self.watch = None,
            }
        }
        let (leader, revision) = self.queue.first().await?;
        if self.watch.is_none() {
            self.watch = Some(self.queue.watch(revision).await?);
        }
        let version = |leader: &KeyValue| (leader.create_revision(), leader.mod_revision());
        let is_new = leader.as_ref().map(version) != self.latest.as_ref().map(version);
        self.latest = leader;
        Ok(self.latest.clone().filter(|_| is_new))
    }

    /// Whether the leader or its value may be another one after an event. Later entries do not
    /// matter while there is a leader.
    fn may_change(&self, event: &Event) -> bool {
        match &self.latest {
            Some(leader) => event.kv().is_some_and(|kv| kv.key() == leader.key()),
            None => self.queue.is_entered_by(event),
        }
    }
}
