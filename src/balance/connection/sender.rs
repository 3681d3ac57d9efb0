//! One HTTP/2 connection: calls go out on it, a task of its own drives it.
//!
//! On h2 itself rather than on hyper's client, which hands each call through a queue to a task and each
//! answer through another task back: two more turns of the scheduler per call than the stream
//! itself needs. And h2 says for certain whether a call was sent.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use http::{Request, Response};
use http_body::Body as _;
use tokio::sync::Notify;

use super::state::Shared;
use super::upload::{Upload, upload};
use crate::balance::grpc_status;
use crate::balance::replay::AttemptBody;

/// Sends calls on a connection. Cheap to clone. The connection closes when no sender and no call is
/// left.
#[derive(Clone)]
pub(crate) struct Sender {
    h2: SendRequest<Bytes>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

/// A call that got no response.
#[derive(Debug)]
pub(crate) struct SendError {
    pub(crate) fate: Fate,
    pub(crate) error: h2::Error,
    /// What is known of the connection's end.
    pub(crate) ending: Option<String>,
}

/// How far a call got that has no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// No server can have acted on it, for certain.
    Unsent,
    /// It cannot be sent at all, on any connection.
    Rejected,
    /// A server may have acted on it.
    Unknown,
}

impl Sender {
    pub(crate) fn new(h2: SendRequest<Bytes>, shared: Arc<Shared>) -> Self {
        Self { h2, shared }
    }

    pub(crate) fn is_open(&self) -> bool {
        self.shared.open.load(Ordering::Acquire)
    }

    /// Why it takes no more calls; `None` while it does.
    pub(crate) fn ended(&self) -> Option<String> {
        (!self.is_open()).then(|| self.shared.how_it_ended())
    }

    /// The server's limit on streams, if it is reached.
    pub(crate) fn limit_reached(&self) -> Option<usize> {
        let limit = self.shared.limit.load(Ordering::SeqCst);
        self.shared.is_full().then_some(limit)
    }

    /// Whether a call can be sent now.
    pub(crate) fn is_usable(&self) -> bool {
        self.is_open() && !self.shared.is_full()
    }

    /// `freed` is notified whenever there is room for a call after there was none.
    pub(crate) fn announce_room(&self, freed: &Arc<Notify>) {
        let _ = self.shared.freed.set(Arc::clone(freed));
    }

    /// A stream for one call, if it can be sent now.
    ///
    /// Beyond the server's limit none is handed to h2, which would queue it: h2 sends what it has in its
    /// queue even if the call was given up meanwhile, so that, once there is room, the server sees
    /// a row of streams that are opened and reset, which it takes for an attack.
    pub(crate) fn reserve(&self) -> Option<Reserved> {
        let entered = self.is_open() && self.shared.enter();
        entered.then(|| Reserved {
            h2: self.h2.clone(),
            open: OpenCall {
                shared: Arc::clone(&self.shared),
                closed: false,
            },
        })
    }
}

/// A stream that one call may open.
pub(crate) struct Reserved {
    h2: SendRequest<Bytes>,
    /// Let go of last: by then h2 knows what it has to reset.
    open: OpenCall,
}

impl Reserved {
    /// Makes the call. Dropping the future, or the response's body, resets the stream.
    pub(crate) async fn send(
        self,
        request: Request<()>,
        body: AttemptBody,
    ) -> Result<Response<Incoming>, SendError> {
        let Self { mut h2, mut open } = self;
        let failed = |shared: &Shared, fate, error| SendError {
            fate,
            error,
            ending: shared.ending.get(),
        };
        if let Err(error) = std::future::poll_fn(|cx| h2.poll_ready(cx)).await {
            // It is closing, or has run out of stream ids.
            open.shared.spend();
            return Err(failed(&open.shared, Fate::Unsent, error));
        }
        let sent = h2.send_request(request, body.is_end_stream());
        let (response, stream) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                // The connection's fault if it cannot take any other call either.
                let usable = std::future::poll_fn(|cx| h2.poll_ready(cx)).await;
                let fate = match usable {
                    Ok(()) => Fate::Rejected,
                    Err(_) => {
                        open.shared.spend();
                        Fate::Unsent
                    }
                };
                return Err(failed(&open.shared, fate, error));
            }
        };
        let upload = upload(stream, body);
        // Counted as a reference to the connection; a response that takes long needs none.
        drop(h2);
        match response.await {
            Ok(response) => Ok(response.map(|stream| Incoming {
                stream: Some(stream),
                upload,
                call: Some(open),
            })),
            Err(error) => {
                open.closed = true;
                let fate = if grpc_status::is_refused(&error) {
                    Fate::Unsent
                } else {
                    Fate::Unknown
                };
                Err(failed(&open.shared, fate, error))
            }
        }
    }
}

/// A stream in use, until it is dropped.
#[derive(Debug)]
struct OpenCall {
    shared: Arc<Shared>,
    /// The stream has ended. Otherwise it is in use until the connection's task has reset it.
    closed: bool,
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        if self.closed {
            self.shared.leave(1);
        } else {
            self.shared.given_up.fetch_add(1, Ordering::SeqCst);
            self.shared.driver.wake();
        }
    }
}

/// The body of a response, as it comes from the wire.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// `None` once it is over.
    pub(crate) stream: Option<RecvStream>,
    upload: Option<Upload>,
    /// Let go of last, as in [`Reserved`].
    call: Option<OpenCall>,
}

impl Incoming {
    /// Nothing is to be read any more.
    pub(crate) fn is_at_end(&self) -> bool {
        self.stream.as_ref().is_none_or(RecvStream::is_end_stream)
    }

    /// The response is over: what is still being sent is not wanted any more, and neither is what may be to
    /// come. A reader may hold on to it for long, and takes up no stream.
    pub(crate) fn finish(&mut self) {
        let received = self.is_at_end();
        let sent = self.upload.take().is_none_or(|upload| upload.is_over());
        self.stream = None;
        if let Some(mut call) = self.call.take() {
            call.closed = received && sent;
        }
    }

    pub(crate) fn ending(&self) -> Option<String> {
        self.call.as_ref().and_then(|call| call.shared.ending.get())
    }
}
