//! Keys and values.

use etcd_client::{
    CompactionOptions, CompactionResponse, DeleteOptions, DeleteResponse, GetOptions, GetResponse,
    PutOptions, PutResponse,
};

use super::handle::{Client, display_key};
use crate::error::{Error, Result};

/// Keys and values. Each call fails with
///
/// - [`Error::Timeout`](crate::Error::Timeout): no response within
///   [`Config::request_timeout`](crate::Config::request_timeout) (5 s by default).
/// - [`Error::Closed`](crate::Error::Closed): the client was closed.
/// - [`Error::NotConnected`](crate::Error::NotConnected): no member was connected.
/// - [`Error::Rpc`](crate::Error::Rpc): etcd refuses the call, or the connection failed.
///
/// A failed [`get`](Client::get) is sent to another member. The others are repeated only if no
/// member can have executed them. A transaction counts as a write, even if it only reads.
impl Client {
    /// Stores a value under a key. The options can attach a lease and ask for the previous value.
    ///
    /// After a timeout or a lost connection, the value may or may not have been stored.
    pub async fn put(
        &self,
        key: impl Into<Vec<u8>>,
        value: impl Into<Vec<u8>>,
        options: impl Into<Option<PutOptions>>,
    ) -> Result<PutResponse> {
        let key = key.into();
        let mut kv = self.inner.transport.kv.clone();
        self.call(
            || format!("put {}", display_key(&key)),
            kv.put(key.as_slice(), value, options.into()),
        )
        .await
    }

    /// Reads a key. With options it reads a range of keys, by prefix, at a revision, sorted or
    /// limited. A revision that is compacted fails with
    /// [`Error::Compacted`](crate::Error::Compacted).
    pub async fn get(
        &self,
        key: impl Into<Vec<u8>>,
        options: impl Into<Option<GetOptions>>,
    ) -> Result<GetResponse> {
        let key = key.into();
        let mut kv = self.inner.transport.kv.clone();
        self.call_at_revision(
            &key,
            || format!("get {}", display_key(&key)),
            kv.get(key.as_slice(), options.into()),
        )
        .await
    }

    /// Deletes a key, or with options a range of keys. The response has the number of deleted keys;
    /// a missing key is no error.
    ///
    /// After a timeout or a lost connection, the keys may or may not have been deleted.
    pub async fn delete(
        &self,
        key: impl Into<Vec<u8>>,
        options: impl Into<Option<DeleteOptions>>,
    ) -> Result<DeleteResponse> {
        let key = key.into();
        let mut kv = self.inner.transport.kv.clone();
        self.call(
            || format!("delete {}", display_key(&key)),
            kv.delete(key.as_slice(), options.into()),
        )
        .await
    }

    /// Compacts the history before this revision. Reads and watches before it then fail with
    /// [`Error::Compacted`](crate::Error::Compacted), and so does another compaction up to it.
    ///
    /// etcd accepts the revision 0 once, if nothing has been compacted yet, and removes nothing. A
    /// negative revision fails with [`Error::Invalid`](crate::Error::Invalid).
    pub async fn compact(
        &self,
        revision: i64,
        options: impl Into<Option<CompactionOptions>>,
    ) -> Result<CompactionResponse> {
        if revision < 0 {
            let reason = "a revision is not negative";
            return Err(Error::invalid("revision", revision.to_string(), reason));
        }
        let mut kv = self.inner.transport.kv.clone();
        self.call_at_revision(
            b"",
            || format!("compact up to revision {revision}"),
            kv.compact(revision, options.into()),
        )
        .await
    }
}
