//! A queue in etcd, the basis of locks and elections.
//!
//! The recipe and the keys are the same as in Go's `go.etcd.io/etcd/client/v3/concurrency` and in
//! etcd's own lock service, so that all of them exclude each other. Every client puts a key
//! `NAME/LEASE` under a lease that it keeps alive, and the client with the oldest key holds the
//! lock.
//!
//! A key counts while it is attached to the lease after which it is named. Other keys may lie
//! between the entries: those of a queue `NAME/OTHER`, of the user, or an entry that somebody
//! overwrote. Go waits for all of them. That does not weaken the exclusion, because Go and this
//! client count each other's entries, but a Go client that waits for a key `NAME/config` keeps its
//! place, and this client waits behind it.
//!
//! The lease is in a key's metadata, but the queue is read with values: from etcd 3.7 on the
//! response to a keys-only range carries no lease (etcd#22209).

use etcd_client::{Event, EventType, GetOptions, KeyValue};
use futures::StreamExt;

use super::key_form::{END_SUFFIX, FIRST_SUFFIX, next_suffix, suffix_of};
use crate::client::etcd_error::EtcdError;
use crate::client::handle::Client;
use crate::client::watch::{Watch, WatchOptions};
use crate::error::Result;

/// How many keys the first page of a read has. Most queues are shorter.
const FIRST_PAGE: i64 = 50;

/// How many keys a later page has at most. etcd counts the keys up to the end of the range for each
/// page, so that small pages of a large range are slow.
const MAX_PAGE: usize = 5_000;

/// About how many bytes a later page has. etcd filters neither by lease nor by form, so the values
/// of other keys are read too.
const PAGE_BYTES: usize = 256 * 1024;

/// How often a read starts again because its revision was compacted.
const MAX_RESTARTS: usize = 5;

/// A queue of etcd.
#[derive(Clone)]
pub(super) struct Queue {
    client: Client,
    /// `NAME/`.
    prefix: Vec<u8>,
}

impl Queue {
    pub(super) fn new(client: &Client, name: &[u8]) -> Self {
        Self {
            client: client.clone(),
            prefix: [name, b"/"].concat(),
        }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The key of the entry with this lease.
    pub(super) fn key_of(&self, lease: i64) -> Vec<u8> {
        self.key_with(suffix_of(lease).as_bytes())
    }

    fn key_with(&self, suffix: &[u8]) -> Vec<u8> {
        [&self.prefix, suffix].concat()
    }

    /// Whether a key is an entry of this queue.
    pub(super) fn has(&self, found: &KeyValue) -> bool {
        let suffix = found.key().strip_prefix(self.prefix.as_slice());
        found.lease() != 0 && suffix == Some(suffix_of(found.lease()).as_bytes())
    }

    /// Whether a key was put as an entry of this queue.
    pub(super) fn is_entered_by(&self, event: &Event) -> bool {
        event.event_type() == EventType::Put && event.kv().is_some_and(|put| self.has(put))
    }

    /// The first entry of the queue, and etcd's revision at that time.
    pub(super) async fn first(&self) -> Result<(Option<KeyValue>, i64)> {
        self.fold(|first: &mut Option<KeyValue>, entry| {
            let is_older = |first: &KeyValue| entry.create_revision() < first.create_revision();
            if first.as_ref().is_none_or(is_older) {
                *first = Some(entry);
            }
        })
        .await
    }

    /// Reads all entries as they are at one revision, in the order of their keys, and returns what
    /// `add` has made of them, and that revision.
    pub(super) async fn fold<A: Default>(
        &self,
        add: impl Fn(&mut A, KeyValue),
    ) -> Result<(A, i64)> {
        let mut restarts = 0;
        loop {
            match Box::pin(self.fold_once(&add)).await {
                Err(error)
                    if EtcdError::of(&error) == EtcdError::Compacted && restarts < MAX_RESTARTS =>
                {
                    restarts += 1;
                }
                result => return result,
            }
        }
    }

    async fn fold_once<A: Default>(&self, add: &impl Fn(&mut A, KeyValue)) -> Result<(A, i64)> {
        let mut folded = A::default();
        let mut from = self.key_with(FIRST_SUFFIX);
        let mut limit = FIRST_PAGE;
        let mut revision = None;
        loop {
            let options = GetOptions::new()
                .with_range(self.key_with(END_SUFFIX))
                .with_limit(limit)
                .with_revision(revision.unwrap_or_default());
            let mut page = match self.client.get(from.as_slice(), options).await {
                Err(error) if EtcdError::of(&error) == EtcdError::TooLarge && limit > 1 => {
                    limit /= 2;
                    continue;
                }
                page => page?,
            };
            let header_revision = page.header().map_or(0, |header| header.revision());
            let revision = *revision.get_or_insert(header_revision);
            let keys = page.take_kvs();
            limit = next_limit(&keys);
            let last = keys.last().filter(|_| page.more());
            let next = last
                .and_then(|last| last.key().strip_prefix(self.prefix.as_slice()))
                .and_then(next_suffix);
            for entry in keys.into_iter().filter(|key| self.has(key)) {
                add(&mut folded, entry);
            }
            match next {
                Some(suffix) => from = self.key_with(&suffix),
                None => return Ok((folded, revision)),
            }
        }
    }

    /// Watches the range in which the entries are, from after `revision`.
    pub(super) async fn watch(&self, revision: i64) -> Result<Watch> {
        let options = WatchOptions::new()
            .with_range(self.key_with(END_SUFFIX))
            .with_start_revision(revision + 1);
        self.client
            .watch(self.key_with(FIRST_SUFFIX), options)
            .await
    }

    /// Waits until an entry, which existed at `revision`, is deleted or overwritten. May return
    /// early, when the watch ends.
    pub(super) async fn wait_until_gone(&self, key: &[u8], revision: i64) -> Result<()> {
        let options = WatchOptions::new().with_start_revision(revision + 1);
        let mut watch = self.client.watch(key, options).await?;
        while let Some(response) = watch.next().await {
            let response = response?;
            // A leader may put a new value.
            if !response
                .events()
                .iter()
                .all(|event| self.is_entered_by(event))
            {
                break;
            }
        }
        Ok(())
    }
}

/// How many keys the next page may have, after a page of `keys`.
fn next_limit(keys: &[KeyValue]) -> i64 {
    let bytes: usize = keys
        .iter()
        .map(|kv| kv.key().len() + kv.value().len())
        .sum();
    let limit = PAGE_BYTES * keys.len() / bytes.max(1);
    limit.clamp(1, MAX_PAGE).try_into().unwrap_or(FIRST_PAGE)
}
