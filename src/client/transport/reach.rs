//! Which members the service reaches, and why it reaches none.

use std::sync::Arc;
use std::time::Duration;

use super::no_response::{self, is_disconnected};
use super::rpc::RpcService;
use crate::balance::AttemptRecord;
use crate::error::Error;

impl RpcService {
    /// The members that take calls.
    pub(in crate::client) fn ready_members(&self) -> Vec<Arc<str>> {
        let channel = self.state.channel.load_full();
        channel.map_or_else(Vec::new, |channel| {
            no_response::ready_members(&channel, &self.state.membership.learners())
        })
    }

    /// Whether no member takes calls: none is connected, or only learners are. False once the client
    /// is closed.
    pub(in crate::client) fn is_disconnected(&self) -> bool {
        let channel = self.state.channel.load();
        channel
            .as_ref()
            .is_some_and(|channel| is_disconnected(channel, &self.state.membership.learners()))
    }

    /// The error of an operation whose time is over.
    pub(super) fn timeout_error(
        &self,
        operation: String,
        after: Duration,
        record: &AttemptRecord,
    ) -> Error {
        let channel = self.state.channel.load_full();
        let learners = self.state.membership.learners();
        no_response::timeout_error(operation, after, record, channel.as_deref(), &learners)
    }

    /// Why no member responded within the time of `record`'s operation.
    pub(in crate::client) fn no_response_reason(&self, record: &AttemptRecord) -> String {
        let channel = self.state.channel.load_full();
        no_response::reason(
            record,
            channel.as_deref(),
            &self.state.membership.learners(),
        )
    }
}
