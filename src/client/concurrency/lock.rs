//! Locks.

use std::time::Duration;

use etcd_client::Compare;

use super::entry::QueueEntry;
use crate::client::handle::Client;
use crate::error::{Error, Result};

/// A lock that is held, from [`Client::lock`].
///
/// A background task renews the lease of the lock. The lock is lost when no renewal succeeds for a
/// whole TTL, because the lease may then have expired and another client may hold the lock, when
/// another client deletes or overwrites its key, and when the client is closed.
/// [`lost`](Self::lost) resolves at that moment, and the work under the lock must stop. A lost lock
/// is never held again, even if a late renewal shows that its lease survived.
///
/// [`is_held`](Self::is_held) and [`lost`](Self::lost) look at the clock: a process that stood
/// still for longer than the TTL sees the loss at once when it goes on. Such a process may still
/// send one more request before it looks, so no lock of this kind can prevent that. Put writes to
/// etcd that must never happen twice into a transaction with [`ownership`](Self::ownership), and
/// let other services refuse old [revisions](Self::revision). On Linux the clock does not count the
/// time for which a whole machine is suspended.
///
/// Dropping a lock releases it in the background; [`unlock`](Self::unlock) waits until it is
/// released.
///
/// ```no_run
/// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
/// # async fn work() {}
/// use std::time::Duration;
///
/// let lock = client.lock("nightly-report", Duration::from_secs(10)).await?;
/// tokio::select! {
///     () = work() => lock.unlock().await?,
///     reason = lock.lost() => return Err(reason),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping a `Lock` releases it"]
pub struct Lock {
    entry: QueueEntry,
}

/// Locks. A lock excludes a Go `concurrency.Mutex` and an `etcdctl lock` of the same name.
///
/// The keys of a lock are `NAME/LEASE`, with the lease in hex. Other keys below `NAME/`, such as
/// `NAME/config` or those of a lock `NAME/OTHER`, do not count. A key that is not attached to the
/// lease in its name does not count either. Go waits for all of them.
impl Client {
    /// Waits until this client holds the lock of this name. Locks are granted in the order of the
    /// calls.
    ///
    /// `ttl` is rounded up to whole seconds; etcd's minimum is 2 s. If this process dies or is cut
    /// off, others get the lock after that time.
    ///
    /// The wait has no time limit and survives the failure of members. Dropping the future leaves
    /// the queue.
    ///
    /// # Errors
    ///
    /// - [`Error::Invalid`]: `ttl` is zero, or more than the 9,000,000,000 s that etcd grants.
    /// - The errors of [`Client::put`]: this client cannot enter the queue.
    /// - [`Error::LeaseUnconfirmed`], [`Error::LeaseNotFound`]: the lease was lost while waiting.
    /// - [`Error::KeyLost`]: another client deleted or overwrote the key while waiting.
    pub async fn lock(&self, name: impl Into<Vec<u8>>, ttl: Duration) -> Result<Lock> {
        let entry = QueueEntry::new(self, &name.into(), Vec::new(), ttl).await?;
        entry.wait_until_first().await?;
        Ok(Lock { entry })
    }

    /// Takes the lock of this name if it is free; `None` if another client holds it or waits for
    /// it.
    ///
    /// Dropping the future takes no lock. A client that has entered the queue leaves it in the
    /// background.
    ///
    /// # Errors
    ///
    /// The errors of [`lock`](Self::lock).
    pub async fn try_lock(&self, name: impl Into<Vec<u8>>, ttl: Duration) -> Result<Option<Lock>> {
        let entry = QueueEntry::new(self, &name.into(), Vec::new(), ttl).await?;
        if entry.is_first().await? {
            return Ok(Some(Lock { entry }));
        }
        entry.release().await?;
        Ok(None)
    }
}

impl Lock {
    /// The key that etcd has while the lock is held.
    pub fn key(&self) -> &[u8] {
        self.entry.key()
    }

    /// A fencing token: a number that grows each time any client takes the lock. A service can
    /// refuse requests with a smaller number than it has seen.
    ///
    /// The number is the create revision of [`key`](Self::key). In Go that is the create revision
    /// of `Mutex.Key()`, which `Mutex.IsOwner` compares and a `Get` of the key returns. Do not use
    /// `Mutex.Header().Revision`, or the header of etcd's lock service: it is the revision at which
    /// a holder learned of the lock, so that holders in turn may have 2, 5 and 4.
    pub fn revision(&self) -> i64 {
        self.entry.revision()
    }

    /// A comparison for transactions, which holds only while this client holds the lock. etcd
    /// itself compares, so the state that this client knows does not matter.
    pub fn ownership(&self) -> Compare {
        self.entry.ownership()
    }

    /// Whether the lock is held: no loss is known, and the TTL has not passed since the last
    /// confirmed renewal was sent. Once false, it stays false.
    pub fn is_held(&self) -> bool {
        self.entry.is_held()
    }

    /// Resolves with the reason when the lock is lost or may be lost, at once if it is. Dropping
    /// the future has no effect.
    pub async fn lost(&self) -> Error {
        self.entry.lost().await
    }

    /// Releases the lock; another client may hold it before this method returns. Succeeds if the
    /// lock was lost before.
    ///
    /// Dropping the future releases the lock in the background, as dropping the lock does.
    ///
    /// # Errors
    ///
    /// The errors of [`Client::revoke`]. The lock is then released when its lease expires.
    pub async fn unlock(self) -> Result<()> {
        self.entry.release().await
    }
}
