//! A place in a queue in etcd: what locks and elections are made of.
//!
//! The recipe, and the keys, are those of Go's `go.etcd.io/etcd/client/v3/concurrency` and of etcd's own
//! lock service, so that all of them exclude each other: every claimant puts a key `name/LEASE` under
//! a lease that it keeps alive, and the oldest key holds.

use std::fmt;
use std::future::Future;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, PutOptions, SortOrder, SortTarget, TxnOp,
    TxnOpResponse, WatchFilterType,
};
use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use crate::backoff::Backoff;
use crate::client::handle::{Client, shown};
use crate::client::keep_alive::KeepAlive;
use crate::client::watch::WatchOptions;
use crate::error::{Error, Result};

/// A claim, while it is not given up. Dropped, it is: in the background, as well as that goes.
pub(super) struct Claim {
    place: Place,
    /// The lease's.
    ttl: Duration,
    /// Why the claim cannot be relied on any more.
    lost: watch::Receiver<Option<Error>>,
    /// One renews the lease, and one watches the key.
    keepers: Vec<AbortOnDropHandle<()>>,
    given_up: bool,
}

/// Where a claim stands.
#[derive(Clone)]
struct Place {
    client: Client,
    /// `name/`.
    queue: Vec<u8>,
    key: Vec<u8>,
    lease: i64,
    /// When the key was created: the place in the queue.
    revision: i64,
}

impl Claim {
    /// Takes a place in the queue.
    pub(super) async fn new(
        client: &Client,
        name: &[u8],
        value: Vec<u8>,
        ttl: i64,
    ) -> Result<Self> {
        let lease = Box::pin(granted(client, ttl)).await?;
        let queue = queue(name);
        let mut claim = Self {
            place: Place {
                key: [&queue[..], format!("{lease:x}").as_bytes()].concat(),
                queue,
                client: client.clone(),
                lease,
                revision: 0,
            },
            // A grant of 0 or less is refused.
            ttl: Duration::from_secs(ttl.unsigned_abs()),
            lost: watch::channel(None).1,
            keepers: Vec::new(),
            given_up: false,
        };
        let (tell, lost) = watch::channel(None);
        let keep_alive = Box::pin(client.keep_alive(lease)).await?;
        claim.lost = lost;
        let keep = tokio::spawn(keep(keep_alive, tell.clone()));
        claim.keepers.push(AbortOnDropHandle::new(keep));
        claim.place.revision = claim.unless_lost(claim.place.enter(value)).await?;
        let place = claim.place.clone();
        let watch = tokio::spawn(async move { told(&tell, place.lost().await) });
        claim.keepers.push(AbortOnDropHandle::new(watch));
        Ok(claim)
    }

    /// Whether it holds now.
    pub(super) async fn is_first(&self) -> Result<bool> {
        let (before, _) = self.unless_lost(self.place.before()).await?;
        Ok(before.is_none())
    }

    /// Waits until it holds.
    pub(super) async fn first(&self) -> Result<()> {
        self.unless_lost(async {
            let mut pauses = Backoff::for_etcd();
            loop {
                match self.place.wait_for_one().await {
                    Ok(true) => return Ok(()),
                    Ok(false) => pauses.reset(),
                    Err(error) if is_over(&error) => return Err(error),
                    Err(error) => {
                        tracing::debug!(%error, "waiting for a lock");
                        tokio::time::sleep(pauses.next()).await;
                    }
                }
            }
        })
        .await
    }

    /// Changes the value, if the claim is still there.
    pub(super) async fn set(&self, value: Vec<u8>) -> Result<()> {
        self.unless_lost(self.place.set(value)).await
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.place.key
    }

    pub(super) fn revision(&self) -> i64 {
        self.place.revision
    }

    pub(super) fn guard(&self) -> Compare {
        self.place.guard()
    }

    pub(super) fn is_held(&self) -> bool {
        self.lost.borrow().is_none()
    }

    /// Resolves when the claim is lost, or may be.
    pub(super) async fn lost(&self) -> Error {
        let mut lost = self.lost.clone();
        let lost = lost.wait_for(Option::is_some).await;
        let error = lost.ok().and_then(|error| error.clone());
        error.unwrap_or_else(|| self.place.client.closed())
    }

