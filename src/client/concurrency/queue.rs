//! A queue in etcd, the basis of locks and elections.
//!
//! The recipe and the keys are the same as in Go's `go.etcd.io/etcd/client/v3/concurrency` and in
//! etcd's own lock service, so that all of them exclude each other. Every client puts a key
//! `NAME/LEASE` under a lease that it keeps alive, and the client with the oldest key holds the
//! lock.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, PutOptions, SortOrder, SortTarget, TxnOp,
    TxnOpResponse, WatchFilterType,
};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::entry_lease::EntryLease;
use crate::backoff::Backoff;
use crate::client::etcd_error::EtcdError;
use crate::client::handle::Client;
use crate::client::keep_alive::KeepAlive;
use crate::client::watch::WatchOptions;
use crate::error::{Error, Result};

/// An entry in a queue, until it is released or lost. Dropping it releases it, as dropping its lease
/// does.
pub(super) struct QueueEntry {
    key: QueueKey,
    lease: EntryLease,
    /// Why the entry cannot be relied on any more.
    lost: watch::Receiver<Option<Error>>,
    /// The tasks that renew the lease and watch the key.
    tasks: Vec<AbortOnDropHandle<()>>,
}

/// The key of an entry, and its place in the queue.
#[derive(Clone)]
struct QueueKey {
    client: Client,
    /// `NAME/`.
    prefix: Vec<u8>,
    bytes: Vec<u8>,
    lease: i64,
    /// The revision that created the key, which orders the queue.
    revision: i64,
}

impl QueueEntry {
    /// Adds an entry to the queue `name`, under a lease of `ttl`.
    pub(super) async fn new(
        client: &Client,
        name: &[u8],
        value: Vec<u8>,
        ttl: Duration,
    ) -> Result<Self> {
        let lease = Box::pin(EntryLease::grant(client, ttl)).await?;
        let id = lease.id();
        let prefix = queue_prefix(name);
        let mut entry = Self {
            key: QueueKey {
                bytes: [&prefix[..], format!("{id:x}").as_bytes()].concat(),
                prefix,
                client: client.clone(),
                lease: id,
                revision: 0,
            },
            lease,
            lost: watch::channel(None).1,
            tasks: Vec::new(),
        };
        let (lost_tx, lost) = watch::channel(None);
        let keep_alive = Box::pin(client.keep_alive(id)).await?;
        entry.lost = lost;
        let renewing = tokio::spawn(report_lost_lease(keep_alive, lost_tx.clone()));
        entry.tasks.push(AbortOnDropHandle::new(renewing));
        entry.key.revision = entry.or_lost(entry.key.create(value)).await?;
        let key = entry.key.clone();
        let watching = tokio::spawn(async move { report_lost(&lost_tx, key.lost().await) });
        entry.tasks.push(AbortOnDropHandle::new(watching));
        Ok(entry)
    }

    /// Whether the entry is the first of the queue.
    pub(super) async fn is_first(&self) -> Result<bool> {
        let (predecessor, _) = self.or_lost(self.key.predecessor()).await?;
        Ok(predecessor.is_none())
    }

    /// Waits until the entry is the first of the queue.
    pub(super) async fn wait_until_first(&self) -> Result<()> {
        self.or_lost(async {
            let mut backoff = Backoff::for_etcd();
            loop {
                match self.key.wait_for_predecessor().await {
                    Ok(true) => return Ok(()),
                    Ok(false) => backoff.reset(),
                    Err(error) if error.is_permanent() => return Err(error),
                    Err(error) => {
                        tracing::debug!(%error, "cannot wait in a queue, retrying");
                        sleep(backoff.next()).await;
                    }
                }
            }
        })
        .await
    }

    /// Replaces the value, unless the entry is lost.
    pub(super) async fn set_value(&self, value: Vec<u8>) -> Result<()> {
        self.or_lost(self.key.set_value(value)).await
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.key.bytes
    }

    pub(super) fn revision(&self) -> i64 {
        self.key.revision
    }

    pub(super) fn ownership(&self) -> Compare {
        self.key.ownership()
    }

    pub(super) fn is_held(&self) -> bool {
        // The tasks that would report a loss end with their runtime.
        let is_lost = self.lost.borrow().is_some() || self.lost.has_changed().is_err();
        !is_lost && !self.key.client.is_closed()
    }

    /// Resolves when the entry is lost, or may be.
    pub(super) async fn lost(&self) -> Error {
        let mut lost = self.lost.clone();
        let lost = lost.wait_for(Option::is_some).await;
        let error = lost.ok().and_then(|error| error.clone());
        error.unwrap_or_else(|| {
            let key = String::from_utf8_lossy(&self.key.bytes);
            self.key.client.runtime_error(format!("hold {key:?}"))
        })
    }

    /// The result of `work`, or the error of [`lost`](Self::lost) as soon as the entry is lost.
    async fn or_lost<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        // Boxed, because the future is large and this is rare.
        let mut work = Box::pin(work);
        tokio::select! {
            biased;
            error = self.lost() => Err(error),
            result = &mut work => result,
        }
    }

    /// Removes the entry from the queue.
    pub(super) async fn release(self) -> Result<()> {
        Box::pin(self.lease.revoke()).await
    }
}

impl QueueKey {
    /// Creates the key and returns the revision that created it. No other client uses the key, so a
    /// repetition is harmless.
    async fn create(&self, value: Vec<u8>) -> Result<i64> {
        let mut backoff = Backoff::for_etcd();
        loop {
            match self.try_create(&value).await {
                Ok(Some(revision)) => return Ok(revision),
                Ok(None) => {}
                Err(error) if EtcdError::of(&error) == EtcdError::LeaseNotFound => {
                    return Err(Error::LeaseNotFound { id: self.lease });
                }
                Err(error) if error.is_permanent() => return Err(error),
                Err(error) => tracing::debug!(%error, "cannot enter a queue, retrying"),
            }
            sleep(backoff.next()).await;
        }
    }

