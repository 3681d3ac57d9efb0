//! Time values shared by several modules.

use std::time::Duration;

use tokio::time::Instant;

/// The longest duration that is used in arithmetic with [`Instant`]: 30 years, which no process
/// outlives. `Instant + Duration::MAX` would panic.
pub(crate) const MAX_DURATION: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// Sleeps until `at`, or forever for `None`.
pub(crate) async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