    async fn unless_lost<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        // Boxed: rare, and large.
        let mut work = Box::pin(work);
        tokio::select! {
            biased;
            error = self.lost() => Err(error),
            result = &mut work => result,
        }
    }

    /// Gives the claim up; whoever is next has it when this returns.
    pub(super) async fn give_up(mut self) -> Result<()> {
        let Place { client, lease, .. } = &self.place;
        let limit = client.request_timeout() * 2;
        Box::pin(revoked(client, *lease, limit)).await?;
        self.given_up = true;
        Ok(())
    }
}

impl Place {
    /// Creates the key; it is this claim's own, so that doing it twice does no harm.
    async fn enter(&self, value: Vec<u8>) -> Result<i64> {
        let mut pauses = Backoff::for_etcd();
        loop {
            let options = PutOptions::new().with_lease(self.lease);
            let entered = self
                .client
                .txn()
                .when([Compare::create_revision(
                    self.key.as_slice(),
                    CompareOp::Equal,
                    0,
                )])
                .and_then([TxnOp::put(
                    self.key.as_slice(),
                    value.as_slice(),
                    Some(options),
                )])
                .or_else([TxnOp::get(self.key.as_slice(), None)])
                .commit()
                .await;
            match entered {
                Ok(entered) if entered.succeeded() => {
                    return Ok(entered.header().map_or(0, |header| header.revision()));
                }
                Ok(entered) => {
                    if let Some(TxnOpResponse::Get(got)) = entered.op_responses().first()
                        && let Some(kv) = got.kvs().first()
                    {
                        return Ok(kv.create_revision());
                    }
                }
                Err(error) if is_over(&error) => return Err(error),
                // There is no lease to hang the key on.
                Err(error) if error.code() == Some(Code::NotFound) => {
                    return Err(Error::LeaseNotFound { id: self.lease });
                }
                Err(error) => tracing::debug!(%error, "not in the queue yet"),
            }
            tokio::time::sleep(pauses.next()).await;
        }
    }

    /// The claim before this one, if there is one, and etcd's revision then. An error that is over when
    /// this one is not there: what lost its key must not be taken for the first.
    async fn before(&self) -> Result<(Option<KeyValue>, i64)> {
        let options = GetOptions::new()
            .with_prefix()
            .with_keys_only()
            .with_max_create_revision(self.revision)
            .with_sort(SortTarget::Create, SortOrder::Descend)
            .with_limit(2);
        let found = self.client.get(self.queue.as_slice(), options).await?;
        let revision = found.header().map_or(0, |header| header.revision());
        match found.kvs() {
            [own, before @ ..] if self.is(own) => Ok((before.first().cloned(), revision)),
            _ => Err(self.gone().await),
        }
    }

    fn is(&self, found: &KeyValue) -> bool {
        found.key() == self.key
            && found.create_revision() == self.revision
            && found.lease() == self.lease
    }

    /// Why the key is not there.
    async fn gone(&self) -> Error {
        match self.client.lease_time_to_live(self.lease, None).await {
            Err(error) if is_over(&error) => error,
            _ => Error::Rpc {
                operation: format!("hold {}", shown(&self.key)),
                status: Box::new(Status::failed_precondition(
                    "the key was deleted or put by somebody else",
                )),
            },
        }
    }

    /// True if there is none before it; else waits until that one is gone.
    async fn wait_for_one(&self) -> Result<bool> {
        let (before, revision) = self.before().await?;
        let Some(before) = before else {
            return Ok(true);
        };
        self.until_deleted(before.key(), revision).await?;
        Ok(false)
    }

    /// Resolves when the key is not there any more, with the reason.
    async fn lost(&self) -> Error {
        let mut pauses = Backoff::for_etcd();
        loop {
            let deleted = async {
                let (_, revision) = self.before().await?;
                self.until_deleted(&self.key, revision).await
            };
            match deleted.await {
                // A look at it tells why.
                Ok(()) => pauses.reset(),
                Err(error) if is_over(&error) => return error,
                Err(error) => {
                    tracing::debug!(%error, "watching the key of a lock");
                    tokio::time::sleep(pauses.next()).await;
                }
            }
        }
    }

