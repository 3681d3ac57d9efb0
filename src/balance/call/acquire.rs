//! The two waits of a call: for a permit of the channel, and for a stream on a ready endpoint.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tonic::Status;

use super::progress::{Progress, WaitingFor};
use super::{AttemptedEndpoints, Dispatcher};
use crate::balance::connection::ReservedStream;
use crate::balance::pool::{Endpoint, ReadyEndpoint, WaitingCall};
use crate::runtime;

impl Dispatcher {
    pub(super) async fn acquire_permit(
        &self,
        progress: &mut Progress<'_>,
    ) -> Result<Option<OwnedSemaphorePermit>, Status> {
        let Some(semaphore) = &self.concurrency else {
            return Ok(None);
        };
        progress.set_waiting_for(WaitingFor::Permit);
        let acquiring = Arc::clone(semaphore).acquire_owned();
        let part = "a limit of concurrent calls";
        let acquiring = runtime::timeout_at_for_call(part, progress.permit_deadline(), acquiring)?;
        let permit = acquiring.await.map_err(|_| {
            Status::unavailable(format!(
                "the channel's concurrency limit was reached for {:?}",
                self.ready_timeout
            ))
        })?;
        progress.set_waiting_for(WaitingFor::Response);
        // The semaphore is never closed.
        Ok(permit.ok())
    }

    /// Picks an endpoint and reserves a stream on it. Waits if no endpoint is ready and has room,
    /// and behind the calls that wait already.
    pub(super) async fn acquire_stream(
        &self,
        progress: &mut Progress<'_>,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Result<(Arc<Endpoint>, ReservedStream), Status> {
        if !self.view.has_waiting_calls() {
            let exclude = progress.excluded_endpoint();
            let avoids = |ready: &ReadyEndpoint| is_avoided(ready, exclude, attempted);
            if let Some(reserved) = self.view.reserve(avoids) {
                return Ok(reserved);
            }
        }
        progress.set_waiting_for(WaitingFor::Endpoint);
        let reserved = self.wait_for_stream(progress, attempted).await?;
        progress.set_waiting_for(WaitingFor::Response);
        Ok(reserved)
    }

    async fn wait_for_stream(
        &self,
        progress: &Progress<'_>,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Result<(Arc<Endpoint>, ReservedStream), Status> {
        if !self.wait_for_ready && self.view.is_failing() {
            return Err(self.unavailable(progress, ""));
        }
        let exclude = progress.excluded_endpoint().cloned();
        let attempted = attempted.cloned();
        let call = WaitingCall {
            started: progress.started(),
            avoids: Arc::new(move |ready| is_avoided(ready, exclude.as_ref(), attempted.as_ref())),
            waits_for_ready: self.wait_for_ready,
        };
        let served = self.view.wait_for_stream(call);
        let part = "waiting for an endpoint";
        match runtime::timeout_at_for_call(part, progress.ready_deadline(), served)?.await {
            Ok(Some(reserved)) => Ok(reserved),
            // All endpoints fail, or the channel's runtime has ended.
            Ok(None) => Err(self.unavailable(progress, "")),
            Err(_) => {
                let waited = format!(" (waited {:?})", self.ready_timeout);
                Err(self.unavailable(progress, &waited))
            }
        }
    }

    /// The status of a call without an endpoint. A deadline that ends together with the wait
    /// prevails.
    fn unavailable(&self, progress: &Progress<'_>, waited: &str) -> Status {
        let reason = format!("{}{waited}", self.view.describe_unavailable());
        match progress.deadline() {
            Some(deadline) if deadline.at <= Instant::now() => deadline.exceeded_status(&reason),
            _ => Status::unavailable(reason),
        }
    }
}

/// Whether a call prefers other endpoints: the call was just sent there, or the operation that it
/// is part of was.
fn is_avoided(
    ready: &ReadyEndpoint,
    exclude: Option<&Arc<Endpoint>>,
    attempted: Option<&AttemptedEndpoints>,
) -> bool {
    let endpoint = &ready.endpoint;
    exclude.is_some_and(|exclude| Arc::ptr_eq(exclude, endpoint))
        || attempted.is_some_and(|attempted| attempted.contains(&endpoint.target.address))
}
