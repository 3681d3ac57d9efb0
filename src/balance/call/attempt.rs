//! One attempt: a request on a stream, and how it ended.

use std::sync::Arc;

use http::{Request, Response};
use tokio::time::Instant;
use tonic::{Code, Status};

use super::grpc_timeout::Deadline;
use super::in_flight::InFlight;
use crate::balance::connection::{
    HeadersTooLarge, Incoming, ReservedStream, SendError, SendErrorKind, Unprocessed,
};
use crate::balance::grpc_status::{self, is_failure};
use crate::balance::pool::Endpoint;
use crate::balance::replay::{AttemptBody, RequestBodyError};
use crate::balance::response_head::{ResponseHead, blames_request};

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum Outcome<B = Incoming> {
    /// The response has begun, and is the call's.
    Response {
        response: Response<B>,
        /// The status is in the head: a gRPC response without messages.
        has_status_in_head: bool,
        in_flight: InFlight,
    },
    /// No server application has seen the attempt.
    Unprocessed {
        why: Unprocessed,
        status: Status,
        endpoint: Arc<Endpoint>,
    },
    /// A server may have seen the attempt, and the policy allows to retry.
    Retryable {
        status: Status,
        endpoint: Arc<Endpoint>,
    },
    /// The call has failed.
    Final(Status),
}

/// An attempt that is about to be sent.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    deadline: Option<&'a Deadline>,
    in_flight: InFlight,
    /// Set if the request's body fails while it is sent.
    body_error: Option<RequestBodyError>,
}

impl<'a> Attempt<'a> {
    pub(super) fn begin(
        endpoint: Arc<Endpoint>,
        deadline: Option<&'a Deadline>,
        body_error: Option<RequestBodyError>,
    ) -> Self {
        let deadline_at = deadline.map(|deadline| deadline.at);
        Self {
            deadline,
            in_flight: InFlight::begin(endpoint, deadline_at, Instant::now()),
            body_error,
        }
    }

    /// Sends the request. `may_retry` says whether the call can be retried after a status.
    ///
    /// Dropping the future cancels the attempt and resets its stream.
    pub(super) async fn send(
        self,
        stream: ReservedStream,
        request: Request<()>,
        body: AttemptBody,
        may_retry: impl Fn(Code) -> bool,
    ) -> Outcome {
        let stream = match stream.check(&request) {
            Ok(stream) => stream,
            Err(too_large) => {
                let status = too_large.status(self.address());
                self.in_flight.discard();
                return Outcome::Final(status);
            }
        };
        match stream.send(request, body).await {
            Ok(response) => match response.body().check_head(response.headers()) {
                Ok(()) => self.on_response(response, may_retry),
                Err(too_large) => self.on_large_head(too_large, may_retry),
            },
            Err(error) => self.on_error(&error, may_retry),
        }
    }

    fn address(&self) -> &str {
        &self.in_flight.endpoint().target.address
    }

    /// Ends an attempt whose response has too large a head, which is no failure of the endpoint.
    fn on_large_head(
        mut self,
        too_large: HeadersTooLarge,
        may_retry: impl Fn(Code) -> bool,
    ) -> Outcome {
        self.in_flight.observe(false);
        let status = too_large.status(self.address());
        match may_retry(status.code()) {
            true => Outcome::Retryable {
                status,
                endpoint: Arc::clone(self.in_flight.endpoint()),
            },
            false => Outcome::Final(status),
        }
    }

    fn on_response<B>(
        mut self,
        mut response: Response<B>,
        may_retry: impl Fn(Code) -> bool,
    ) -> Outcome<B> {
        let head = ResponseHead::read(self.address(), &mut response);
        if let ResponseHead::Status(status) = &head
            && let Some(exceeded) = self.deadline_status(status)
        {
            self.in_flight.observe(true);
            return Outcome::Final(exceeded);
        }
        let status = match &head {
            ResponseHead::Open => None,
            ResponseHead::Status(status) | ResponseHead::NotGrpc(status) => Some(status),
        };
        let failed = status.is_some_and(|status| is_failure(status.code()))
            && !blames_request(response.status());
        self.in_flight.observe(failed);
        match head {
            ResponseHead::Status(status) | ResponseHead::NotGrpc(status)
                if may_retry(status.code()) =>
            {
                Outcome::Retryable {
                    status,
                    endpoint: Arc::clone(self.in_flight.endpoint()),
                }
            }
            // Dropping the response resets its stream, so a page is not read to its end.
            ResponseHead::NotGrpc(status) => Outcome::Final(status),
            ResponseHead::Status(_) => self.into_response(response, true),
            ResponseHead::Open => self.into_response(response, false),
        }
    }