    /// The revision that created the key, now or in an earlier attempt.
    async fn try_create(&self, value: &[u8]) -> Result<Option<i64>> {
        let key = self.bytes.as_slice();
        let options = PutOptions::new().with_lease(self.lease);
        let response = self
            .client
            .txn()
            .when([Compare::create_revision(key, CompareOp::Equal, 0)])
            .and_then([TxnOp::put(key, value, Some(options))])
            .or_else([TxnOp::get(key, None)])
            .commit()
            .await?;
        if response.succeeded() {
            return Ok(Some(
                response.header().map_or(0, |header| header.revision()),
            ));
        }
        Ok(match response.op_responses().first() {
            Some(TxnOpResponse::Get(found)) => found.kvs().first().map(|kv| kv.create_revision()),
            _ => None,
        })
    }

    /// The entry before this one, if there is one, and etcd's revision at that time.
    ///
    /// Fails if this key is missing, because an entry that lost its key must not be taken for the
    /// first of the queue. The values are read too, because from etcd 3.7 on the response to a
    /// keys-only range carries no lease (etcd#22209), and the lease tells whether another client has
    /// put the key.
    async fn predecessor(&self) -> Result<(Option<KeyValue>, i64)> {
        let options = GetOptions::new()
            .with_prefix()
            .with_max_create_revision(self.revision)
            .with_sort(SortTarget::Create, SortOrder::Descend)
            .with_limit(2);
        let found = self.client.get(self.prefix.as_slice(), options).await?;
        let revision = found.header().map_or(0, |header| header.revision());
        match found.kvs() {
            [own, before @ ..] if self.is_own(own) => Ok((before.first().cloned(), revision)),
            _ => Err(self.missing_error().await),
        }
    }

    fn is_own(&self, found: &KeyValue) -> bool {
        found.key() == self.bytes
            && found.create_revision() == self.revision
            && found.lease() == self.lease
    }

    /// Why the key is missing: its lease is gone, or another client deleted or overwrote it.
    async fn missing_error(&self) -> Error {
        match self.client.lease_time_to_live(self.lease, None).await {
            Err(error) if error.is_permanent() => error,
            _ => Error::KeyLost {
                key: String::from_utf8_lossy(&self.bytes).into_owned(),
            },
        }
    }

    /// Returns true if there is no entry before this one. Otherwise waits until the one before it
    /// is deleted, and returns false.
    async fn wait_for_predecessor(&self) -> Result<bool> {
        let (predecessor, revision) = self.predecessor().await?;
        let Some(predecessor) = predecessor else {
            return Ok(true);
        };
        self.wait_for_deletion(predecessor.key(), revision).await?;
        Ok(false)
    }

    /// Resolves when the key is missing, with the reason.
    async fn lost(&self) -> Error {
        let mut backoff = Backoff::for_etcd();
        loop {
            let deleted = async {
                let (_, revision) = self.predecessor().await?;
                self.wait_for_deletion(&self.bytes, revision).await
            };
            match deleted.await {
                // The next read finds the reason.
                Ok(()) => backoff.reset(),
                Err(error) if error.is_permanent() => return error,
                Err(error) => {
                    tracing::debug!(%error, "cannot watch the key of a queue entry, retrying");
                    sleep(backoff.next()).await;
                }
            }
        }
    }

    /// Waits until the key is deleted after `revision`. May return early, when the watch ends.
    async fn wait_for_deletion(&self, key: &[u8], revision: i64) -> Result<()> {
        let options = WatchOptions::new()
            .with_start_revision(revision + 1)
            .with_filters([WatchFilterType::NoPut]);
        let mut watch = self.client.watch(key, options).await?;
        while let Some(response) = watch.next().await {
            if !response?.events().is_empty() {
                break;
            }
        }
        Ok(())
    }

    async fn set_value(&self, value: Vec<u8>) -> Result<()> {
        let options = PutOptions::new().with_lease(self.lease);
        let put = self
            .client
            .txn()
            .when([self.ownership()])
            .and_then([TxnOp::put(self.bytes.as_slice(), value, Some(options))])
            .commit();
        if put.await?.succeeded() {
            Ok(())
        } else {
            Err(self.missing_error().await)
        }
    }

    fn ownership(&self) -> Compare {
        Compare::create_revision(self.bytes.as_slice(), CompareOp::Equal, self.revision)
    }
}

impl fmt::Debug for QueueEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueEntry")
            .field("key", &String::from_utf8_lossy(&self.key.bytes))
            .field("revision", &self.key.revision)
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}

/// The prefix of the keys of a queue.
pub(super) fn queue_prefix(name: &[u8]) -> Vec<u8> {
    [name, b"/"].concat()
}

/// Drives a keep-alive, and reports when the lease cannot be relied on any more.
async fn report_lost_lease(mut keep_alive: KeepAlive, lost_tx: watch::Sender<Option<Error>>) {
    while let Some(response) = keep_alive.next().await {
        if let Err(error) = response {
            return report_lost(&lost_tx, error);
        }
    }
}

/// Reports the reason why an entry is lost. The first reason stays.
fn report_lost(lost_tx: &watch::Sender<Option<Error>>, reason: Error) {
    lost_tx.send_if_modified(|lost| {
        let is_first = lost.is_none();
        lost.get_or_insert(reason);
        is_first
    });
}
