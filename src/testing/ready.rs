//! Waits until a server responds.

use std::time::Instant;

use super::error::{Result, TestingError};
use super::etcd::Etcd;
use super::timing::{POLL_INTERVAL, PROBE_TIMEOUT};

impl Etcd {
    /// Waits until the server responds to a linearizable read, which needs a leader.
    ///
    /// A server with a certificate but without
    /// [`connect_options`](super::EtcdBuilder::connect_options) cannot be called. This method then
    /// waits for the line in its log that says that it is ready.
    ///
    /// # Errors
    ///
    /// Fails if the server is down or exits, or if it does not respond within the builder's
    /// timeout. Both errors have an excerpt of its log.
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
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn probe(&self) -> std::result::Result<(), String> {
        if self.options().is_tls() && self.options().connect.is_none() {
            return if self.last_log().contains("ready to serve client requests") {
                Ok(())
            } else {
                Err("its log does not say that the server is ready".to_owned())
            };
        }
        let probe = async {
            let mut client = self.client().await.map_err(|error| error.to_string())?;
            match client.get("ready", None).await {
                Ok(_) => Ok(()),
                // With authentication enabled, etcd does the linearizable read before it refuses.
                Err(etcd_client::Error::GRpcStatus(status)) if is_refusal(status.code()) => Ok(()),
                // A learner refuses all reads, and only once it runs.
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
            .unwrap_or_else(|_| Err(format!("no response within {PROBE_TIMEOUT:?}")))
    }
}

fn is_refusal(code: tonic::Code) -> bool {
    use tonic::Code::{InvalidArgument, PermissionDenied, Unauthenticated};
    matches!(code, InvalidArgument | PermissionDenied | Unauthenticated)
}
