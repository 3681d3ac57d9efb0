//! Leases: granting, revoking and listing them. [`keep_alive`](super::keep_alive) renews them.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    LeaseGrantOptions, LeaseGrantResponse, LeaseLeasesResponse, LeaseRevokeResponse,
    LeaseTimeToLiveOptions, LeaseTimeToLiveResponse,
};

use super::etcd_error::EtcdError;
use super::handle::Client;
use super::probes::Probes;
use crate::error::{Error, Result};

/// The longest TTL that etcd grants, in seconds (`MaxLeaseTTL` in `server/lease/lessor.go`).
const MAX_TTL: u64 = 9_000_000_000;

/// Leases. The calls fail like [`Client::put`], and with
///
/// - [`Error::Invalid`]: the id is not above 0.
/// - [`Error::LeaseNotFound`]: the lease expired, was revoked, or never existed.
impl Client {
    /// Grants a lease that expires `ttl` seconds after its last renewal.
    ///
    /// The response has the TTL that was granted, which may be longer: etcd's minimum is one and a
    /// half election timeouts (2 s by default).
    pub async fn grant(&self, ttl: i64) -> Result<LeaseGrantResponse> {
        self.grant_checked(ttl, 0).await
    }

    /// Grants a lease with an id chosen by the caller, which must be above 0.
    ///
    /// Fails with [`Error::Rpc`] and `FailedPrecondition` if a lease with this id exists.
    pub async fn grant_with_id(&self, id: i64, ttl: i64) -> Result<LeaseGrantResponse> {
        validate_id(id, "it must be above 0; `grant` lets etcd choose one")?;
        self.grant_checked(ttl, id).await
    }

    async fn grant_checked(&self, ttl: i64, id: i64) -> Result<LeaseGrantResponse> {
        if ttl <= 0 {
            return Err(Error::invalid(
                "ttl",
                ttl.to_string(),
                "a lease lasts at least one second",
            ));
        }
        let granted = self.grant_raw(ttl, id).await?;
        self.probes().forget(granted.id());
        Ok(granted)
    }

    /// Grants a lease without checking its TTL. With id 0 etcd chooses one.
    pub(super) async fn grant_raw(&self, ttl: i64, id: i64) -> Result<LeaseGrantResponse> {
        let mut lease = self.inner.transport.lease.clone();
        let options = LeaseGrantOptions::new().with_id(id);
        self.call(
            || format!("grant a lease of {ttl} s"),
            lease.grant(ttl, Some(options)),
        )
        .await
    }

    /// Revokes a lease. etcd deletes all its keys at once, in one revision.
    pub async fn revoke(&self, id: i64) -> Result<LeaseRevokeResponse> {
        validate_id(id, ID_NOT_POSITIVE)?;
        let mut lease = self.inner.transport.lease.clone();
        let operation = || format!("revoke lease {id:x}");
        let revoked = self.with_timeout(operation, async {
            lease
                .revoke(id)
                .await
                .map_err(|error| lease_error(operation(), id, error))
        });
        let revoked = revoked.await;
        if matches!(revoked, Ok(_) | Err(Error::LeaseNotFound { .. })) {
            self.probes().forget(id);
        }
        revoked
    }

    /// The remaining and the granted TTL of a lease, in seconds, and its keys if the options ask
    /// for them.
    pub async fn lease_time_to_live(
        &self,
        id: i64,
        options: impl Into<Option<LeaseTimeToLiveOptions>>,
    ) -> Result<LeaseTimeToLiveResponse> {
        validate_id(id, ID_NOT_POSITIVE)?;
        let mut lease = self.inner.transport.lease.clone();
        let operation = || format!("time to live of lease {id:x}");
        let response = self
            .call(operation, lease.time_to_live(id, options.into()))
            .await?;
        // etcd reports a lease that does not exist with a TTL of -1.
        if response.ttl() < 0 || self.probes().contains(id, response.granted_ttl()) {
            return Err(Error::LeaseNotFound { id });
        }
        Ok(response)
    }

    /// The leases that this client has granted as probes.
    pub(super) fn probes(&self) -> Arc<Probes> {
        self.extension()
    }

    /// Lists the ids of all leases.
    pub async fn leases(&self) -> Result<LeaseLeasesResponse> {
        let mut lease = self.inner.transport.lease.clone();
        self.call(|| "list leases".to_owned(), lease.leases()).await
    }
}

pub(super) const ID_NOT_POSITIVE: &str = "a lease id must be above 0";

/// Refuses ids that no lease has. etcd takes 0 for "choose an id", so a probe for lease 0 would
/// grant a new lease.
pub(super) fn validate_id(id: i64, reason: &str) -> Result<()> {
    if id <= 0 {
        return Err(Error::invalid("id", id.to_string(), reason));
    }
    Ok(())
}

/// A TTL in etcd's unit, rounded up to whole seconds.
///
/// # Errors
///
/// [`Error::Invalid`] for zero and for more than etcd grants.
pub(super) fn ttl_in_seconds(ttl: Duration) -> Result<i64> {
    let seconds = ttl
        .as_secs()
        .saturating_add(u64::from(ttl.subsec_nanos() > 0));
    let reason = match seconds {
        0 => "it must be above zero",
        1..=MAX_TTL => return Ok(seconds.try_into().unwrap_or(i64::MAX)),
        _ => "etcd grants no lease of more than 9,000,000,000 s",
    };
    Err(Error::invalid("ttl", format!("{ttl:?}"), reason))
}

pub(super) fn lease_error(operation: String, id: i64, error: etcd_client::Error) -> Error {
    match EtcdError::of_client(&error) {
        EtcdError::LeaseNotFound => Error::LeaseNotFound { id },
        _ => Error::from_etcd(operation, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttl_is_rounded_up_to_whole_seconds() {
        for (millis, seconds) in [
            (1, 1),
            (1_000, 1),
            (1_001, 2),
            (9_000_000_000_000, 9_000_000_000),
        ] {
            assert_eq!(
                ttl_in_seconds(Duration::from_millis(millis)).unwrap(),
                seconds
            );
        }
    }

    #[test]
    fn ttl_that_etcd_cannot_grant_is_invalid() {
        for ttl in [
            Duration::ZERO,
            Duration::from_millis(9_000_000_000_001),
            Duration::MAX,
        ] {
            let error = ttl_in_seconds(ttl).unwrap_err();
            let shown = format!("{ttl:?}");
            assert!(
                matches!(&error, Error::Invalid { field: "ttl", value, .. } if *value == shown),
                "{error}"
            );
        }
    }
}