    fn into_response<B>(self, response: Response<B>, has_status_in_head: bool) -> Outcome<B> {
        Outcome::Response {
            response,
            has_status_in_head,
            in_flight: self.in_flight,
        }
    }

    fn on_error(mut self, error: &SendError, may_retry: impl Fn(Code) -> bool) -> Outcome {
        let endpoint = Arc::clone(self.in_flight.endpoint());
        match error.kind {
            SendErrorKind::Rejected => {
                self.in_flight.discard();
                let message = format!("cannot send the request: {}", error.error);
                return Outcome::Final(Status::internal(message));
            }
            SendErrorKind::Unprocessed(why) => {
                self.in_flight.discard();
                return Outcome::Unprocessed {
                    why,
                    status: send_status(&endpoint, error),
                    endpoint,
                };
            }
            SendErrorKind::TooLarge(too_large) => {
                self.in_flight.observe(false);
                return Outcome::Final(too_large.status(&endpoint.target.address));
            }
            SendErrorKind::Unreadable => {
                self.in_flight.observe(true);
                return Outcome::Final(send_status(&endpoint, error));
            }
            SendErrorKind::Unknown => {}
        }
        if let Some(status) = self.body_error.as_ref().and_then(RequestBodyError::get) {
            // The caller's own body failed, which is no failure of the endpoint.
            self.in_flight.discard();
            return Outcome::Final(status);
        }
        let status = send_status(&endpoint, error);
        let exceeded = self.deadline_status(&status);
        if grpc_status::is_malformed_request(&error.error) {
            self.in_flight.discard();
        } else {
            self.in_flight.observe(true);
        }
        if let Some(exceeded) = exceeded {
            Outcome::Final(exceeded)
        } else if may_retry(status.code()) {
            Outcome::Retryable { status, endpoint }
        } else {
            Outcome::Final(status)
        }
    }

    /// The status of a call whose deadline fired on the server first.
    fn deadline_status(&self, status: &Status) -> Option<Status> {
        self.deadline
            .filter(|deadline| deadline.is_cause_of(status))
            .map(|deadline| deadline.exceeded_status("no response"))
    }
}

