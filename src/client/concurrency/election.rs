//! Elections.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use etcd_client::{Compare, GetOptions, KeyValue, SortOrder, SortTarget};
use futures::stream::{BoxStream, Stream, StreamExt, unfold};

use super::queue::{Claim, queue};
use crate::backoff::Backoff;
use crate::client::handle::Client;
use crate::client::watch::{Watch, WatchOptions};
use crate::error::{Error, Result};

/// Being the leader, from [`Client::campaign`].
///
/// It lasts as long as its lease is renewed, as a [`Lock`](super::Lock) does, with the same caution.
/// Dropping it resigns in the background; [`resign`](Self::resign) waits for that.
#[derive(Debug)]
#[must_use = "a leader that is dropped resigns"]
pub struct Leadership {
    claim: Claim,
}

/// Elections. They are those of Go's `concurrency.Election` and of `etcdctl elect` under the same name.
impl Client {
    /// Waits until it is elected, however long it takes, and leads with this value, which
    /// [`leader`](Self::leader) and [`observe`](Self::observe) show to all. After `ttl` seconds without
    /// a sign of this process the next one is elected; etcd's minimum is 2.
    ///
    /// Dropping the future leaves the queue.
    ///
    /// # Errors
    ///
    /// As for [`Client::lock`].
    pub async fn campaign(
        &self,
        name: impl Into<Vec<u8>>,
        value: impl Into<Vec<u8>>,
        ttl: i64,
    ) -> Result<Leadership> {
        let claim = Claim::new(self, &name.into(), value.into(), ttl).await?;
        claim.first().await?;
        Ok(Leadership { claim })
    }

    /// The leader's key and value, `None` while there is none.
    ///
    /// # Errors
    ///
    /// As for [`Client::get`].
    pub async fn leader(&self, name: impl Into<Vec<u8>>) -> Result<Option<KeyValue>> {
        Ok(self.find_leader(&queue(&name.into())).await?.0)
    }

    async fn find_leader(&self, queue: &[u8]) -> Result<(Option<KeyValue>, i64)> {
        let options = GetOptions::new()
            .with_prefix()
            .with_sort(SortTarget::Create, SortOrder::Ascend)
            .with_limit(1);
        let found = self.get(queue, options).await?;
        let revision = found.header().map_or(0, |header| header.revision());
        Ok((found.kvs().first().cloned(), revision))
    }

    /// Follows who leads, and with which value. See [`Leaders`].
    pub fn observe(&self, name: impl Into<Vec<u8>>) -> Leaders {
        let observer = Observer {
            client: self.clone(),
            queue: queue(&name.into()),
            watch: None,
            shown: None,
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
        self.claim.key()
    }

    /// A number that is greater with each leader.
    pub fn revision(&self) -> i64 {
        self.claim.revision()
    }

    /// Holds in a transaction if and only if this is the leader at that moment.
    pub fn guard(&self) -> Compare {
        self.claim.guard()
    }

    /// Leads on with another value.
    ///
    /// # Errors
    ///
    /// [`Error::LeaseNotFound`] and [`Error::LeaseUnconfirmed`] when it leads no more, [`Error::Rpc`]
    /// with `FailedPrecondition` when that is because somebody has deleted its key; else as for
    /// [`Client::put`].
    pub async fn proclaim(&self, value: impl Into<Vec<u8>>) -> Result<()> {
        self.claim.set(value.into()).await
    }

    /// Whether it leads, as far as is known here.
    pub fn is_held(&self) -> bool {
        self.claim.is_held()
    }

    /// Resolves when it leads no more, or may not, with the reason.
    pub async fn lost(&self) -> Error {
        self.claim.lost().await
    }

    /// Resigns. That it led no more is no error.
    ///
    /// # Errors
    ///
    /// As for [`Client::revoke`]; the next is then elected when the lease runs out.
    pub async fn resign(self) -> Result<()> {
        self.claim.give_up().await
    }
}

/// The leaders of an election, from [`Client::observe`]: the present one, then each new one and each new
/// value. Where they change faster than this is polled, the latest.
///
/// While etcd cannot be reached it is merely quiet. It ends after an error that no repetition can mend:
/// [`Error::Closed`], or [`Error::Rpc`] when etcd refuses the user.
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

struct Observer {
    client: Client,
    queue: Vec<u8>,
    watch: Option<Watch>,
    /// Which key was shown last, at which revision of it.
    shown: Option<(Vec<u8>, i64)>,
}

impl Observer {
    async fn next(&mut self) -> Result<KeyValue> {
        let mut pauses = Backoff::for_etcd();
        loop {
            match self.look().await {
                Ok(Some(leader)) => return Ok(leader),
                Ok(None) => pauses.reset(),
                Err(error) if error.is_permanent() || matches!(error, Error::Closed { .. }) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::debug!(%error, "looking for the leader");
                    self.watch = None;
                    tokio::time::sleep(pauses.next()).await;
                }
            }
        }
    }

    /// Waits for a change, and returns the leader if it is another, or another value.
    async fn look(&mut self) -> Result<Option<KeyValue>> {
        if let Some(watch) = &mut self.watch {
            match watch.next().await {
                Some(Ok(_)) => {}
                Some(Err(Error::Closed { name })) => return Err(Error::Closed { name }),
                // What there was in between is not needed.
                _ => self.watch = None,
            }
        }
        let (leader, revision) = self.client.find_leader(&self.queue).await?;
        if self.watch.is_none() {
            let options = WatchOptions::new()
                .with_prefix()
                .with_start_revision(revision + 1);
            self.watch = Some(self.client.watch(self.queue.as_slice(), options).await?);
        }
        let Some(leader) = leader else {
            return Ok(None);
        };
        let shown = Some((leader.key().to_owned(), leader.mod_revision()));
        let is_new = self.shown != shown;
        self.shown = shown;
        Ok(is_new.then_some(leader))
    }
}
