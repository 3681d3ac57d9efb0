//! Locks.

use etcd_client::Compare;

use super::queue::Claim;
use crate::client::handle::Client;
use crate::error::{Error, Result};

/// A lock that is held, from [`Client::lock`].
///
/// It is held as long as its lease is renewed, which happens in the background. When that cannot be
/// done for the whole TTL, the lease may have expired and another may hold the lock. Another may also
/// hold it when somebody deletes its key. [`lost`](Self::lost) resolves then, and whatever was done
/// under the lock must stop.
///
/// No lock of this kind can stop a process that has stood still from going on after it has lost it. What
/// must never be done twice belongs into a transaction with [`guard`](Self::guard).
///
/// Dropping it gives it up in the background; [`unlock`](Self::unlock) waits for that.
///
/// ```no_run
/// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
/// # async fn work() {}
/// let lock = client.lock("nightly-report", 10).await?;
/// tokio::select! {
///     () = work() => lock.unlock().await?,
///     why = lock.lost() => return Err(why),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a lock that is dropped is given up"]
pub struct Lock {
    claim: Claim,
}

/// Locks. They exclude those of Go's `concurrency.Mutex` and of `etcdctl lock` under the same name.
impl Client {
    /// Waits for the lock of this name, however long it takes, and holds it. First come, first served.
    /// After `ttl` seconds without a sign of this process others get it; etcd's minimum is 2.
    ///
    /// While it waits, it stands the failure of members. Dropping the future leaves the queue.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a TTL below 1. As for [`Client::put`] when it cannot enter the queue;
    /// [`Error::LeaseUnconfirmed`] or [`Error::LeaseNotFound`] when it loses its place there, and
    /// [`Error::Rpc`] with `FailedPrecondition` when that is because somebody has deleted its key.
    pub async fn lock(&self, name: impl Into<Vec<u8>>, ttl: i64) -> Result<Lock> {
        let claim = Claim::new(self, &name.into(), Vec::new(), ttl).await?;
        claim.first().await?;
        Ok(Lock { claim })
    }

    /// The lock of this name if it is free now, `None` if somebody holds it or waits for it.
    ///
    /// # Errors
    ///
    /// As for [`lock`](Self::lock).
    pub async fn try_lock(&self, name: impl Into<Vec<u8>>, ttl: i64) -> Result<Option<Lock>> {
        let claim = Claim::new(self, &name.into(), Vec::new(), ttl).await?;
        if claim.is_first().await? {
            return Ok(Some(Lock { claim }));
        }
        claim.give_up().await?;
        Ok(None)
    }
}

impl Lock {
    /// The key that stands for this lock while it is held.
    pub fn key(&self) -> &[u8] {
        self.claim.key()
    }

    /// A number that is greater each time the lock is taken: for services that refuse those who come
    /// with a smaller one than they have seen.
    pub fn revision(&self) -> i64 {
        self.claim.revision()
    }

    /// Holds in a transaction if and only if the lock is held at that moment.
    pub fn guard(&self) -> Compare {
        self.claim.guard()
    }

    /// Whether the lock is held, as far as is known here.
    pub fn is_held(&self) -> bool {
        self.claim.is_held()
    }

    /// Resolves when the lock is lost or may be, with the reason. Dropping the future does nothing.
    pub async fn lost(&self) -> Error {
        self.claim.lost().await
    }

    /// Gives the lock up. The next in the queue may have it before this returns. That it was lost already
    /// is no error.
    ///
    /// # Errors
    ///
    /// As for [`Client::revoke`]; the lock is then given up when its lease runs out.
    pub async fn unlock(self) -> Result<()> {
        self.claim.give_up().await
    }
}
