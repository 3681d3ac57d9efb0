//! Keys and values.

use etcd_client::{
    CompactionOptions, CompactionResponse, DeleteOptions, DeleteResponse, GetOptions, GetResponse,
    PutOptions, PutResponse,
};

use super::handle::{Client, shown};
use crate::error::Result;

/// Keys and values. Each call fails with [`Error::Timeout`](crate::Error::Timeout) after
/// [`Config::request_timeout`](crate::Config::request_timeout), with
/// [`Error::Closed`](crate::Error::Closed) once the client is closed, and with
/// [`Error::Rpc`](crate::Error::Rpc) when etcd refuses it or cannot be reached.
impl Client {
    /// Stores a value under a key. Options: the lease it hangs on, the previous value.
    ///
    /// After a timeout or a lost connection the value may be stored or not.
    pub async fn put(
        &self,
        key: impl Into<Vec<u8>>,
        value: impl Into<Vec<u8>>,
        options: impl Into<Option<PutOptions>>,
    ) -> Result<PutResponse> {
        let key = key.into();
        let mut kv = self.inner.transport.kv.clone();
        self.call(
            || format!("put {}", shown(&key)),
            kv.put(key.as_slice(), value, options.into()),
        )
        .await
    }

    /// Reads a key, or with options a range of keys: by prefix, at a revision, sorted, limited.
    pub async fn get(
        &self,
        key: impl Into<Vec<u8>>,
        options: impl Into<Option<GetOptions>>,
    ) -> Result<GetResponse> {
        let key = key.into();
        let mut kv = self.inner.transport.kv.clone();
        self.call(
            || format!("get {}", shown(&key)),
            kv.get(key.as_slice(), options.into()),
        )
        .await
    }

    /// Deletes a key, or with options a range of keys. That nothing was there is no error:
    /// the answer has the number of keys deleted.
    ///
    /// After a timeout or a lost connection the keys may be deleted or not.
    pub async fn delete(
        &self,
        key: impl Into<Vec<u8>>,
        options: impl Into<Option<DeleteOptions>>,
    ) -> Result<DeleteResponse> {
        let key = key.into();
        let mut kv = self.inner.transport.kv.clone();
        self.call(
            || format!("delete {}", shown(&key)),
            kv.delete(key.as_slice(), options.into()),
        )
        .await
    }

    /// Forgets the history before this revision. Watches that start before it fail with
    /// [`Error::Compacted`](crate::Error::Compacted).
    pub async fn compact(
        &self,
        revision: i64,
        options: impl Into<Option<CompactionOptions>>,
    ) -> Result<CompactionResponse> {
        let mut kv = self.inner.transport.kv.clone();
        self.call(
            || format!("compact up to revision {revision}"),
            kv.compact(revision, options.into()),
        )
        .await
    }
}
