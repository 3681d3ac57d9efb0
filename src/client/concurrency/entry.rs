//! An entry in a queue: entering it, waiting for the first place, and noticing its loss.

use std::fmt;
use std::future::pending;
use std::time::Duration;

use etcd_client::Compare;
use futures::StreamExt;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::entry_key::EntryKey;
use super::entry_lease::EntryLease;
use super::loss::Loss;
use super::queue::Queue;
use crate::backoff::Backoff;
use crate::client::handle::Client;
use crate::client::keep_alive::KeepAlive;
use crate::error::{Error, Result};

/// An entry in a queue, until it is released or lost. Dropping it releases it, as dropping its
/// lease does.
pub(super) struct QueueEntry {
    key: EntryKey,
    lease: EntryLease,
    loss: Loss,
    /// The tasks that renew the lease and watch the key.
    _tasks: [AbortOnDropHandle<()>; 2],
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
        let keep_alive = Box::pin(client.keep_alive(lease.id())).await?;
        let queue = Queue::new(client, name);
        let key = queue.key_of(lease.id());
        let loss = Loss::new(client, key, lease.id(), lease.ttl(), keep_alive.clock());
        let renewing = loss.report_from(lost_lease(keep_alive));
        let creating = EntryKey::create(queue, lease.id(), value);
        let key = loss.or_reason(creating).await?;
        let watched = key.clone();
        let watching = loss.report_from(async move { watched.lost().await });
        Ok(Self {
            key,
            lease,
            loss,
            _tasks: [renewing, watching],
        })
    }

    /// Whether the entry is the first of the queue.
    pub(super) async fn is_first(&self) -> Result<bool> {
        let (predecessor, _) = self.loss.or_reason(self.key.predecessor()).await?;
        Ok(predecessor.is_none())
    }

    /// Waits until the entry is the first of the queue.
    pub(super) async fn wait_until_first(&self) -> Result<()> {
        let waiting = async {
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
        };
        self.loss.or_reason(waiting).await
    }

    /// Replaces the value, unless the entry is lost.
    pub(super) async fn set_value(&self, value: Vec<u8>) -> Result<()> {
        self.loss.or_reason(self.key.set_value(value)).await
    }

    pub(super) fn key(&self) -> &[u8] {
        self.key.bytes()
    }

    pub(super) fn revision(&self) -> i64 {
        self.key.revision()
    }

    pub(super) fn ownership(&self) -> Compare {
        self.key.ownership()
    }

    /// Whether the entry is certainly not lost. Once false, it stays false.
    pub(super) fn is_held(&self) -> bool {
        !self.loss.is_reported()
    }

    /// Resolves when the entry is lost, or may be.
    pub(super) async fn lost(&self) -> Error {
        self.loss.reason().await
    }

    /// Removes the entry from the queue.
    pub(super) async fn release(self) -> Result<()> {
        Box::pin(self.lease.revoke()).await
    }
}

impl fmt::Debug for QueueEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueEntry")
            .field("key", &String::from_utf8_lossy(self.key()))
            .field("revision", &self.revision())
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}

/// Drives a keep-alive until the lease cannot be relied on any more.
async fn lost_lease(mut keep_alive: KeepAlive) -> Error {
    while let Some(response) = keep_alive.next().await {
        if let Err(error) = response {
            return error;
        }
    }
    // The last item is an error.
    pending().await
}
