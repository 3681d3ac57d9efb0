//! Elections.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Compare, GetOptions, KeyValue, SortOrder, SortTarget};
use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::time::sleep;

use super::queue::{QueueEntry, queue_prefix};
use crate::backoff::Backoff;
use crate::client::handle::Client;
use crate::client::watch::{Watch, WatchOptions};
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

/// Elections, shared with Go's `concurrency.Election` and `etcdctl elect` of the same name.
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
        Ok(self.find_leader(&queue_prefix(&name.into())).await?.0)
    }

    /// The first entry of the queue, and etcd's revision at that time.
    async fn find_leader(&self, prefix: &[u8]) -> Result<(Option<KeyValue>, i64)> {
        let options = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Create, SortOrder::Ascend)
            .with_limit(1);
        let found = self.get(prefix, options).await?;
        let revision = found.header().map_or(0, |header| header.revision());
        Ok((found.kvs().first().cloned(), revision))
    }

    /// Follows the leaders of an election and their values. See [`Leaders`].
    pub fn observe(&self, name: impl Into<Vec<u8>>) -> Leaders {
        let observer = LeaderObserver {
            client: self.clone(),
            prefix: queue_prefix(&name.into()),
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

    /// A fencing token: a number that grows with each leader.
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
    /// - [`Error::KeyLost`]: the leadership is lost, because another client deleted its key.
    /// - The errors of [`Client::put`].
    pub async fn proclaim(&self, value: impl Into<Vec<u8>>) -> Result<()> {
        self.entry.set_value(value.into()).await
    }

    /// Whether this client leads, as far as it knows.
    pub fn is_held(&self) -> bool {
        self.entry.is_held()
    }

    /// Resolves with the reason when the leadership is lost or may be lost. Dropping the future has
    /// no effect.
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
    client: Client,
    prefix: Vec<u8>,
    watch: Option<Watch>,
    /// The key and modification revision of the leader that was yielded last.
    latest: Option<(Vec<u8>, i64)>,
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
                Some(Ok(_)) => {}
                Some(Err(Error::Closed { name })) => return Err(Error::Closed { name }),
                // The leaders since then are not needed, so another watch starts from now.
                _ => self.watch = None,
            }
        }
        let (leader, revision) = self.client.find_leader(&self.prefix).await?;
        if self.watch.is_none() {
            let options = WatchOptions::new()
                .with_prefix()
                .with_start_revision(revision + 1);
            self.watch = Some(self.client.watch(self.prefix.as_slice(), options).await?);
        }
        let Some(leader) = leader else {
            return Ok(None);
        };
        let latest = Some((leader.key().to_owned(), leader.mod_revision()));
        let is_new = self.latest != latest;
        self.latest = latest;
        Ok(is_new.then_some(leader))
    }
}
