//! The body of a response, which keeps its attempt in flight.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::Reason;
use http::HeaderMap;
use http_body::{Body, Frame};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};
use tonic::Status;

use super::grpc_timeout::Deadline;
use super::in_flight::InFlight;
use crate::balance::connection::Incoming;
use crate::balance::grpc_status::{self, is_failure};
use crate::balance::replay::RequestBodyError;
use crate::balance::status_headers;

/// Why a deadline ended a call whose response had begun.
const RESPONSE_NOT_ENDED: &str = "the response had not ended";

/// The resources of a call between the head and the end of its response.
#[derive(Debug)]
pub(super) struct OpenCall {
    pub(super) in_flight: InFlight,
    /// The call's permit under the channel's concurrency limit, until it is dropped.
    pub(super) _permit: Option<OwnedSemaphorePermit>,
    /// The status is in the head: a gRPC response without messages.
    pub(super) has_status_in_head: bool,
    /// Set if the request's body fails while it is sent.
    pub(super) body_error: Option<RequestBodyError>,
}

/// The body of a response.
///
/// The attempt stays in flight until the body ends or is dropped. At the call's deadline the body
/// ends with DEADLINE_EXCEEDED.
pub(super) struct ResponseBody {
    incoming: Incoming,
    deadline: Option<(Deadline, Pin<Box<Sleep>>)>,
    /// `None` once the response has ended.
    call: Option<OpenCall>,
}

impl ResponseBody {
    pub(super) fn new(incoming: Incoming, deadline: Option<Deadline>, call: OpenCall) -> Self {
        Self {
            // A body that is empty never waits, so it needs no timer.
            deadline: deadline
                .filter(|_| !incoming.is_at_end())
                .map(|deadline| (deadline, Box::pin(tokio::time::sleep_until(deadline.at)))),
            incoming,
            call: Some(call),
        }
    }

    /// Ends the response. `failed` says whether the endpoint failed.
    fn end(&mut self, failed: bool) {
        self.incoming.finish();
        if let Some(call) = self.call.take()
            && failed
        {
            call.in_flight.record_broken_stream();
        }
    }

    fn end_at_deadline(&mut self, deadline: Deadline) -> Status {
        self.end(false);
        deadline.exceeded_status(RESPONSE_NOT_ENDED)
    }

    /// Ends the response after an error of its stream. Returns the call's status, or `None` if the
    /// response had ended before.
    fn end_with(&mut self, error: &h2::Error) -> Option<Status> {
        let (status, failed) = self.classify(self.call.as_ref()?, error);
        self.end(failed);
        Some(status)
    }

    /// The status of a call whose stream failed, and whether the endpoint failed.
    fn classify(&self, call: &OpenCall, error: &h2::Error) -> (Status, bool) {
        if let Some(status) = call.body_error.as_ref().and_then(RequestBodyError::get) {
            // The caller's own body failed, which is no failure of the endpoint.
            return (status, false);
        }
        let close_reason = self.incoming.close_reason();
        let address = &call.in_flight.endpoint().target.address;
        if let Some(too_large) = self.incoming.cause_in_headers(error) {
            return (too_large.status(address), false);
        }
        let status = grpc_status::status_of_error(address, error, close_reason.as_deref());
        match &self.deadline {
            Some((deadline, _)) if deadline.is_cause_of(&status) => {
                (deadline.exceeded_status(RESPONSE_NOT_ENDED), false)
            }
            _ => (status, !grpc_status::is_malformed_request(error)),
        }
    }

    /// Ends the response with its trailers.
    fn on_trailers(&mut self, trailers: &mut HeaderMap) -> Result<(), Status> {
        if let Err(too_large) = self.incoming.check_trailers(trailers) {
            let call = self.call.take();
            self.end(false);
            let endpoint = call.as_ref().map(|call| call.in_flight.endpoint());
            return Err(too_large.status(endpoint.map_or("", |e| &e.target.address)));
        }
        let failed = status_headers::sanitize(trailers).is_some_and(is_failure);
        self.end(failed);
        Ok(())
    }

    fn poll_incoming(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let Some(stream) = &mut self.incoming.stream else {
            return Poll::Ready(None);
        };
        match ready!(stream.poll_data(cx)) {
            Some(Ok(data)) => {
                // Data that was read makes room in the flow-control window.
                let _ = stream.flow_control().release_capacity(data.len());
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            // The server has sent its whole response and does not read the rest of the request
            // (RFC 9113, section 8.1).
            Some(Err(error)) if error.reason() == Some(Reason::NO_ERROR) => {}
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => {}
        }
        match ready!(stream.poll_trailers(cx)) {
            Err(error) if error.reason() == Some(Reason::NO_ERROR) => Poll::Ready(None),
            trailers => Poll::Ready(
                trailers
                    .map(|trailers| trailers.map(Frame::trailers))
                    .transpose(),
            ),
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(call) = &this.call else {
            return Poll::Ready(None);
        };
        let has_status_in_head = call.has_status_in_head;
        // Checked before every frame, because a reader that is slower than the server never waits
        // for a frame and so never polls the timer.
        if let Some(deadline) = this.deadline.as_ref().map(|(deadline, _)| *deadline)
            && deadline.at <= Instant::now()
        {
            return Poll::Ready(Some(Err(this.end_at_deadline(deadline))));
        }
        match this.poll_incoming(cx) {
            Poll::Ready(Some(Ok(mut frame))) => {
                if let Some(trailers) = frame.trailers_mut() {
                    this.on_trailers(trailers)?;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(this.end_with(&error).map(Err)),
            Poll::Ready(None) => {
                // A response that ends without a status was cut short.
                this.end(!has_status_in_head);
                Poll::Ready(None)
            }
            Poll::Pending => {
                let Some((deadline, timer)) = &mut this.deadline else {
                    return Poll::Pending;
                };
                ready!(timer.as_mut().poll(cx));
                let deadline = *deadline;
                Poll::Ready(Some(Err(this.end_at_deadline(deadline))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_at_end()
    }
}
