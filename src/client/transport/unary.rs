//! Unary calls: which member a call is sent to, how often, and when it is given up.
//!
//! Each function handles one kind of failure, and calls the next of the indented ones:
//!
//! ```text
//!   hedged                 sends a slow read to another member beside the first
//!     retry_transient        sends a failed read to another member
//!   send_via_leader        sends a write to another member if the first has no leader
//!       retry_unknown_token    sends a call again that a member refused because of a new token
//!         retry_learner          sends a call again that a learner refused
//!           send_once              sends the call to one member
//! ```

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{FuturesUnordered, StreamExt};
use http::{Request, request};
use tokio::time::{Instant, sleep};
use tonic::body::Body;
use tonic::{Code, Status};

use super::awaited_response::AwaitedResponse;
use super::members::{Membership, RefusalPauses, refusal_of};
use super::message::Codec;
use super::method::CallKind;
use super::no_response::is_disconnected;
use super::response::{UnaryResponse, map_not_grpc};
use super::token::{self, Token};
use crate::backoff::Backoff;
use crate::balance::{AttemptRecord, AttemptedEndpoints, BalancedChannel, CallContext};
use crate::client::etcd_error::EtcdError;

/// The number of attempts of a read within its timeout. A new attempt starts after each fifth of
/// the timeout until one succeeds. More attempts than members may hang, because healthy followers
/// may wait for a leader that hangs.
const READ_ATTEMPTS: u32 = 5;

/// One unary call, with all its attempts.
pub(super) struct UnaryCall<'a> {
    /// How long the call is repeated.
    pub(super) timeout: Duration,
    pub(super) token: &'a Token,
    /// Whether the call asks for another token of the client's own user.
    pub(super) renews_token: bool,
    pub(super) channel: &'a BalancedChannel,
    /// The members behind the channel. `None` for a call to one particular member.
    pub(super) membership: Option<&'a Membership>,
    pub(super) kind: CallKind,
    pub(super) head: request::Parts,
    /// The encoded request.
    pub(super) message: Bytes,
    pub(super) codec: Codec,
    /// The members that the attempts avoid. `None` for a write that no member has refused.
    pub(super) attempted: Option<AttemptedEndpoints>,
    /// The attempts of the operation that the call belongs to.
    pub(super) record: Option<AttemptRecord>,
    pub(super) started: Instant,
}

