//! Request bodies that can be sent again.
//!
//! A transparent retry sends a call to another endpoint, so the call's body must still be available
//! then. A unary call's body is one chunk that tonic has in memory, and each attempt gets a cheap
//! clone of it. The body of a client stream is recorded while it is sent, up to [`LIMIT`] bytes and
//! until the response begins. A call with a longer body, or whose response has begun, cannot be
//! sent again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use parking_lot::Mutex;
use tonic::Status;
use tonic::body::Body;

use crate::panics;

/// The most bytes of a streamed body that are recorded for another attempt. A unary body has no
/// limit, because it is in memory anyway.
const LIMIT: usize = 64 * 1024;

/// The body of one call, from which each attempt gets its own.
#[derive(Debug)]
pub(crate) enum Replay {
    /// The complete body, in memory.
    Whole(Bytes),
    Streamed(Arc<Mutex<Streamed>>),
}

/// The error of a request's body, once the body has failed. Outlives the body, which is dropped
/// after it was sent.
#[derive(Debug, Clone, Default)]
pub(super) struct RequestBodyError(Arc<OnceLock<Status>>);

impl RequestBodyError {
    pub(super) fn get(&self) -> Option<Status> {
        self.0.get().cloned()
    }

    /// Only the first error is kept.
    pub(super) fn set(&self, status: Status) {
        let _ = self.0.set(status);
    }
}

#[derive(Debug)]
pub(crate) struct Streamed {
    body: Body,
    ended: bool,
    error: RequestBodyError,
    /// The frames so far. `None` once their size is over the limit, or they are no longer needed.
    recorded: Option<Vec<Bytes>>,
    recorded_bytes: usize,
    /// There will be no other attempt (gRFC A6). `recorded` then only holds the frames that
    /// the present attempt has not read yet.
    committed: bool,
    /// The number of the attempt that may read. An earlier attempt whose upload has not stopped yet
    /// may not.
    attempt: u32,
}

impl Replay {
    /// Reads the frames of the body that are available now. Is always ready.
    pub(crate) fn poll_new(body: &mut Body, cx: &mut Context<'_>) -> Poll<Result<Self, Status>> {
        let mut frames = Vec::new();
        let mut ended = body.is_end_stream();
        while !ended && frames.len() < 2 {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        frames.push(data);
                    }
                    ended = body.is_end_stream();
                }
                Poll::Ready(Some(Err(status))) => return Poll::Ready(Err(status)),
                Poll::Ready(None) => ended = true,
                Poll::Pending => break,
            }
        }
        if ended && frames.len() < 2 {
            return Poll::Ready(Ok(Self::Whole(frames.pop().unwrap_or_default())));
        }
        let recorded_bytes = frames.iter().map(Bytes::len).sum();
        Poll::Ready(Ok(Self::Streamed(Arc::new(Mutex::new(Streamed {
            body: std::mem::take(body),
            ended,
            error: RequestBodyError::default(),
            recorded: Some(frames),
            recorded_bytes,
            committed: false,
            attempt: 0,
        })))))
    }

    /// The body of the first attempt.
    pub(crate) fn first_attempt(&self) -> AttemptBody {
        match self {
            Self::Whole(bytes) => AttemptBody::from_bytes(bytes),
            Self::Streamed(streamed) => {
                let attempt = streamed.lock().start_attempt();
                AttemptBody::from_stream(streamed, attempt)
            }
        }
    }

    /// The body of a further attempt. `None` if it is no longer complete.
    ///
    /// The attempt before cannot read the body any more.
    pub(crate) fn next_attempt(&self) -> Option<AttemptBody> {
        match self {
            Self::Whole(bytes) => Some(AttemptBody::from_bytes(bytes)),
            Self::Streamed(streamed) => {
                let mut state = streamed.lock();
                let attempt = state.is_replayable().then(|| state.start_attempt())?;
                Some(AttemptBody::from_stream(streamed, attempt))
            }
        }
    }

    /// Whether there can be another attempt.
    pub(super) fn is_replayable(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Streamed(streamed) => streamed.lock().is_replayable(),
        }
    }

    /// Whether the body is sent as it becomes available.
    pub(super) fn is_streamed(&self) -> bool {
        matches!(self, Self::Streamed(_))
    }

    /// Where an error of the body will be found. `None` for a body in memory, which cannot fail.
    pub(super) fn body_error(&self) -> Option<RequestBodyError> {
        match self {
            Self::Whole(_) => None,
            Self::Streamed(streamed) => Some(streamed.lock().error.clone()),
        }
    }

    /// Stops recording, because the response has begun and there will be no other attempt.
    pub(crate) fn commit(&self) {
        if let Self::Streamed(streamed) = self {
            streamed.lock().committed = true;
        }
    }
}

