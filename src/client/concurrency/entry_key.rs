//! The key of an entry in a queue.

use std::cmp::Ordering;

use etcd_client::{Compare, CompareOp, KeyValue, PutOptions, TxnOp, TxnOpResponse};
use tokio::time::sleep;

use super::queue::Queue;
use crate::backoff::Backoff;
use crate::client::etcd_error::EtcdError;
use crate::error::{Error, Result};

/// The key of an entry, which etcd has until the entry is released or lost.
#[derive(Clone)]
pub(super) struct EntryKey {
    queue: Queue,
    bytes: Vec<u8>,
    lease: i64,
    /// The revision that created the key, which orders the queue.
    revision: i64,
}

/// The place of an entry in its queue.
#[derive(Default)]
struct Place {
    /// Whether the entry is in the queue.
    is_present: bool,
    /// The entry before it.
    predecessor: Option<KeyValue>,
}

impl Place {
    /// Whether no entry is known between this place and `entry`.
    fn is_behind(&self, entry: &KeyValue) -> bool {
        let revision_of = |entry: &KeyValue| entry.create_revision();
        self.predecessor.as_ref().map(revision_of) < Some(revision_of(entry))
    }
}

impl EntryKey {
    /// Puts the key of a lease into a queue. No other client uses the key, so a repetition is
    /// harmless.
    pub(super) async fn create(queue: Queue, lease: i64, value: Vec<u8>) -> Result<Self> {
        let mut key = Self {
            bytes: queue.key_of(lease),
            queue,
            lease,
            revision: 0,
        };
        let mut backoff = Backoff::for_etcd();
        loop {
            match key.try_create(&value).await {
                Ok(Some(revision)) => {
                    key.revision = revision;
                    return Ok(key);
                }
                Ok(None) => {}
                Err(error) if EtcdError::of(&error) == EtcdError::LeaseNotFound => {
                    return Err(Error::LeaseNotFound { id: lease });
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
            .queue
            .client()
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

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    pub(super) fn ownership(&self) -> Compare {
        Compare::create_revision(self.bytes.as_slice(), CompareOp::Equal, self.revision)
    }

    /// The entry before this one, if there is one, and etcd's revision at that time.
    ///
    /// Fails if this key is missing, because an entry that lost its key must not be taken for the
    /// first of the queue.
    pub(super) async fn predecessor(&self) -> Result<(Option<KeyValue>, i64)> {
        let add = |place: &mut Place, entry: KeyValue| match entry
            .create_revision()
            .cmp(&self.revision)
        {
            Ordering::Equal => place.is_present |= entry.key() == self.bytes,
            Ordering::Less if place.is_behind(&entry) => place.predecessor = Some(entry),
            _ => {}
        };
        let (place, revision) = self.queue.fold(add).await?;
        if place.is_present {
            Ok((place.predecessor, revision))
        } else {
            Err(self.missing_error().await)
        }
    }

    /// Returns true if there is no entry before this one. Otherwise waits until the one before it
    /// is gone, and returns false.
    pub(super) async fn wait_for_predecessor(&self) -> Result<bool> {
        let (predecessor, revision) = self.predecessor().await?;
        let Some(predecessor) = predecessor else {
            return Ok(true);
        };
        let predecessor = predecessor.key();
        self.queue.wait_until_gone(predecessor, revision).await?;
        Ok(false)
    }

    /// Resolves when the key is missing, with the reason.
    pub(super) async fn lost(&self) -> Error {
        let mut backoff = Backoff::for_etcd();
        loop {
            let gone = async {
                let revision = self.ensure_present().await?;
                self.queue.wait_until_gone(&self.bytes, revision).await
            };
            match gone.await {
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

    /// Fails if the key is missing. Returns etcd's revision.
    async fn ensure_present(&self) -> Result<i64> {
        let found = self.queue.client().get(self.bytes.as_slice(), None).await?;
        let is_own =
            |found: &KeyValue| found.create_revision() == self.revision && self.queue.has(found);
        if found.kvs().iter().any(is_own) {
            Ok(found.header().map_or(0, |header| header.revision()))
        } else {
            Err(self.missing_error().await)
        }
    }

    /// Why the key is missing: its lease is gone, or another client deleted or overwrote it.
    async fn missing_error(&self) -> Error {
        let client = self.queue.client();
        match client.lease_time_to_live(self.lease, None).await {
            Err(error) if error.is_permanent() => error,
            _ => Error::KeyLost {
                key: String::from_utf8_lossy(&self.bytes).into_owned(),
            },
        }
    }

    /// Replaces the value.
    pub(super) async fn set_value(&self, value: Vec<u8>) -> Result<()> {
        let options = PutOptions::new().with_lease(self.lease);
        let put = self
            .queue
            .client()
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
}