fn send_status(endpoint: &Endpoint, error: &SendError) -> Status {
    let address = &endpoint.target.address;
    let reason = error.close_reason.as_deref();
    match error.kind {
        SendErrorKind::Unprocessed(Unprocessed::NotSent) => {
            grpc_status::status_of_unsent(address, reason)
        }
        _ => grpc_status::status_of_error(address, &error.error, reason),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use h2::Reason;

    use super::*;
    use crate::balance::connection::Target;
    use crate::instance::Instance;

    fn endpoint() -> Arc<Endpoint> {
        let instance = Instance::new("", "10.0.0.1:80");
        let target = Target::new(&instance, false).unwrap();
        Arc::new(Endpoint::new(target, &instance, 1))
    }

    fn error(kind: SendErrorKind, reason: Reason) -> SendError {
        SendError {
            kind,
            error: reason.into(),
            close_reason: None,
        }
    }

    #[test]
    fn unprocessed_leaves_no_trace_in_the_load() {
        let endpoint = endpoint();
        let attempt = Attempt::begin(Arc::clone(&endpoint), None, None);
        assert_eq!(endpoint.load.in_flight(), 1);
        let outcome = attempt.on_error(
            &error(
                SendErrorKind::Unprocessed(Unprocessed::Refused),
                Reason::REFUSED_STREAM,
            ),
            |_| false,
        );
        assert!(
            matches!(
                outcome,
                Outcome::Unprocessed {
                    why: Unprocessed::Refused,
                    ..
                }
            ),
            "{outcome:?}"
        );
        assert_eq!(endpoint.load.in_flight(), 0);
        assert_eq!(endpoint.load.latency(Instant::now()), None);
    }

    #[test]
    fn rejected_is_the_caller_s_fault() {
        let endpoint = endpoint();
        let attempt = Attempt::begin(Arc::clone(&endpoint), None, None);
        let outcome = attempt.on_error(
            &error(SendErrorKind::Rejected, Reason::INTERNAL_ERROR),
            |_| true,
        );
        let Outcome::Final(status) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(endpoint.load.latency(Instant::now()), None);
    }

    #[test]
    fn unknown_fate_is_retried_if_the_policy_allows() {
        let unknown = error(SendErrorKind::Unknown, Reason::INTERNAL_ERROR);
        let outcome = Attempt::begin(endpoint(), None, None).on_error(&unknown, |_| true);
        assert!(matches!(outcome, Outcome::Retryable { .. }), "{outcome:?}");
        let outcome = Attempt::begin(endpoint(), None, None).on_error(&unknown, |_| false);
        assert!(matches!(outcome, Outcome::Final(_)), "{outcome:?}");
    }

    #[test]
    fn failed_request_body_is_final_and_no_failure_of_the_endpoint() {
        let endpoint = endpoint();
        let own = RequestBodyError::default();
        own.set(Status::data_loss("the caller's disk"));
        let attempt = Attempt::begin(Arc::clone(&endpoint), None, Some(own));
        let outcome = attempt.on_error(&error(SendErrorKind::Unknown, Reason::CANCEL), |_| true);
        let Outcome::Final(status) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(status.code(), Code::DataLoss);
        assert_eq!(endpoint.load.latency(Instant::now()), None);
    }

    fn response(grpc_status: Option<&str>) -> Response<()> {
        let mut response = Response::new(());
        let headers = response.headers_mut();
        headers.insert("content-type", "application/grpc".parse().unwrap());
        if let Some(code) = grpc_status {
            headers.insert("grpc-status", code.parse().unwrap());
        }
        response
    }

    #[test]
    fn response_without_a_status_is_the_call_s() {
        let outcome = Attempt::begin(endpoint(), None, None).on_response(response(None), |_| true);
        let Outcome::Response {
            has_status_in_head, ..
        } = outcome
        else {
            panic!("{outcome:?}");
        };
        assert!(!has_status_in_head);
    }

    #[test]
    fn status_in_the_head_is_retried_if_the_policy_allows() {
        let unavailable = || response(Some("14"));
        let outcome = Attempt::begin(endpoint(), None, None).on_response(unavailable(), |_| true);
        assert!(matches!(outcome, Outcome::Retryable { .. }), "{outcome:?}");
        let outcome = Attempt::begin(endpoint(), None, None).on_response(unavailable(), |_| false);
        let Outcome::Response {
            has_status_in_head, ..
        } = outcome
        else {
            panic!("{outcome:?}");
        };
        assert!(has_status_in_head);
    }

    #[test]
    fn page_is_final_or_retried_and_never_the_call_s_response() {
        let page = || Response::builder().status(503).body(()).unwrap();
        let outcome = Attempt::begin(endpoint(), None, None).on_response(page(), |_| true);
        assert!(matches!(outcome, Outcome::Retryable { .. }), "{outcome:?}");
        let outcome = Attempt::begin(endpoint(), None, None).on_response(page(), |_| false);
        let Outcome::Final(status) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(status.code(), Code::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn server_s_cancel_at_the_deadline_is_deadline_exceeded() {
        let deadline = Deadline::after(Instant::now(), Duration::from_secs(1));
        tokio::time::advance(Duration::from_millis(999)).await;
        let attempt = Attempt::begin(endpoint(), Some(&deadline), None);
        let outcome = attempt.on_response(response(Some("1")), |_| true);
        let Outcome::Final(status) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(status.code(), Code::DeadlineExceeded);
    }
}
