//! A balanced channel to the instances of a directory. The `balance` module does not know etcd.

use std::sync::Arc;

use super::handle::Directory;
use crate::balance::{BalancedChannel, Source};
use crate::client::Client;
use crate::error::Result;

impl BalancedChannel {
    /// Creates a channel to `service`, as registered in etcd under the default prefix and format.
    ///
    /// Returns once the service has been listed. Connections are established in the background, and
    /// calls wait for them.
    ///
    /// # Errors
    ///
    /// Same as [`DirectoryBuilder::watch`](crate::DirectoryBuilder::watch).
    pub async fn connect(client: &Client, service: impl Into<String>) -> Result<Self> {
        let directory = Directory::watch(client, service).await?;
        Self::builder(directory).build()
    }
}

impl From<Directory> for Source {
    fn from(directory: Directory) -> Self {
        let name = Arc::clone(&directory.snapshot().range);
        let ttl = directory.ttl();
        Source::from_snapshots(name, ttl, directory.changes())
    }
}

impl From<&Directory> for Source {
    fn from(directory: &Directory) -> Self {
        directory.clone().into()
    }
}
