//! How a client is closed, and what its calls return from then on.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::future::select;
use futures::stream::{self, StreamExt};
use tokio::time::{sleep, timeout};

use super::handle::Client;
use super::lease::lease_error;
use super::transport::{CallOptions, RpcService};
use crate::backoff::Backoff;
use crate::balance::AttemptedEndpoints;
use crate::error::{Error, Result};
use crate::runtime;

/// How long [`Client::close`] may take to give locks back. etcd needs milliseconds, and what is not
/// given back ends with its TTL.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the first member may take to revoke a lease before another is asked too.
const SECOND_MEMBER_AFTER: Duration = Duration::from_millis(400);

/// How many leases are revoked at the same time. Calls beyond the streams of a proxy wait.
const CONCURRENT_REVOKES: usize = 128;

impl Client {
    /// Closes this client and all its clones: gives back its locks and leaderships, leaves the
    /// queues in which it waits, and closes the connections. Calls in progress, open watches and
    /// keep-alives, and everything tried later end with [`Error::Closed`]. Closing twice is
    /// harmless.
    ///
    /// Giving back takes one round trip, and at most 1 s while etcd does not respond; locks and
    /// leaderships then end with their TTL. From the start of the call none of them
    /// [is held](super::Lock::is_held). Registrations stay until the TTL of their leases has
    /// passed; end them with [`Registrar::close`](crate::Registrar::close) before.
    ///
    /// Dropping the future closes the connections at once. Locks that are not given back by then
    /// end with their TTL.
    ///
    /// # Errors
    ///
    /// None today.
    pub async fn close(&self) -> Result<()> {
        self.inner.closed.cancel();
        let _connections = CloseOnDrop(&self.inner.transport.rpc);
        self.give_back_leases().await;
        Ok(())
    }

    /// Whether [`close`](Self::close) was called on this client or a clone.
    pub fn is_closed(&self) -> bool {
        self.inner.closed.is_cancelled()
    }

    /// Revokes the leases of locks and elections, for at most [`GIVE_BACK_TIMEOUT`].
    async fn give_back_leases(&self) {
        let leases = self.inner.held_leases.list();
        if leases.is_empty() || runtime::require(String::new).is_err() {
            return;
        }
        let revoking = stream::iter(leases)
            .for_each_concurrent(CONCURRENT_REVOKES, |lease| self.give_back(lease));
        if timeout(GIVE_BACK_TIMEOUT, revoking).await.is_err() {
            tracing::debug!("cannot give back all locks, leaving the rest to expire");
        }
    }

    /// Revokes a lease, although the client is closed. Asks a second member beside the first when
    /// the first is slow.
    async fn give_back(&self, id: i64) {
        let options = CallOptions {
            attempted: Some(AttemptedEndpoints::default()),
            ..CallOptions::default()
        };
        let first = options.clone().scope(self.revoke_although_closed(id));
        let second = options.scope(async {
            sleep(SECOND_MEMBER_AFTER).await;
            self.revoke_although_closed(id).await;
        });
        select(pin!(first), pin!(second)).await;
        self.inner.held_leases.remove(id);
    }

    /// Tries until the lease is revoked, or cannot be.
    async fn revoke_although_closed(&self, id: i64) {
        let mut lease = self.inner.transport.lease.clone();
        let mut backoff = Backoff::for_etcd();
        while let Err(error) = lease.revoke(id).await {
            let error = lease_error(format!("revoke lease {id:x}"), id, error);
            // Another call of `close` may have closed the connections.
            if error.is_permanent() || self.inner.transport.rpc.is_closed() {
                tracing::debug!(%error, "cannot give back a lock, leaving it to expire");
                return;
            }
            sleep(backoff.next()).await;
        }
    }

    /// The result of `work`, or [`Error::Closed`] as soon as the client is closed.
    pub(super) async fn or_closed<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let mut work = pin!(work);
        tokio::select! {
            biased;
            () = self.inner.closed.cancelled() => Err(self.closed_error()),
            // The closing client may end the work before this task sees that it is closed.
            result = &mut work => result.map_err(|error| self.closed_error_or(error)),
        }
    }

    /// [`Error::Closed`] if the client is closed, whatever else went wrong.
    pub(super) fn closed_error_or(&self, error: Error) -> Error {
        if self.is_closed() {
            self.closed_error()
        } else {
            error
        }
    }

    pub(super) fn closed_error(&self) -> Error {
        Error::Closed {
            name: self.name().to_owned(),
        }
    }
}

/// Closes the connections when it is dropped, also with the future of `close`.
struct CloseOnDrop<'a>(&'a RpcService);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    /// A call that starts while the client is closed may find the connections gone, or lose its
    /// response, before it sees that the client is closed.
    #[tokio::test]
    async fn any_failure_of_a_closed_client_is_closed() {
        let client = Client::connect_lazy("main", Config::default()).unwrap();
        let failing = async {
            client.close().await?;
            let status = Box::new(tonic::Status::cancelled("the client is closed"));
            let operation = "put".to_owned();
            Err::<(), _>(Error::Rpc { operation, status })
        };
        let error = client.or_closed(failing).await.unwrap_err();
        assert!(matches!(error, Error::Closed { .. }), "{error}");
    }
}
