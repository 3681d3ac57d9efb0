//! The settings of the connections to each endpoint.

use std::time::Duration;

use crate::error::{Error, Result};
use crate::time::MAX_DURATION;

/// The most connections to one endpoint. Each connection carries thousands of calls, so more are
/// a mistake.
const MAX_CONNECTIONS: usize = 1_000;

/// The default longest backoff. gRPC's is 120 s, which is long for a server that was only
/// restarted. Servers that are gone for good are removed from the set.
const DEFAULT_MAX_BACKOFF: Duration = Duration::from_secs(30);

/// How a channel connects to each of its endpoints.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectPlan {
    /// Connections per endpoint.
    pub(crate) connections: usize,
    /// The longest pause between two attempts to connect.
    pub(crate) max_backoff: Duration,
}

impl Default for ConnectPlan {
    fn default() -> Self {
        Self {
            connections: 1,
            max_backoff: DEFAULT_MAX_BACKOFF,
        }
    }
}

impl ConnectPlan {
    /// Checks the plan, and limits the backoff to [`MAX_DURATION`].
    pub(crate) fn validate(self) -> Result<Self> {
        let count = self.connections.to_string();
        if self.connections == 0 {
            let reason = "must be at least 1";
            return Err(Error::invalid("connections_per_endpoint", count, reason));
        }
        if self.connections > MAX_CONNECTIONS {
            let reason = format!("must be at most {MAX_CONNECTIONS}");
            return Err(Error::invalid("connections_per_endpoint", count, reason));
        }
        if self.max_backoff.is_zero() {
            let reason = "must be more than zero";
            return Err(Error::invalid("max_connect_backoff", "0 s", reason));
        }
        Ok(Self {
            max_backoff: self.max_backoff.min(MAX_DURATION),
            ..self
        })
    }
}
