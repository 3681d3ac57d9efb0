//! Sending calls on a connection.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request, Response};

use super::capacity::Capacity;
use super::header_limits::HeadersTooLarge;
use super::state::ConnectionState;
use super::unprocessed::Unprocessed;
use super::upload::{Upload, upload};
use crate::balance::replay::AttemptBody;
use crate::balance::status_headers::GRPC_STATUS;

/// Why a connection takes no calls that has not responded to a ping before a call in time.
pub(crate) const LATE_RESPONSE_TO_PING: &str = "no response to a ping";

/// Sends calls on a connection. Cheap to clone. The connection closes when the last sender and the
/// last call are dropped.
#[derive(Clone)]
pub(crate) struct Sender {
    h2: SendRequest<Bytes>,
    state: Arc<ConnectionState>,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// A call that failed before its response began.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) kind: SendErrorKind,
    /// CANCEL if h2 knows of no error, because the request was not handed to h2.
    pub(crate) error: h2::Error,
    /// Why the connection closed or takes no calls, if it does so.
    pub(crate) close_reason: Option<String>,
}

/// How far a call without a response got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SendErrorKind {
    /// No server can have acted on the call.
    Unprocessed(Unprocessed),
    /// The request itself is invalid; no connection can send it.
    Rejected,
    /// The headers of the response are too large to be read. Other servers' may be as well.
    TooLarge(HeadersTooLarge),
    /// The response breaks the rules of HTTP/2, or its headers are too large. Another server may
    /// respond alike, and cost another connection.
    Unreadable,
    /// A server may have acted on the call.
    Unknown,
}

impl Sender {
    pub(crate) fn new(h2: SendRequest<Bytes>, state: Arc<ConnectionState>) -> Self {
        Self { h2, state }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.state.is_accepting()
    }

    /// Why the connection accepts no more calls; `None` while it does.
    pub(crate) fn close_reason(&self) -> Option<String> {
        (!self.is_open()).then(|| self.state.describe_close())
    }

    /// The server's limit on streams, if it is reached.
    pub(crate) fn limit_reached(&self) -> Option<usize> {
        let limit = self.state.stream_limit();
        self.state.is_full().then_some(limit)
    }

    /// Whether the connection takes no calls until the peer responds to a ping.
    pub(crate) fn is_suspect(&self) -> bool {
        self.state.liveness.is_suspect()
    }

    /// Whether the connection is open and has a free stream.
    pub(crate) fn is_usable(&self) -> bool {
        self.is_open() && !self.state.is_full()
    }

    /// `capacity` is notified whenever the connection has a free stream after it had none.
    pub(crate) fn set_capacity(&self, capacity: &Arc<Capacity>) {
        self.state.set_capacity(capacity);
    }

    /// Reserves a stream for one call, if the connection is open and has a free one.
    ///
    /// Calls beyond the server's limit are not handed to h2, which would queue them. h2 sends its
    /// queue even for calls that were cancelled meanwhile, so that a server with a free stream
    /// again would see many streams opened and reset at once, which servers treat as an attack.
    pub(crate) fn reserve(&self) -> Option<ReservedStream> {
        let reserved = self.is_open() && self.state.acquire_stream();
        reserved.then(|| ReservedStream {
            h2: self.h2.clone(),
            permit: StreamPermit {
                state: Arc::clone(&self.state),
                closed: false,
                ended_by_peer: false,
                stream: None,
            },
        })
    }
}

/// A stream that one call may open.
pub(crate) struct ReservedStream {
    h2: SendRequest<Bytes>,
    /// Declared last, so that h2 knows of the reset before the permit is released.
    permit: StreamPermit,
}

impl ReservedStream {
    /// Whether the connection still accepts calls.
    pub(crate) fn is_open(&self) -> bool {
        self.permit.state.is_accepting()
    }

    /// Checks a request against the limits of the server. The stream of one that is too large is
    /// given back.
    pub(crate) fn check(mut self, request: &Request<()>) -> Result<Self, HeadersTooLarge> {
        match self.permit.state.header_limits.check_request(request) {
            Ok(()) => Ok(self),
            Err(too_large) => {
                self.permit.closed = true;
                Err(too_large)
            }
        }
    }

