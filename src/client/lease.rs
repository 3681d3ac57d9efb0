//! Leases: granted, renewed once, looked at, revoked.

use std::time::Duration;

use etcd_client::{
    LeaseGrantOptions, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseKeepAliveStream,
    LeaseKeeper, LeaseLeasesResponse, LeaseRevokeResponse, LeaseTimeToLiveOptions,
    LeaseTimeToLiveResponse,
};
use tokio::time::timeout;
use tonic::{Code, Status};

use super::handle::{Client, OLD_TOKEN, STREAM_OPENS_WITHIN};
use crate::error::{Error, Result};

/// The time to live of a lease that only asks whether one of its id exists, in seconds. It is known by
/// it: etcd never changes what it has granted, and nobody else has use for such a number. Above etcd's
/// usual minimum (2 s), or it would be granted another; and short, for where its revocation fails, or its
/// process dies before that, what was put under it meanwhile is to go soon.
const PROBE_TTL: i64 = 13;

/// Leases. Errors as for [`Client::put`], [`Error::LeaseNotFound`] for a lease that is gone, and
/// [`Error::Invalid`] for an id that is not above 0.
///
/// Leases of 13 seconds are this client's own: that is how it asks whether a lease is really gone.
/// It never grants one to its user, who gets 14 where 13 were asked for or are etcd's minimum; and one that
/// another program was granted counts as gone here: to renew it is to revoke it.
impl Client {
    /// Grants a lease that lasts `ttl` seconds unless it is renewed. There may be a longer one
    /// than was asked for (etcd's minimum is one and a half election timeouts, 2 s by default);
    /// the answer tells.
    pub async fn grant(&self, ttl: i64) -> Result<LeaseGrantResponse> {
        self.granted(ttl, 0).await
    }

    /// Grants a lease with an id of the caller's, above 0. etcd refuses one that exists, with
    /// `FailedPrecondition`.
    pub async fn grant_with_id(&self, id: i64, ttl: i64) -> Result<LeaseGrantResponse> {
        check(id, "it must be above 0; `grant` has etcd choose one")?;
        self.granted(ttl, id).await
    }

    async fn granted(&self, ttl: i64, id: i64) -> Result<LeaseGrantResponse> {
        if ttl <= 0 {
            return Err(Error::invalid(
                "ttl",
                ttl.to_string(),
                "a lease lasts one second at least",
            ));
        }
        let ttl = if ttl == PROBE_TTL { ttl + 1 } else { ttl };
        let granted = self.granted_just(ttl, id).await?;
        if granted.ttl() != PROBE_TTL {
            return Ok(granted);
        }
        // Less was asked for, and this is etcd's minimum: one and a half election timeouts. Whoever renewed
        // it would take it for one that only asks.
        self.revoke(granted.id()).await?;
        self.granted_just(PROBE_TTL + 1, id).await
    }

    async fn granted_just(&self, ttl: i64, id: i64) -> Result<LeaseGrantResponse> {
        let mut lease = self.inner.transport.lease.clone();
        let options = LeaseGrantOptions::new().with_id(id);
        self.call(
            || format!("grant a lease of {ttl} s"),
            lease.grant(ttl, Some(options)),
        )
        .await
    }

    /// Revokes a lease; every key on it is deleted at once, in one revision.
    pub async fn revoke(&self, id: i64) -> Result<LeaseRevokeResponse> {
        check(id, ABOVE_0)?;
        let mut lease = self.inner.transport.lease.clone();
        let operation = || format!("revoke lease {id:x}");
        self.bounded(operation, async {
            lease
                .revoke(id)
                .await
                .map_err(|error| lease_error(operation(), id, error))
        })
        .await
    }

