//! The list and watch requests for one range of keys.
//!
//! [`ListWatch`] is the seam between the driver and etcd. Unit tests drive a scripted fake through
//! it.

use std::time::Duration;

use super::event::{Changes, Fingerprint, KeyValueAt, Page};
use crate::client::{
    Client, Event, EventType, GetOptions, RawWatch, SortOrder, SortTarget, WatchOptions,
};
use crate::error::Result;
use crate::format::KeyRange;

/// The requests that follow one range of keys.
pub(super) trait ListWatch {
    type Watch: WatchStream;

    /// The list's operation, as error messages name it.
    fn operation(&self) -> String;

    /// Lists at most `limit` keys from `from` to the end of the range, at `revision` or at the
    /// newest revision.
    async fn list(&self, from: &[u8], revision: Option<i64>, limit: i64) -> Result<Page>;

    /// Opens a watch of the range that starts at `from_revision`.
    async fn watch(&self, from_revision: i64) -> Result<Self::Watch>;

    /// Reads etcd's present revision, agreed on by a majority of the members.
    async fn current_revision(&self) -> Result<i64>;

    /// Reads the fingerprint that the range had at `revision`.
    async fn fingerprint(&self, revision: i64) -> Result<Fingerprint>;
}

/// An open watch.
pub(super) trait WatchStream {
    /// etcd's revision when it created the watch.
    fn revision(&self) -> i64;

    /// Waits for the next changes. After an error the watch is lost.
    ///
    /// Cancel-safe: dropping the future loses no change.
    async fn next(&mut self) -> Result<Changes>;
}

/// A range of keys in etcd.
#[derive(Debug, Clone)]
pub(super) struct EtcdRange {
    client: Client,
    range: KeyRange,
}

impl EtcdRange {
    pub(super) fn new(client: Client, range: KeyRange) -> Self {
        Self { client, range }
    }

    /// The result of `work` within `limit`, or an error that names the members which were tried.
    pub(super) async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        self.client.within(limit, || self.operation(), work).await
    }

    fn get_options(&self) -> GetOptions {
        GetOptions::new().with_range(self.range.end.clone())
    }
}

impl ListWatch for EtcdRange {
    type Watch = RawWatch;

    fn operation(&self) -> String {
        format!("list {:?}", String::from_utf8_lossy(&self.range.start))
    }

    async fn list(&self, from: &[u8], revision: Option<i64>, limit: i64) -> Result<Page> {
        let mut options = self.get_options().with_limit(limit);
        if let Some(revision) = revision {
            options = options.with_revision(revision);
        }
        let mut response = self.client.get(from, Some(options)).await?;
        let entries = response
            .take_kvs()
            .into_iter()
            .map(|kv| {
                let (create_revision, mod_revision) = (kv.create_revision(), kv.mod_revision());
                let (key, value) = kv.into_key_value();
                KeyValueAt {
                    key,
                    create_revision,
                    mod_revision,
                    value: Some(value),
                }
            })
            .collect();
        Ok(Page {
            entries,
            more: response.more(),
            revision: response.header().map_or(0, |header| header.revision()),
        })
    }

    async fn watch(&self, from_revision: i64) -> Result<RawWatch> {
        let options = WatchOptions::new()
            .with_range(self.range.end.clone())
            .with_start_revision(from_revision);
        self.client
            .open_watch(self.range.start.clone(), &options)
            .await
    }

    async fn current_revision(&self) -> Result<i64> {
        self.client.current_revision(&self.range.start).await
    }

    async fn fingerprint(&self, revision: i64) -> Result<Fingerprint> {
        let newest = self
            .get_options()
            .with_revision(revision)
            .with_sort(SortTarget::Mod, SortOrder::Descend)
            .with_limit(1)
            .with_keys_only();
        let response = self.client.get(&*self.range.start, newest).await?;
        // The limit does not apply to the count, which is of the whole range.
        Ok(Fingerprint {
            count: response.count(),
            newest: response.kvs().first().map_or(0, |kv| kv.mod_revision()),
        })
    }
}

impl WatchStream for RawWatch {
    fn revision(&self) -> i64 {
        RawWatch::revision(self)
    }

    async fn next(&mut self) -> Result<Changes> {
        let response = RawWatch::next(self).await?;
        let entries: Vec<KeyValueAt> = response.events().iter().filter_map(to_entry).collect();
        // Not the revision in the response header: while a watch catches up, etcd sends its newest
        // revision there before it has sent all changes up to it.
        let revision = entries.iter().map(|entry| entry.mod_revision).max();
        Ok(Changes {
            entries,
            revision: revision.unwrap_or_default(),
        })
    }
}

fn to_entry(event: &Event) -> Option<KeyValueAt> {
    let kv = event.kv()?;
    Some(KeyValueAt {
        key: kv.key().to_vec(),
        create_revision: kv.create_revision(),
        mod_revision: kv.mod_revision(),
        value: match event.event_type() {
            EventType::Put => Some(kv.value().to_vec()),
            EventType::Delete => None,
        },
    })
}