    /// Sends a request and waits for the head of its response.
    ///
    /// Dropping the future, or later the response's body, resets the stream.
    pub(crate) async fn send(
        mut self,
        request: Request<()>,
        body: AttemptBody,
    ) -> Result<Response<Incoming>, SendError> {
        let (response, stream) = self.open_stream(request).await?;
        let upload = upload(stream, body);
        let Self { h2, permit } = self;
        // h2 counts the handle as a reference to the connection. A pending response does not need
        // that reference.
        drop(h2);
        await_response(permit, upload, response).await
    }

    /// Opens the stream with the request's head.
    ///
    /// Never ends it there: gRPC over HTTP/2 asks for END_STREAM on a DATA frame, empty if there is
    /// no message, and grpc-go's handlers up to at least 1.33, which etcd 3.4 and 3.5 use, wait
    /// for that frame for ever.
    async fn open_stream(
        &mut self,
        request: Request<()>,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), SendError> {
        let state = &self.permit.state;
        if state.liveness.is_unproven() && !state.prove().await {
            return Err(not_sent(state));
        }
        if state.first_response.is_paused() {
            state.first_response.wait().await;
        }
        if let Err(error) = std::future::poll_fn(|cx| self.h2.poll_ready(cx)).await {
            // The connection is closing, or has used up its stream ids.
            state.mark_exhausted();
            return Err(send_error(
                state,
                SendErrorKind::Unprocessed(Unprocessed::NotSent),
                error,
            ));
        }
        // A GOAWAY may have been read since the stream was reserved.
        let Some(opening) = state.begin_opening() else {
            return Err(not_sent(state));
        };
        let opened = self.h2.send_request(request, false);
        drop(opening);
        match opened {
            Ok(opened) => Ok(opened),
            Err(error) => {
                // The request is to blame only if the connection still accepts others.
                let usable = std::future::poll_fn(|cx| self.h2.poll_ready(cx)).await;
                let kind = if usable.is_ok() {
                    SendErrorKind::Rejected
                } else {
                    state.mark_exhausted();
                    SendErrorKind::Unprocessed(Unprocessed::NotSent)
                };
                Err(send_error(state, kind, error))
            }
        }
    }
}

/// `permit` is the first parameter so that it is dropped last; see [`ReservedStream`].
async fn await_response(
    mut permit: StreamPermit,
    upload: Option<Upload>,
    response: ResponseFuture,
) -> Result<Response<Incoming>, SendError> {
    let stream = response.stream_id().as_u32();
    permit.stream = Some(stream);
    match response.await {
        Ok(response) => Ok(response.map(|stream| Incoming {
            stream: Some(stream),
            upload,
            permit: Some(permit),
        })),
        Err(error) => {
            permit.closed = true;
            permit.ended_by_peer = error.is_remote() && error.is_reset();
            let kind = kind_of(&permit.state, stream, &error);
            Err(send_error(&permit.state, kind, error))
        }
    }
}

/// How far a call got whose stream failed.
fn kind_of(state: &ConnectionState, stream: u32, error: &h2::Error) -> SendErrorKind {
    if let Some(unprocessed) = Unprocessed::of(error, || state.is_first_excluded(stream)) {
        return SendErrorKind::Unprocessed(unprocessed);
    }
    if !error.is_reset() && state.is_never_written(stream) {
        return SendErrorKind::Unprocessed(Unprocessed::NotSent);
    }
    if !error.is_library() {
        return SendErrorKind::Unknown;
    }
    let limits = &state.header_limits;
    if limits.is_large(stream) {
        return SendErrorKind::TooLarge(limits.unreadable());
    }
    // Headers that repeat themselves or come in tiny frames are small on the wire, so any call may
    // be the one that caused the end of the connection, unless h2 was reading large headers.
    let may_be_cause = ends_because_of_headers(error) && !limits.is_reading_large();
    match error.is_reset() || may_be_cause {
        true => SendErrorKind::Unreadable,
        false => SendErrorKind::Unknown,
    }
}

/// Whether h2 has ended the connection because of the size of headers.
fn ends_because_of_headers(error: &h2::Error) -> bool {
    let reason = error.reason();
    error.is_go_away()
        && matches!(
            reason,
            Some(Reason::ENHANCE_YOUR_CALM | Reason::COMPRESSION_ERROR)
        )
}

