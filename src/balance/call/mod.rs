//! One call: wait for an endpoint, send, and retry.
//!
//! ```text
//!   Dispatcher::call                 the deadline
//!     send_with_retries              the loop
//!       acquire_stream               an endpoint and a stream on it, waiting if necessary
//!       Attempt::send -> Outcome     one attempt
//!       Progress -> Decision         whether and when to make another one
//!     ResponseBody                   in flight until the response ends
//! ```

mod acquire;
mod attempt;
mod attempt_record;
mod attempted;
mod context;
mod grpc_timeout;
mod in_flight;
mod progress;
mod request;
mod response_body;
mod retry;
mod served_by;

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, Request, Response, Uri};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;

use super::connection::Incoming;
use super::pool::View;
use super::replay::Replay;
use crate::runtime;
use attempt::{Attempt, Outcome};
pub(crate) use attempt_record::AttemptRecord;
pub(crate) use attempted::AttemptedEndpoints;
pub(crate) use context::CallContext;
use grpc_timeout::Deadline;
use progress::{Decision, Progress, WaitingFor};
use request::{CallHead, split_request};
use response_body::{OpenCall, ResponseBody};
pub use retry::RetryPolicy;
pub use served_by::ServedBy;

/// Makes the calls of a channel.
#[derive(Debug)]
pub(super) struct Dispatcher {
    pub(super) view: Arc<View>,
    pub(super) ready_timeout: Duration,
    pub(super) wait_for_ready: bool,
    /// The longest timeout of a call; a call's own may be shorter.
    pub(super) timeout: Option<Duration>,
    pub(super) retry: Option<RetryPolicy>,
    /// As many permits as calls may be in flight.
    pub(super) concurrency: Option<Arc<Semaphore>>,
    pub(super) user_agent: HeaderValue,
    pub(super) origin: Option<Uri>,
}

impl Dispatcher {
    /// Makes one call within the operation of `context`.
    ///
    /// Dropping the future cancels the call and resets its stream.
    pub(super) async fn call(
        &self,
        request: Request<Body>,
        context: CallContext<'_>,
    ) -> Result<Response<Body>, Status> {
        let started = Instant::now();
        let (head, body) = split_request(request, &self.user_agent);
        let timeout = match (head.timeout(), self.timeout) {
            (Some(own), Some(longest)) => Some(own.min(longest)),
            (own, longest) => own.or(longest),
        };
        let deadline = timeout.map(|timeout| Deadline::after(started, timeout));
        let retry = self.retry.as_ref();
        let mut progress = Progress::new(started, deadline, self.ready_timeout, retry);
        let Some(deadline) = deadline else {
            return self
                .send_with_retries(head, body, context, &mut progress)
                .await;
        };
        let sending = self.send_with_retries(head, body, context, &mut progress);
        let sending = runtime::timeout_at_for_call("a call with a deadline", deadline.at, sending)?;
        sending
            .await
            .unwrap_or_else(|_| Err(self.deadline_status(&deadline, progress.waiting_for())))
    }

    fn deadline_status(&self, deadline: &Deadline, waiting_for: WaitingFor) -> Status {
        match waiting_for {
            WaitingFor::Permit => {
                deadline.exceeded_status("the channel's concurrency limit is reached")
            }
            WaitingFor::Endpoint => deadline.exceeded_status(&self.view.describe_unavailable()),
            WaitingFor::Response => deadline.exceeded_status("no response"),
        }
    }

    async fn send_with_retries(
        &self,
        mut head: CallHead,
        mut body: Body,
        context: CallContext<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Response<Body>, Status> {
        let permit = self.acquire_permit(progress).await?;
        let replay = poll_fn(|cx| Replay::poll_new(&mut body, cx)).await?;
        if replay.is_streamed() {
            // Sent by a task.
            runtime::require_for_call("a call with a stream of requests")?;
        }
        let mut body = replay.first_attempt();
        loop {
            let acquired = self.acquire_stream(progress, context.attempted).await;
            let (endpoint, stream) = acquired.inspect_err(|status| context.fail_unsent(status))?;
            let deadline = progress.deadline();
            let origin = self.origin.as_ref();
            let Some(request) = head.for_attempt(&endpoint.target, origin, deadline) else {
                return Err(no_time_left(deadline));
            };
            let recorded = context.begin_attempt(&endpoint.target.address);
            let attempt = Attempt::begin(endpoint, deadline, replay.body_error());
            let may_retry = |code| progress.may_retry(code) && replay.is_replayable();
            let outcome = attempt.send(stream, request, body, may_retry).await;
            let (status, endpoint, decision) = match outcome {
                Outcome::Response {
                    response,
                    has_status_in_head,
                    in_flight,
                } => {
                    replay.commit();
                    let call = OpenCall {
                        in_flight,
                        _permit: permit,
                        has_status_in_head,
                        body_error: replay.body_error(),
                    };
                    return Ok(into_response(response, progress.deadline().copied(), call));
                }
                Outcome::Unprocessed {
                    why,
                    status,
                    endpoint,
                } => {
                    let decision = progress.on_unprocessed(why, Instant::now());
                    (status, endpoint, decision)
                }
                Outcome::Retryable { status, endpoint } => {
                    let decision = progress.on_failure(Instant::now());
                    (status, endpoint, decision)
                }
                Outcome::Final(status) => {
                    recorded.fail(&status);
                    return Err(status);
                }
            };
            recorded.fail(&status);
            // `None` if more of the body was sent meanwhile than is kept for another attempt.
            let Some(next) = replay.next_attempt() else {
                return Err(status);
            };
            let pause = match decision {
                Decision::GiveUp => return Err(status),
                Decision::Retry => Duration::ZERO,
                Decision::RetryAfter(pause) => pause,
            };
            tracing::debug!(
                address = %endpoint.target.address,
                code = ?status.code(),
                ?pause,
                "retrying a call"
            );
            if !pause.is_zero() {
                runtime::sleep_for_call("the pause before a retry", pause)?.await;
            }
            progress.exclude(endpoint);
            body = next;
        }
    }
}

/// The status of a call whose deadline passed before an attempt was sent.
fn no_time_left(deadline: Option<&Deadline>) -> Status {
    let reason = "no time was left to send the call";
    match deadline {
        Some(deadline) => deadline.exceeded_status(reason),
        None => Status::deadline_exceeded(reason),
    }
}

fn into_response(
    response: Response<Incoming>,
    deadline: Option<Deadline>,
    call: OpenCall,
) -> Response<Body> {
    let address = Arc::clone(&call.in_flight.endpoint().target.address);
    let mut response =
        response.map(|incoming| Body::new(ResponseBody::new(incoming, deadline, call)));
    response.extensions_mut().insert(ServedBy::new(address));
    response
}