    /// Waits for a deletion after this revision; it may also end for no reason.
    async fn until_deleted(&self, key: &[u8], revision: i64) -> Result<()> {
        let options = WatchOptions::new()
            .with_start_revision(revision + 1)
            .with_filters([WatchFilterType::NoPut]);
        let mut watch = self.client.watch(key, options).await?;
        while let Some(response) = watch.next().await {
            if !response?.events().is_empty() {
                break;
            }
        }
        Ok(())
    }

    async fn set(&self, value: Vec<u8>) -> Result<()> {
        let options = PutOptions::new().with_lease(self.lease);
        let set = self
            .client
            .txn()
            .when([self.guard()])
            .and_then([TxnOp::put(self.key.as_slice(), value, Some(options))])
            .commit();
        if set.await?.succeeded() {
            Ok(())
        } else {
            Err(self.gone().await)
        }
    }

    fn guard(&self) -> Compare {
        Compare::create_revision(self.key.as_slice(), CompareOp::Equal, self.revision)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.given_up || self.place.client.is_closed() {
            return;
        }
        // Without a runtime the lease runs out in its time.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (client, lease, ttl) = (self.place.client.clone(), self.place.lease, self.ttl);
            runtime.spawn(async move {
                if let Err(error) = revoked(&client, lease, ttl).await {
                    tracing::debug!(%error, "a lock is given up when its lease runs out");
                }
            });
        }
    }
}

/// Revokes a lease. A try that was lost with a leader may have been done or not, and doing it twice does
/// no harm; the last begins within the limit.
async fn revoked(client: &Client, lease: i64, limit: Duration) -> Result<()> {
    let begun = Instant::now();
    let mut pauses = Backoff::for_etcd();
    loop {
        match client.revoke(lease).await {
            // As given up as can be.
            Ok(_) | Err(Error::LeaseNotFound { .. }) => return Ok(()),
            Err(error) if is_over(&error) || begun.elapsed() >= limit => return Err(error),
            Err(error) => tracing::debug!(%error, "a lock is not given up yet"),
        }
        tokio::time::sleep(pauses.next()).await;
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("key", &String::from_utf8_lossy(&self.place.key))
            .field("revision", &self.place.revision)
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}

/// Where the claims on a name are.
pub(super) fn queue(name: &[u8]) -> Vec<u8> {
    [name, b"/"].concat()
}

/// A lease for one claim. Under an id of ours a grant can be tried again though it may have been done:
/// that the lease exists is then as good. A try that was lost with a leader takes all of its time, so
/// there is time for a second, and for a third.
async fn granted(client: &Client, ttl: i64) -> Result<i64> {
    let id = fastrand::i64(1..=i64::MAX);
    let begun = Instant::now();
    let mut pauses = Backoff::for_etcd();
    loop {
        match client.grant_with_id(id, ttl).await {
            Ok(_) => return Ok(id),
            // Nobody else chooses the same of 2^63.
            Err(error) if error.code() == Some(Code::FailedPrecondition) => return Ok(id),
            Err(error) if is_over(&error) || begun.elapsed() >= client.request_timeout() * 2 => {
                return Err(error);
            }
            Err(error) => tracing::debug!(%error, "no lease yet"),
        }
        tokio::time::sleep(pauses.next()).await;
    }
}

/// Renews the lease, and tells when it cannot be relied on any more.
async fn keep(mut keep_alive: KeepAlive, tell: watch::Sender<Option<Error>>) {
    while let Some(answer) = keep_alive.next().await {
        if let Err(error) = answer {
            return told(&tell, error);
        }
    }
}

/// The first reason is the one that is told.
fn told(tell: &watch::Sender<Option<Error>>, why: Error) {
    tell.send_if_modified(|told| {
        let is_first = told.is_none();
        told.get_or_insert(why);
        is_first
    });
}

fn is_over(error: &Error) -> bool {
    error.is_permanent() || matches!(error, Error::Closed { .. } | Error::LeaseNotFound { .. })
}