/// The body of one attempt.
#[derive(Debug)]
pub(crate) enum AttemptBody {
    /// `None` once the body was read, and for an empty body.
    Whole(Option<Bytes>),
    Streamed {
        streamed: Arc<Mutex<Streamed>>,
        attempt: u32,
        /// How many of the recorded frames were read.
        position: usize,
    },
}

impl AttemptBody {
    fn from_bytes(bytes: &Bytes) -> Self {
        Self::Whole((!bytes.is_empty()).then(|| bytes.clone()))
    }

    fn from_stream(streamed: &Arc<Mutex<Streamed>>, attempt: u32) -> Self {
        Self::Streamed {
            streamed: Arc::clone(streamed),
            attempt,
            position: 0,
        }
    }
}

impl http_body::Body for AttemptBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Streamed {
                streamed,
                attempt,
                position,
            } => {
                let mut state = streamed.lock();
                if state.attempt != *attempt {
                    let superseded = Status::cancelled("the call was sent to another endpoint");
                    return Poll::Ready(Some(Err(superseded)));
                }
                state.poll_frame(position, cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Streamed {
                streamed, position, ..
            } => {
                let state = streamed.lock();
                let recorded = state.recorded.as_ref().map_or(0, Vec::len);
                state.ended && *position >= recorded
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        // An exact size would be sent as `content-length`, which gRPC requests do not carry.
        SizeHint::default()
    }
}

impl Streamed {
    fn is_replayable(&self) -> bool {
        !self.committed && self.recorded.is_some()
    }

    fn start_attempt(&mut self) -> u32 {
        self.attempt += 1;
        self.attempt
    }

    fn poll_frame(
        &mut self,
        position: &mut usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(recorded) = &self.recorded {
            if let Some(bytes) = recorded.get(*position) {
                *position += 1;
                return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
            }
            // The frames that were available at the beginning may exceed the limit, and are
            // dropped only after an attempt has read them.
            if self.committed || self.recorded_bytes > LIMIT {
                self.recorded = None;
            }
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let body = Pin::new(&mut self.body);
        // Polled by a task of the channel, so that a panic would end without a trace.
        let polled = catch_unwind(AssertUnwindSafe(|| body.poll_frame(cx)));
        let polled = polled.unwrap_or_else(|payload| {
            let text = panics::text(&*payload);
            let status = Status::internal(format!("the stream of requests panicked: {text}"));
            Poll::Ready(Some(Err(status)))
        });
        let Some(frame) = ready!(polled) else {
            self.ended = true;
            return Poll::Ready(None);
        };
        let frame = frame.inspect_err(|status| self.error.set(status.clone()))?;
        self.ended = self.body.is_end_stream();
        if let (Some(recorded), Some(data)) = (&mut self.recorded, frame.data_ref()) {
            self.recorded_bytes = self.recorded_bytes.saturating_add(data.len());
            if self.recorded_bytes > LIMIT {
                self.recorded = None;
            } else {
                recorded.push(data.clone());
                *position += 1;
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

#[cfg(test)]
mod tests {
    use futures::channel::mpsc;
    use futures::{FutureExt, StreamExt};
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    fn streaming_body() -> (mpsc::UnboundedSender<Bytes>, Body) {
        let (sender, receiver) = mpsc::unbounded();
        let frames = receiver.map(|bytes| Ok::<_, Status>(Frame::data(bytes)));
        (sender, Body::new(StreamBody::new(frames)))
    }

    fn replay(mut body: Body) -> Replay {
        futures::future::poll_fn(|cx| Replay::poll_new(&mut body, cx))
            .now_or_never()
            .unwrap()
            .unwrap()
    }

    fn next(body: &mut AttemptBody) -> Option<Bytes> {
        let frame = body.frame().now_or_never().expect("a frame is available")?;
        Some(frame.unwrap().into_data().unwrap())
    }

    #[test]
    fn body_in_memory_is_sent_whole_each_time() {
        for content in ["", "hello"] {
            let replay = replay(Body::new(http_body_util::Full::new(Bytes::from(content))));
            assert!(matches!(replay, Replay::Whole(_)));
            let mut body = replay.first_attempt();
            for _ in 0..3 {
                assert_eq!(body.is_end_stream(), content.is_empty());
                let collected = body.collect().now_or_never().unwrap().unwrap();
                assert_eq!(collected.to_bytes(), content);
                body = replay.next_attempt().unwrap();
            }
        }
    }

    #[test]
    fn stream_is_replayed_and_continues() {
        let (sender, body) = streaming_body();
        sender.unbounded_send("a".into()).unwrap();
        let replay = replay(body);
        let mut first = replay.first_attempt();
        assert_eq!(next(&mut first).unwrap(), "a");
        sender.unbounded_send("b".into()).unwrap();
        assert_eq!(next(&mut first).unwrap(), "b");
        let mut second = replay.next_attempt().unwrap();
        // The first attempt has not stopped yet, and must not take a frame from the second.
        sender.unbounded_send("c".into()).unwrap();
        assert!(first.frame().now_or_never().unwrap().unwrap().is_err());
        drop(sender);
        for expected in ["a", "b", "c"] {
            assert_eq!(next(&mut second).unwrap(), expected);
        }
        assert_eq!(next(&mut second), None);
        assert!(second.is_end_stream());
    }

    #[test]
    fn unread_frames_are_replayable_whatever_their_size() {
        let (sender, body) = streaming_body();
        let chunk = Bytes::from(vec![7; LIMIT]);
        for _ in 0..3 {
            sender.unbounded_send(chunk.clone()).unwrap();
        }
        drop(sender);
        let replay = replay(body);
        // The first attempt reads nothing before its connection closes, the second reads one frame.
        drop(replay.first_attempt());
        assert!(replay.is_replayable());
        let mut second = replay.next_attempt().unwrap();
        assert_eq!(next(&mut second).unwrap(), chunk);
        let mut third = replay.next_attempt().unwrap();
        for _ in 0..3 {
            assert_eq!(next(&mut third).unwrap(), chunk);
        }
        assert_eq!(next(&mut third), None);
        assert!(!replay.is_replayable());
    }

    #[test]
    fn over_the_limit_nothing_is_recorded_or_lost() {
        let (sender, body) = streaming_body();
        let replay = replay(body);
        let mut first = replay.first_attempt();
        let chunk = Bytes::from(vec![7; LIMIT / 2]);
        for _ in 0..5 {
            sender.unbounded_send(chunk.clone()).unwrap();
            assert_eq!(next(&mut first).unwrap(), chunk);
        }
        assert!(replay.next_attempt().is_none());
        drop(sender);
        assert_eq!(next(&mut first), None);
    }

    #[test]
    fn after_commit_nothing_is_recorded_or_lost() {
        let (sender, body) = streaming_body();
        sender.unbounded_send("a".into()).unwrap();
        sender.unbounded_send("b".into()).unwrap();
        let replay = replay(body);
        let mut first = replay.first_attempt();
        assert_eq!(next(&mut first).unwrap(), "a");
        replay.commit();
        assert_eq!(next(&mut first).unwrap(), "b");
        sender.unbounded_send("c".into()).unwrap();
        assert_eq!(next(&mut first).unwrap(), "c");
        assert!(replay.next_attempt().is_none());
    }
}