    /// How long a lease still lasts, in seconds, and with options the keys that hang on it.
    pub async fn lease_time_to_live(
        &self,
        id: i64,
        options: impl Into<Option<LeaseTimeToLiveOptions>>,
    ) -> Result<LeaseTimeToLiveResponse> {
        check(id, ABOVE_0)?;
        let mut lease = self.inner.transport.lease.clone();
        let operation = || format!("time to live of lease {id:x}");
        let answer = self
            .call(operation, lease.time_to_live(id, options.into()))
            .await?;
        // Below 0 is etcd's way to say that there is none.
        if answer.ttl() < 0 || answer.granted_ttl() == PROBE_TTL {
            return Err(Error::LeaseNotFound { id });
        }
        Ok(answer)
    }

    /// All leases there are.
    pub async fn leases(&self) -> Result<LeaseLeasesResponse> {
        let mut lease = self.inner.transport.lease.clone();
        self.call(|| "list leases".to_owned(), lease.leases()).await
    }

    /// Renews a lease once, and tells its new TTL.
    pub async fn keep_alive_once(&self, id: i64) -> Result<LeaseKeepAliveResponse> {
        check(id, ABOVE_0)?;
        self.opened_stream(|| keeping(id), || self.renewed(id, None))
            .await
            .map(|(answer, _)| answer)
    }

    /// Renews a lease on the stream of the last renewal, or else on a new one, on any member; each is given
    /// so long to answer before the next is asked, and no longer than for any stream.
    ///
    /// That it is gone is not confirmed, for who asks grants another then. To ask would make a lease of that id
    /// for a moment, and what is put under it in that moment would stay for as long as it lasts, if this
    /// process dies before it is revoked.
    pub(crate) async fn renew(
        &self,
        id: i64,
        link: Option<Link>,
        within: Duration,
    ) -> Result<Link> {
        let within = within.min(STREAM_OPENS_WITHIN);
        if let Some(link) = link {
            let renewal = Box::pin(self.renewed_once(id, Some(link)));
            match timeout(within, self.unless_closed(renewal)).await {
                Ok(Ok((_, link))) => return Ok(link),
                Ok(Err(error)) if is_over(&error) => return Err(error),
                Ok(Err(error)) => tracing::debug!(%error, "a stream of renewals was lost"),
                Err(_) => tracing::debug!(id, "a renewal is not answered, trying another member"),
            }
        }
        self.opened_stream_within(within, || keeping(id), || self.renewed_once(id, None))
            .await
            .map(|(_, link)| link)
    }

    async fn opened(&self, id: i64) -> Result<Link> {
        let mut lease = self.inner.transport.lease.clone();
        let opened = lease.keep_alive(id).await;
        opened.map_err(|error| lease_error(keeping(id), id, error))
    }

    /// An answer to a renewal comes from what the leader has applied so far. A new one may not have
    /// applied the grant yet, and says that there is no such lease (etcd#6978; seen with 3.5.1).
    /// A grant goes through the log: that of an id that exists is refused.
    async fn confirmed(&self, id: i64, error: Error) -> Error {
        if !matches!(error, Error::LeaseNotFound { .. }) {
            return error;
        }
        match self.granted_just(PROBE_TTL, id).await {
            Ok(_) => self.gone(id).await,
            Err(refused) if refused.code() == Some(Code::FailedPrecondition) => Error::Rpc {
                operation: keeping(id),
                status: Box::new(Status::unavailable(
                    "the lease is there, and the leader does not know it yet",
                )),
            },
            // Until somebody makes room it grants nothing, to anybody: what it said first stands.
            Err(refused) if is_full(&refused) => error,
            // It may have been granted nevertheless. The next renewal tells.
            Err(unknown) => unknown,
        }
    }

    /// A lease of this id is there, and it is not the one that was granted but the one that asked for it.
    async fn gone(&self, id: i64) -> Error {
        // Nobody has use for it. If this fails, it is known by its TTL until it expires.
        if let Err(error) = self.revoke(id).await {
            tracing::debug!(%error, "a lease that only asked is left to expire");
        }
        Error::LeaseNotFound { id }
    }

