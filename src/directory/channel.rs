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
    /// calls wait for them. Dropping the future before it returns leaves nothing behind.
    ///
    /// Must be called within a Tokio runtime, which runs the tasks that follow etcd and keep the
    /// endpoints connected.
    ///
    /// ```no_run
    /// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
    /// use goo_etcd::BalancedChannel;
    ///
    /// let channel = BalancedChannel::connect(&client, "greeter").await?;
    /// // Any client that tonic generates takes the channel, as in `GreeterClient::new(channel)`.
    /// # Ok(())
    /// # }
    /// ```
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
