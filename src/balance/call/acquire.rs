//! What a call waits for: a permit of the channel, and a stream on a ready endpoint.

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::progress::{Progress, WaitingFor};
use super::{AttemptedEndpoints, Dispatcher};
use crate::balance::connection::ReservedStream;
use crate::balance::pool::{Endpoint, ReadyEndpoint};

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
        let permit = timeout_at(progress.permit_deadline(), acquiring)
            .await
            .map_err(|_| {
                Status::unavailable(format!(
                    "the channel's concurrency limit was reached for {:?}",
                    self.ready_timeout
                ))
            })?;
        progress.set_waiting_for(WaitingFor::Response);
        // The semaphore is never closed.
        Ok(permit.ok())
    }

    /// Picks an endpoint and reserves a stream on it, waiting until one is ready and has room.
    pub(super) async fn acquire_stream(
        &self,
        progress: &mut Progress<'_>,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Result<(Arc<Endpoint>, ReservedStream), Status> {
        if let Some(picked) = self.pick(progress.excluded_endpoint(), attempted) {
            return Ok(picked);
        }
        progress.set_waiting_for(WaitingFor::Endpoint);
        let picked = self.wait_for_stream(progress, attempted).await?;
        progress.set_waiting_for(WaitingFor::Response);
        Ok(picked)
    }

    async fn wait_for_stream(
        &self,
        progress: &Progress<'_>,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Result<(Arc<Endpoint>, ReservedStream), Status> {
        loop {
            let (ready, capacity) = (self.view.ready.notified(), self.view.capacity.notified());
            tokio::pin!(ready, capacity);
            // Registered before the pick, so that no notification is lost between the two.
            ready.as_mut().enable();
            capacity.as_mut().enable();
            if let Some(picked) = self.pick(progress.excluded_endpoint(), attempted) {
                // `capacity` wakes one call at a time, and there may be room for more.
                self.view.capacity.notify_one();
                return Ok(picked);
            }
            // A full endpoint is ready, so a call waits for a stream on it in any case.
            if !self.wait_for_ready && !self.view.is_full() {
                return Err(self.unavailable(progress, ""));
            }
            let changed = async {
                tokio::select! {
                    () = ready => {}
                    () = capacity => {}
                }
            };
            if timeout_at(progress.ready_deadline(), changed)
                .await
                .is_err()
            {
                let waited = format!(" (waited {:?})", self.ready_timeout);
                return Err(self.unavailable(progress, &waited));
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

    fn pick(
        &self,
        exclude: Option<&Arc<Endpoint>>,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Option<(Arc<Endpoint>, ReservedStream)> {
        let picker = self.view.picker.load();
        let avoid = |ready: &ReadyEndpoint| {
            exclude.is_some_and(|exclude| Arc::ptr_eq(exclude, &ready.endpoint))
                || attempted
                    .is_some_and(|attempted| attempted.contains(&ready.endpoint.target.address))
        };
        loop {
            let ready = picker.pick(Instant::now(), avoid)?;
            // `None` if another call took the last stream since the pick, or the connection closed.
            if let Some(stream) = ready.reserve() {
                return Some((Arc::clone(&ready.endpoint), stream));
            }
        }
    }
}