    /// One renewal with its answer, on the open link or a new one. Where it fails the link is
    /// gone, so that a late answer is never taken for another's.
    pub(super) async fn renewed(
        &self,
        id: i64,
        link: Option<Link>,
    ) -> Result<(LeaseKeepAliveResponse, Link)> {
        match self.renewed_once(id, link).await {
            Err(error) => Err(self.confirmed(id, error).await),
            renewed => renewed,
        }
    }

    /// The same, without confirming that the lease is gone.
    async fn renewed_once(
        &self,
        id: i64,
        link: Option<Link>,
    ) -> Result<(LeaseKeepAliveResponse, Link)> {
        if let Some(link) = link {
            match self.renewed_on(id, link).await {
                // A stream has the token that it was opened with, and etcd asks for it anew with each
                // renewal (from 3.5.28 and 3.6.9 on). What a new one is refused for is meant.
                Err(error) if is_refusal(&error) => {
                    tracing::debug!(%error, "a stream of renewals is too old, opening another");
                }
                result => return result,
            }
        }
        let link = self.opened(id).await?;
        self.renewed_on(id, link).await
    }

    async fn renewed_on(&self, id: i64, link: Link) -> Result<(LeaseKeepAliveResponse, Link)> {
        let (mut keeper, mut stream) = link;
        let failed = |error| lease_error(keeping(id), id, error);
        keeper.keep_alive().await.map_err(failed)?;
        let answered = stream.message().await.map_err(failed).and_then(|answer| {
            answer.ok_or_else(|| Error::Rpc {
                operation: keeping(id),
                status: Box::new(Status::unavailable("the server ended the stream")),
            })
        });
        match answered {
            Ok(answer) if answer.ttl() == PROBE_TTL => Err(self.gone(id).await),
            Ok(answer) if answer.ttl() > 0 => Ok((answer, (keeper, stream))),
            Ok(_) => Err(Error::LeaseNotFound { id }),
            Err(error) => Err(error),
        }
    }
}

/// A stream of renewals.
pub(crate) type Link = (LeaseKeeper, LeaseKeepAliveStream);

pub(super) fn is_over(error: &Error) -> bool {
    matches!(error, Error::LeaseNotFound { .. } | Error::Closed { .. }) || error.is_permanent()
}

/// Whether it is the user who was refused, whatever for.
fn is_refusal(error: &Error) -> bool {
    match error.code() {
        Some(Code::Unauthenticated | Code::PermissionDenied) => true,
        // What etcd calls a token that is older than its users and roles, in the middle of a stream.
        Some(Code::InvalidArgument) => error.to_string().contains(OLD_TOKEN),
        _ => false,
    }
}

/// Whether etcd has no room for anything new. That it has too much to do has the same code, and passes.
fn is_full(error: &Error) -> bool {
    matches!(error, Error::Rpc { status, .. }
        if status.code() == Code::ResourceExhausted
            && !status.message().contains("too many requests"))
}

pub(super) const ABOVE_0: &str = "the id of a lease is above 0";

/// etcd takes 0 for "choose one", and would grant a lease where one is asked for.
pub(super) fn check(id: i64, reason: &str) -> Result<()> {
    if id <= 0 {
        return Err(Error::invalid("id", id.to_string(), reason));
    }
    Ok(())
}

pub(super) fn keeping(id: i64) -> String {
    format!("keep lease {id:x} alive")
}

fn lease_error(operation: String, id: i64, error: etcd_client::Error) -> Error {
    match error {
        etcd_client::Error::GRpcStatus(status) if status.code() == Code::NotFound => {
            Error::LeaseNotFound { id }
        }
        // What etcd-client makes of an answer with a TTL of 0.
        etcd_client::Error::LeaseKeepAliveError(text) if text == "lease not found" => {
            Error::LeaseNotFound { id }
        }
        error => Error::from_etcd(operation, error),
    }
}
