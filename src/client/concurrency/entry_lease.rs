//! The lease of an entry in a queue.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::backoff::Backoff;
use crate::client::etcd_error::EtcdError;
use crate::client::handle::Client;
use crate::client::lease::ttl_in_seconds;
use crate::error::{Error, Result};

/// A lease that belongs to one entry. Dropping it revokes it in the background, on a best-effort
/// basis. Closing the client revokes it too.
pub(super) struct EntryLease {
    client: Client,
    id: i64,
    ttl: Duration,
    is_over: bool,
}

impl EntryLease {
    /// Grants a lease, and retries for twice the `request_timeout`.
    ///
    /// The id is chosen here, so that a grant can be repeated after its response was lost: it then
    /// fails because the lease exists. An attempt that is lost with a leader takes a whole
    /// `request_timeout`, so there is time for a second and a third.
    pub(super) async fn grant(client: &Client, ttl: Duration) -> Result<Self> {
        let seconds = ttl_in_seconds(ttl)?;
        let mut lease = Self {
            client: client.clone(),
            id: fastrand::i64(1..=i64::MAX),
            ttl: Duration::from_secs(seconds.unsigned_abs()),
            is_over: false,
        };
        client.inner.held_leases.add(lease.id);
        let granted = lease.grant_until_final(seconds).await;
        if granted.is_err() {
            lease.end();
        }
        granted.map(|()| lease)
    }

    async fn grant_until_final(&self, seconds: i64) -> Result<()> {
        let limit = self.client.request_timeout() * 2;
        let started_at = Instant::now();
        let mut backoff = Backoff::for_etcd();
        loop {
            match self.client.grant_with_id(self.id, seconds).await {
                Ok(_) => return Ok(()),
                // The lease exists. No other client chose the same of 2^63 ids.
                Err(error) if EtcdError::of(&error) == EtcdError::LeaseExists => return Ok(()),
                Err(error) if error.is_permanent() || started_at.elapsed() >= limit => {
                    return Err(error);
                }
                Err(error) => tracing::debug!(%error, "cannot grant a lease, retrying"),
            }
            sleep(backoff.next()).await;
        }
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    /// Revokes the lease, which deletes the entry's key.
    pub(super) async fn revoke(mut self) -> Result<()> {
        let limit = self.client.request_timeout() * 2;
        revoke(&self.client, self.id, limit).await?;
        self.end();
        Ok(())
    }

    /// Leaves the lease as it is.
    fn end(&mut self) {
        self.client.inner.held_leases.remove(self.id);
        self.is_over = true;
    }
}

impl Drop for EntryLease {
    fn drop(&mut self) {
        // The closing client revokes its leases itself.
        if self.is_over || self.client.is_closed() {
            return;
        }
        // Outside of a runtime the lease expires after its TTL.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.end();
        };
        let (client, id, ttl) = (self.client.clone(), self.id, self.ttl);
        runtime.spawn(async move {
            match revoke(&client, id, ttl).await {
                Ok(()) => {}
                Err(Error::Closed { .. }) => return,
                Err(error) => {
                    tracing::debug!(%error, "cannot release a queue entry, leaving it to expire");
                }
            }
            client.inner.held_leases.remove(id);
        });
    }
}

/// Revokes a lease. Repeating it is harmless, so an attempt that was lost with a leader is
/// repeated. The last attempt starts within `limit`.
async fn revoke(client: &Client, id: i64, limit: Duration) -> Result<()> {
    let started_at = Instant::now();
    let mut backoff = Backoff::for_etcd();
    loop {
        match client.revoke(id).await {
            Ok(_) | Err(Error::LeaseNotFound { .. }) => return Ok(()),
            Err(error) if error.is_permanent() || started_at.elapsed() >= limit => {
                return Err(error);
            }
            Err(error) => tracing::debug!(%error, "cannot revoke a lease, retrying"),
        }
        sleep(backoff.next()).await;
    }
}