impl UnaryCall<'_> {
    /// Sends the call as its kind allows.
    pub(super) async fn send(&mut self) -> Result<UnaryResponse, Status> {
        let part = self.timeout / READ_ATTEMPTS;
        match self.kind {
            CallKind::Read => self.send_hedged(&[part; READ_ATTEMPTS as usize - 1]).await,
            // Checking a password costs etcd much, above all under load. Attempts therefore start
            // at 0, 2 and 4 fifths of the timeout, and the waiting calls have the rest.
            CallKind::Authenticate => {
                let response = self.send_hedged(&[part * 2, part * 2]).await;
                let response = ignore_auth_disabled(response?);
                if self.renews_token && response.code() == Code::Ok {
                    self.token.record(response.payload());
                }
                Ok(response)
            }
            CallKind::Idempotent => self.retry_transient().await,
            _ => self.send_via_leader().await,
        }
    }

    /// Sends the call to a member, and after each pause to another one beside those before. Returns
    /// the first success, or the last failure once all attempts have failed.
    async fn send_hedged(&self, pauses: &[Duration]) -> Result<UnaryResponse, Status> {
        let mut pauses = pauses.iter();
        let mut next_pause = move || pauses.next().map_or(Duration::MAX, |pause| *pause);
        // On the stack, because most reads need one attempt only.
        let mut first = pin!(self.retry_transient());
        tokio::select! {
            biased;
            response = &mut first => return response,
            () = sleep(next_pause()) => {}
        }
        let mut first_failed = false;
        let mut others = FuturesUnordered::new();
        loop {
            others.push(Box::pin(self.retry_transient()));
            let mut pause = pin!(sleep(next_pause()));
            loop {
                let response = tokio::select! {
                    biased;
                    response = &mut first, if !first_failed => {
                        first_failed = true;
                        response
                    }
                    Some(response) = others.next() => response,
                    () = &mut pause => break,
                };
                if response.is_ok() || (others.is_empty() && first_failed) {
                    return response;
                }
            }
        }
    }

    /// Sends the call until a member with a leader takes it. A write to a member that is cut off
    /// from the others would hang, and might still be executed later.
    async fn send_via_leader(&mut self) -> Result<UnaryResponse, Status> {
        let mut backoff = None;
        loop {
            let response = self.retry_unknown_token().await?;
            let is_refused = self.kind.needs_leader(self.head.uri.path())
                && response.is_error(EtcdError::NoLeader);
            if !is_refused || self.out_of_budget() {
                return Ok(response);
            }
            self.attempted.get_or_insert_default();
            sleep(backoff.get_or_insert_with(Backoff::for_etcd).next()).await;
        }
    }

    /// Sends the call to one member after the other until the result is not a transient error.
    async fn retry_transient(&self) -> Result<UnaryResponse, Status> {
        let mut backoff = None;
        loop {
            let result = self.retry_unknown_token().await;
            let code = result
                .as_ref()
                .map_or_else(Status::code, UnaryResponse::code);
            if !is_transient(code) || self.out_of_budget() {
                return result;
            }
            sleep(backoff.get_or_insert_with(Backoff::for_etcd).next()).await;
        }
    }

    /// Whether the call was repeated for its whole timeout, or for half of it while no member takes
    /// calls, or no member can be connected any more.
    fn out_of_budget(&self) -> bool {
        if self.channel.has_ended() {
            return true;
        }
        let (elapsed, timeout) = (self.started.elapsed(), self.timeout);
        let is_disconnected = || {
            let learners = self.membership.map(Membership::learners);
            is_disconnected(self.channel, &learners.unwrap_or_default())
        };
        elapsed >= timeout || (elapsed >= timeout / 2 && is_disconnected())
    }

    /// Sends the call until no member refuses it only because a new token has not reached that
    /// member yet. A member refuses before it executes anything, so writes are repeated as well.
    async fn retry_unknown_token(&self) -> Result<UnaryResponse, Status> {
        let mut backoff = None;
        loop {
            let response = self.retry_learner().await?;
            let is_refused = response.code() == Code::Unauthenticated;
            if !is_refused
                || !self
                    .token
                    .is_spreading(self.head.headers.get(token::HEADER))
            {
                return Ok(response);
            }
            sleep(backoff.get_or_insert_with(Backoff::for_etcd).next()).await;
        }
    }

    /// Sends the call until the member that gets it is no learner. A learner refuses before it
    /// looks at the request, so writes are repeated as well.
    async fn retry_learner(&self) -> Result<UnaryResponse, Status> {
        let Some(membership) = self.membership else {
            return self.send_once(self.attempted.as_ref()).await;
        };
        let mut attempted = self.attempted.clone();
        let mut pauses = None;
        loop {
            let response = self.send_once(attempted.as_ref()).await;
            let response = response.map_err(|status| membership.name_learners(status))?;
            if !response.is_error(EtcdError::Learner) {
                return Ok(response);
            }
            let learner = response.served_by();
            membership.record_refusal(learner);
            if self.out_of_budget() {
                return Err(refusal_of(learner, &response.message()));
            }
            attempted.get_or_insert_default();
            let pauses = pauses.get_or_insert_with(RefusalPauses::new);
            sleep(pauses.next(membership)).await;
        }
    }

    async fn send_once(
        &self,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Result<UnaryResponse, Status> {
        let mut request = Request::new(Body::new(http_body_util::Full::new(self.message.clone())));
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.version_mut() = self.head.version;
        *request.headers_mut() = self.head.headers.clone();
        let context = CallContext {
            attempted,
            record: self.record.as_ref(),
        };
        let response = self.channel.call_within(request, context).await;
        let mut awaited = AwaitedResponse::new(context.record, &response);
        let response = response.map_err(|status| match self.kind {
            CallKind::Write => status,
            _ => map_not_grpc(status),
        })?;
        let response = UnaryResponse::read(response, &self.codec).await;
        match &response {
            Ok(response) if response.code() == Code::Ok => awaited.succeed(),
            Ok(response) => awaited.fail(&Status::new(response.code(), response.message())),
            Err(status) => awaited.fail(status),
        }
        response
    }
}

/// Continues without a token if etcd has authentication disabled, because then etcd issues no
/// tokens and needs none. etcd's own client does the same.
fn ignore_auth_disabled(response: UnaryResponse) -> UnaryResponse {
    if !response.is_error(EtcdError::AuthNotEnabled) {
        return response;
    }
    tracing::warn!(
        "a username is configured, but authentication is not enabled in etcd; continuing without it"
    );
    UnaryResponse::empty_token()
}

/// Whether another member, or the same one a moment later, may respond otherwise: the member is
/// shutting down, or the cluster is electing a leader.
pub(in crate::client) fn is_transient(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Cancelled | Code::Internal)
}
