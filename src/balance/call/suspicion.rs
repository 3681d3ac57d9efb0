//! Calls that may be the reason why a server ended a connection with an error.
//!
//! A GOAWAY with an error does not say which call is the reason, if any is. gRPC repeats a call that
//! the GOAWAY excludes once, and so does this channel, because the first excluded call, the suspect,
//! may be innocent: the server may count the cancelled streams of the connection, or fail by
//! itself. If the suspect is the reason, its repetition ends another connection, and the calls that
//! the server has accepted there before are lost. Calls that come behind the suspect are excluded
//! in turn and are sent again.
//!
//! The repetition therefore goes to another endpoint if one is ready, and at the same endpoint it
//! is made only while no other call is in flight there. So a suspect that is alone with its
//! endpoint is not lost, and nobody loses a second connection to it.

use std::sync::Arc;

use tonic::Status;

use crate::balance::connection::Unprocessed;
use crate::balance::pool::Endpoint;

/// The latest GOAWAY with an error of which a call may be the reason.
#[derive(Debug, Default)]
pub(super) struct Suspicion(Option<(Arc<Endpoint>, Status)>);

impl Suspicion {
    /// Records an attempt at `endpoint` that no server application has seen.
    pub(super) fn record(&mut self, why: Unprocessed, endpoint: &Arc<Endpoint>, status: &Status) {
        if let Unprocessed::GoAwayError { is_suspect: true } = why {
            self.0 = Some((Arc::clone(endpoint), status.clone()));
        }
    }

    /// Fails with the status of the GOAWAY if the next attempt would endanger other calls. The
    /// attempt does not count as in flight yet.
    pub(super) fn check(&self, next: &Arc<Endpoint>) -> Result<(), Status> {
        match &self.0 {
            Some((endpoint, status))
                if Arc::ptr_eq(endpoint, next) && next.load.in_flight() > 0 =>
            {
                Err(status.clone())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::super::in_flight::InFlight;
    use super::*;
    use crate::balance::connection::Target;
    use crate::instance::Instance;

    const SUSPECT: Unprocessed = Unprocessed::GoAwayError { is_suspect: true };
    const EXCLUDED: Unprocessed = Unprocessed::GoAwayError { is_suspect: false };

    fn endpoint(address: &str) -> Arc<Endpoint> {
        let instance = Instance::new("", address);
        let target = Target::new(&instance, false).unwrap();
        Arc::new(Endpoint::new(target, &instance, 1))
    }

    #[test]
    fn suspect_is_kept_away_from_calls_of_its_endpoint() {
        let [own, other] = ["a:1", "b:1"].map(endpoint);
        let mut suspicion = Suspicion::default();
        let status = Status::unavailable("GOAWAY");
        let calls = [&own, &other].map(|endpoint| {
            let endpoint = Arc::clone(endpoint);
            InFlight::begin(endpoint, None, Instant::now())
        });
        suspicion.record(EXCLUDED, &own, &status);
        suspicion.check(&own).unwrap();
        suspicion.record(SUSPECT, &own, &status);
        assert_eq!(suspicion.check(&own).unwrap_err().message(), "GOAWAY");
        suspicion.check(&other).unwrap();
        for call in calls {
            call.discard();
        }
        suspicion.check(&own).unwrap();
    }
}
