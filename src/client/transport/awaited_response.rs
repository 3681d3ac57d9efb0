//! A response that has begun, for the record of the operation that awaits it.

use http::Response;
use tonic::Status;
use tonic::body::Body;

use crate::balance::{AttemptRecord, ServedBy};

/// A response whose result is not known yet: a unary one that is being read, or a stream without a
/// message.
pub(super) struct AwaitedResponse(Option<(AttemptRecord, ServedBy)>);

impl AwaitedResponse {
    /// A response without a head is recorded where the attempt was sent.
    pub(super) fn new(
        record: Option<&AttemptRecord>,
        response: &Result<Response<Body>, Status>,
    ) -> Self {
        let head = response.as_ref().ok();
        let member = head.and_then(|head| head.extensions().get::<ServedBy>());
        Self(record.cloned().zip(member.cloned()))
    }

    /// Records that the member has responded as it should. Only the first result counts.
    pub(super) fn succeed(&mut self) {
        if let Some((record, member)) = self.0.take() {
            record.succeed(member.address());
        }
    }

    /// Records that the response is an error, or broke off. Only the first result counts.
    pub(super) fn fail(&mut self, status: &Status) {
        if let Some((record, member)) = self.0.take() {
            record.fail(member.address(), status);
        }
    }
}
