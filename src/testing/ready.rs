//! When a server under test counts as up.

use std::time::{Duration, Instant};

use super::etcd::POLL;
use super::{Etcd, Result, TestingError};

/// How long one probe of a server may take; a probe that hangs is made again.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
impl Etcd {
    /// Waits until it answers: a linearizable read, so a member of a cluster has found a leader.
    ///
    /// A server started with a certificate but without
    /// [`connect_options`](super::EtcdBuilder::connect_options) cannot be asked; then its log must say that it
    /// is ready.
    ///
    /// # Errors
    ///
    /// When it is down, or goes down, or does not answer within the builder's timeout. Both errors carry
    /// an excerpt of its log.
    pub async fn wait_ready(&self) -> Result<()> {
        let after = self.options().timeout;
        let deadline = Instant::now() + after;
        loop {
            let reason = match self.probe().await {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            };
            self.check_running()?;
            if Instant::now() > deadline {
                return Err(TestingError::NotReady {
                    endpoint: self.endpoint(),
                    after,
                    reason,
                    log: self.log_excerpt(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn probe(&self) -> std::result::Result<(), String> {
        if self.options().is_tls() && self.options().connect.is_none() {
            return if self.last_log().contains("ready to serve client requests") {
                Ok(())
            } else {
                Err("its log does not say that it is ready".to_owned())
            };
        }
        let probe = async {
            let mut client = self.client().await.map_err(|error| error.to_string())?;
            match client.get("ready", None).await {
                Ok(_) => Ok(()),
                // With authentication on, the read comes first, and then this refusal.
                Err(etcd_client::Error::GRpcStatus(status)) if is_refusal(status.code()) => Ok(()),
                // A learner answers nothing but this, and says so once it runs.
                Err(etcd_client::Error::GRpcStatus(status))
                    if status.message().contains("not supported for learner") =>
                {
                    Ok(())
                }
                Err(error) => Err(error.to_string()),
            }
        };
        tokio::time::timeout(PROBE_TIMEOUT, probe)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {PROBE_TIMEOUT:?}")))
    }
}

fn is_refusal(code: tonic::Code) -> bool {
    use tonic::Code::{InvalidArgument, PermissionDenied, Unauthenticated};
    matches!(code, InvalidArgument | PermissionDenied | Unauthenticated)
}
