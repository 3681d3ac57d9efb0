//! The body of a response: what keeps its call in flight.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http_body::{Body, Frame};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};
use tonic::Status;

use super::grpc_timeout;
use super::in_flight::InFlight;
use crate::balance::connection::Incoming;
use crate::balance::grpc_status::{self, is_failure, status_of};
use crate::balance::replay::OwnFailure;

/// When a call's time may be over.
const DURING: &str = "during the response";

/// The response's body: ends in DEADLINE_EXCEEDED when the call's time is over, and keeps the call
/// in flight until it ends or is dropped.
pub(super) struct ResponseBody {
    incoming: Incoming,
    deadline: Option<(Pin<Box<Sleep>>, Duration)>,
    /// The head has said how it ended: there is nothing to come.
    is_over: bool,
    call: Option<(InFlight, Option<OwnedSemaphorePermit>)>,
    own_failure: Option<OwnFailure>,
}

/// A call whose response has begun.
pub(super) struct AnsweredCall {
    /// The head has said how it ended.
    pub(super) is_over: bool,
    pub(super) deadline: Option<(Instant, Duration)>,
    pub(super) in_flight: InFlight,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    /// What may go wrong with the request's body.
    pub(super) own_failure: Option<OwnFailure>,
}

impl ResponseBody {
    pub(super) fn new(incoming: Incoming, call: AnsweredCall) -> Self {
        Self {
            // Nothing will be waited for, so no timer either.
            deadline: call
                .deadline
                .filter(|_| !incoming.is_at_end())
                .map(|(at, limit)| (Box::pin(tokio::time::sleep_until(at)), limit)),
            incoming,
            is_over: call.is_over,
            call: Some((call.in_flight, call.permit)),
            own_failure: call.own_failure,
        }
    }

    fn ended(&mut self, failed: bool) {
        self.incoming.finish();
        if let Some((in_flight, _)) = self.call.take()
            && failed
        {
            in_flight.broke_off();
        }
    }

    fn failed(&mut self, error: &h2::Error) -> Status {
        if let Some(own) = self.own_failure.as_ref().and_then(OwnFailure::get) {
            // The caller's to know, and no fault of the endpoint.
            self.ended(false);
            return own;
        }
        let ending = self.incoming.ending();
        let address = match &self.call {
            Some((in_flight, _)) => &*in_flight.endpoint().target.address,
            None => "",
        };
        let status = grpc_status::status_of_error(address, error, ending.as_deref());
        if let Some((sleep, limit)) = &self.deadline
            && grpc_timeout::is_late(&status, sleep.deadline())
        {
            let late = grpc_status::deadline_exceeded(*limit, DURING);
            self.ended(false);
            return late;
        }
        self.ended(true);
        status
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
                // What was taken makes room for more.
                let _ = stream.flow_control().release_capacity(data.len());
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            // The server has said all it wants to say, and wants to hear no more (RFC 9113,
            // section 8.1).
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
        if this.call.is_none() {
            return Poll::Ready(None);
        }
        // Looked at before every frame: a reader that is slower than its server never waits for one.
        if let Some((sleep, limit)) = &this.deadline
            && sleep.deadline() <= Instant::now()
        {
            let status = grpc_status::deadline_exceeded(*limit, DURING);
            this.ended(false);
            return Poll::Ready(Some(Err(status)));
        }
        match this.poll_incoming(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(trailers) = frame.trailers_ref() {
                    let failed = status_of(trailers).is_some_and(is_failure);
                    this.ended(failed);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(this.failed(&error)))),
            Poll::Ready(None) => {
                // Without a status it was cut short.
                this.ended(!this.is_over);
                Poll::Ready(None)
            }
            Poll::Pending => {
                let Some((sleep, limit)) = &mut this.deadline else {
                    return Poll::Pending;
                };
                ready!(sleep.as_mut().poll(cx));
                let status = grpc_status::deadline_exceeded(*limit, DURING);
                this.ended(false);
                Poll::Ready(Some(Err(status)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_at_end()
    }
}
