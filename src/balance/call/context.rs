//! The operation that a call is part of.

use std::sync::Arc;

use tonic::Status;

use super::attempt_record::AttemptRecord;
use super::attempted::AttemptedEndpoints;

/// The state that a call shares with the other calls of one operation. The default shares nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CallContext<'a> {
    /// The endpoints to avoid. The call adds those that it is sent to.
    pub(crate) attempted: Option<&'a AttemptedEndpoints>,
    /// Where the attempts were sent, and how they failed.
    pub(crate) record: Option<&'a AttemptRecord>,
}

impl<'a> CallContext<'a> {
    /// Notes that an attempt is sent to an endpoint.
    pub(super) fn begin_attempt(&self, address: &Arc<str>) -> RecordedAttempt<'a> {
        if let Some(attempted) = self.attempted {
            attempted.add(address);
        }
        RecordedAttempt(self.record.map(|record| {
            record.begin(address);
            (record, Arc::clone(address))
        }))
    }

    /// Notes that no endpoint could be found for the call.
    pub(super) fn fail_unsent(&self, status: &Status) {
        if let Some(record) = self.record {
            record.fail_unsent(status);
        }
    }
}

/// An attempt, as the operation's record knows it.
pub(super) struct RecordedAttempt<'a>(Option<(&'a AttemptRecord, Arc<str>)>);

impl RecordedAttempt<'_> {
    pub(super) fn fail(&self, status: &Status) {
        if let Some((record, address)) = &self.0 {
            record.fail(address, status);
        }
    }
}