fn send_error(state: &ConnectionState, kind: SendErrorKind, error: h2::Error) -> SendError {
    SendError {
        kind,
        error,
        close_reason: state.close_reason.get(),
    }
}

/// The error of a call that was not handed to h2.
fn not_sent(state: &ConnectionState) -> SendError {
    let kind = SendErrorKind::Unprocessed(Unprocessed::NotSent);
    let mut error = send_error(state, kind, Reason::CANCEL.into());
    if error.close_reason.is_none() && state.liveness.is_suspect() {
        error.close_reason = Some(LATE_RESPONSE_TO_PING.to_owned());
    }
    error
}

/// A stream in use. Dropping the permit gives the stream back: at once if the stream has ended,
/// otherwise when the driver task has reset it.
#[derive(Debug)]
struct StreamPermit {
    state: Arc<ConnectionState>,
    closed: bool,
    /// Whether the peer ended the stream, so that it counts as ended until it is given back.
    ended_by_peer: bool,
    /// The id, once the stream is open.
    stream: Option<u32>,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        if self.ended_by_peer {
            // First, so that nothing is left when the last stream is given back.
            self.state.forget_stream_end();
        }
        if self.closed {
            self.state.release_streams(1);
        } else {
            if let Some(stream) = self.stream.filter(|_| !self.ended_by_peer) {
                self.state.cancelled_streams.insert(stream);
            }
            self.state.cancel_stream();
        }
    }
}

/// The body of a response, as it arrives from the network.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// `None` after [`finish`](Self::finish).
    pub(crate) stream: Option<RecvStream>,
    upload: Option<Upload>,
    /// Declared last, as in [`ReservedStream`].
    permit: Option<StreamPermit>,
}

/// A caller may drop a response that it has not read to its end, for example one without messages.
impl Drop for Incoming {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Incoming {
    /// Whether nothing is left to read.
    pub(crate) fn is_at_end(&self) -> bool {
        self.stream.as_ref().is_none_or(RecvStream::is_end_stream)
    }

    /// Ends the call: stops the upload, discards unread data and gives the stream back. A reader
    /// that keeps a finished body for long then uses no stream.
    pub(crate) fn finish(&mut self) {
        let received = self.is_at_end();
        let sent = self.upload.take().is_none_or(|upload| upload.is_finished());
        self.stream = None;
        if let Some(mut permit) = self.permit.take() {
            permit.closed = received && sent;
            permit.ended_by_peer = received;
        }
    }

    /// Why the connection closed, if it did.
    pub(crate) fn close_reason(&self) -> Option<String> {
        let permit = self.permit.as_ref()?;
        permit.state.close_reason.get()
    }

    /// Checks the head of the response.
    pub(crate) fn check_head(&self, headers: &HeaderMap) -> Result<(), HeadersTooLarge> {
        match &self.permit {
            Some(permit) => permit.state.header_limits.check_head(headers),
            None => Ok(()),
        }
    }

    /// Checks trailers. h2 leaves out what is too large to be read, so large ones without a status
    /// are not complete.
    pub(crate) fn check_trailers(&self, trailers: &HeaderMap) -> Result<(), HeadersTooLarge> {
        let Some(permit) = &self.permit else {
            return Ok(());
        };
        permit.state.header_limits.check_trailers(trailers)?;
        // The status is looked for last, because usually no headers were too large.
        match self.trailers_too_large() {
            Some(too_large) if !trailers.contains_key(GRPC_STATUS) => Err(too_large),
            _ => Ok(()),
        }
    }

    /// The cause of an error of the stream, if headers that are too large to be read are it.
    pub(crate) fn cause_in_headers(&self, error: &h2::Error) -> Option<HeadersTooLarge> {
        self.trailers_too_large().filter(|_| error.is_library())
    }

    /// The error of trailers of this stream that h2 may not have read to their end. The head was
    /// read, since the response has begun.
    fn trailers_too_large(&self) -> Option<HeadersTooLarge> {
        let limits = &self.permit.as_ref()?.state.header_limits;
        if !limits.has_large() {
            return None;
        }
        let stream = self.stream.as_ref()?.stream_id().as_u32();
        let is_large = limits.has_large_trailers(stream);
        is_large.then(|| limits.unreadable())
    }
}
