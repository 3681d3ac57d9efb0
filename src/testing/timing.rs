//! Intervals shared by the servers and clusters.

use std::time::Duration;

/// The interval at which a condition is checked while waiting for it.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The time limit of one request that checks a server. A request that hangs is made again.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
