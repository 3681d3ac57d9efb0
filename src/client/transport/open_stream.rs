//! Opening a stream on a member that takes it.
//!
//! A learner refuses every stream. For a moment after the user's token was renewed, a member may
//! refuse a renewal of leases, because the member does not know the new token yet. Without TLS such
//! a member refuses in the head of the response, before it looks at the requests, so the requests
//! that were sent by then are sent again. Over TLS etcd sends the head first, and the caller opens
//! another stream. Watches are refused in a message.

use std::future::poll_fn;

use http::{HeaderValue, Request, Response};
use tokio::time::sleep;
use tonic::body::Body;
use tonic::{Code, Status};

use super::members::{Membership, RefusalPauses, refusal_of};
use super::response::{code_in, is_error_in, message_in};
use super::token::{self, Token};
use crate::backoff::Backoff;
use crate::balance::{BalancedChannel, CallContext, Replay, ServedBy};
use crate::client::etcd_error::EtcdError;

/// How often learners may refuse a stream before the caller gets the refusal. Callers that must have
/// a stream try again, so this only has to suffice until the learners are left out.
const MAX_LEARNERS: usize = 8;

/// The opening of one stream, with all its attempts.
pub(super) struct StreamOpening<'a> {
    pub(super) channel: &'a BalancedChannel,
    /// The members behind the channel. `None` for a stream to one particular member.
    pub(super) membership: Option<&'a Membership>,
    pub(super) token: &'a Token,
    pub(super) context: CallContext<'a>,
}

/// Why a member refused a stream that another member, or the same one later, may take.
enum Refusal<'a> {
    UnknownToken,
    Learner(&'a Membership),
}

impl StreamOpening<'_> {
    /// Sends the requests to one member after the other until a member neither is a learner nor
    /// lacks the token. Returns the response of that member, or the last refusal.
    pub(super) async fn open(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, mut body) = request.into_parts();
        let replay = poll_fn(|cx| Replay::poll_new(&mut body, cx)).await?;
        let mut body = replay.first_attempt();
        let mut pauses_until_known = Backoff::for_etcd();
        let mut pauses_after_learners = RefusalPauses::new();
        let mut learners = 0;
        loop {
            let request = Request::from_parts(head.clone(), Body::new(body));
            let response = self.channel.call_within(request, self.context).await;
            let response = response.map_err(|status| self.name_learners(status))?;
            let Some(refusal) = self.refusal(&response, head.headers.get(token::HEADER)) else {
                replay.commit();
                return Ok(response);
            };
            self.record_refusal(&response);
            let (pause, refused) = match refusal {
                Refusal::UnknownToken => (pauses_until_known.next(), Ok(response)),
                Refusal::Learner(membership) => {
                    let learner = response.extensions().get::<ServedBy>();
                    membership.record_refusal(learner);
                    let refused = Err(refusal_of(learner, &message_in(response.headers())));
                    learners += 1;
                    if learners > MAX_LEARNERS {
                        return refused;
                    }
                    (pauses_after_learners.next(membership), refused)
                }
            };
            sleep(pause).await;
            // `None` if more requests were sent meanwhile than are kept for another attempt.
            match replay.next_attempt() {
                Some(next) => body = next,
                None => return refused,
            }
        }
    }

    fn refusal(
        &self,
        response: &Response<Body>,
        sent_token: Option<&HeaderValue>,
    ) -> Option<Refusal<'_>> {
        let headers = response.headers();
        if code_in(headers) == Some(Code::Unauthenticated) && self.token.is_spreading(sent_token) {
            return Some(Refusal::UnknownToken);
        }
        let membership = self.membership?;
        is_error_in(headers, EtcdError::Learner).then_some(Refusal::Learner(membership))
    }

    fn name_learners(&self, status: Status) -> Status {
        match self.membership {
            Some(membership) => membership.name_learners(status),
            None => status,
        }
    }

    fn record_refusal(&self, response: &Response<Body>) {
        let member = response.extensions().get::<ServedBy>();
        if let (Some(record), Some(member)) = (self.context.record, member) {
            let message = message_in(response.headers());
            record.fail(member.address(), &Status::unavailable(message));
        }
    }
}
