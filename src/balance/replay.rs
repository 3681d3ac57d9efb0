//! Request bodies that can be sent again.
//!
//! A call that provably reached no server is sent to another endpoint (G7), and for that its body
//! must still be there. A unary call's body is one chunk that tonic has at hand: it is taken whole,
//! and every attempt gets a cheap clone. The body of a client stream is kept while it is being sent, up
//! to [`LIMIT`] and until the response begins; past that the call cannot be sent again.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;

/// How much of a streamed body is kept for another attempt. A unary body is at hand whole, so
/// keeping it costs nothing, whatever its size.
const LIMIT: usize = 64 * 1024;

/// The body of one call, from which each attempt gets its own.
#[derive(Debug)]
pub(super) enum Replay {
    /// At hand from beginning to end.
    Whole(Bytes),
    Streamed(Arc<Mutex<Streamed>>),
}

/// What went wrong in the body itself, if anything did. It outlives the body, which is let go when it was
/// sent.
#[derive(Debug, Clone, Default)]
pub(super) struct OwnFailure(Arc<OnceLock<Status>>);

impl OwnFailure {
    pub(super) fn get(&self) -> Option<Status> {
        self.0.get().cloned()
    }
}

#[derive(Debug)]
pub(super) struct Streamed {
    body: Body,
    ended: bool,
    /// Why it has no end.
    failed: OwnFailure,
    /// The frames so far; `None` once they are too much.
    kept: Option<Vec<Bytes>>,
    kept_bytes: usize,
    /// The response has begun: what is kept is only what the present attempt still has to read.
    released: bool,
    /// Which attempt may read; an earlier one that is still being torn down may not.
    attempt: u32,
}

impl Replay {
    /// Looks at what of the body is at hand.
    pub(super) fn poll_new(body: &mut Body, cx: &mut Context<'_>) -> Poll<Result<Self, Status>> {
        let mut kept = Vec::new();
        let mut ended = body.is_end_stream();
        while !ended && kept.len() < 2 {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        kept.push(data);
                    }
                    ended = body.is_end_stream();
                }
                Poll::Ready(Some(Err(status))) => return Poll::Ready(Err(status)),
                Poll::Ready(None) => ended = true,
                Poll::Pending => break,
            }
        }
        if ended && kept.len() < 2 {
            return Poll::Ready(Ok(Self::Whole(kept.pop().unwrap_or_default())));
        }
        let kept_bytes = kept.iter().map(Bytes::len).sum();
        Poll::Ready(Ok(Self::Streamed(Arc::new(Mutex::new(Streamed {
            body: std::mem::take(body),
            ended,
            failed: OwnFailure::default(),
            kept: Some(kept),
            kept_bytes,
            released: false,
            attempt: 0,
        })))))
    }

    /// The body for another attempt; `None` when it is not there any more.
    pub(super) fn attempt(&self) -> Option<AttemptBody> {
        match self {
            Self::Whole(bytes) => Some(AttemptBody::Whole(
                (!bytes.is_empty()).then(|| bytes.clone()),
            )),
            Self::Streamed(streamed) => {
                let mut state = lock(streamed);
                // The first attempt is always there.
                if state.attempt > 0 && (state.released || state.kept.is_none()) {
                    return None;
                }
                state.attempt += 1;
                Some(AttemptBody::Streamed {
                    attempt: state.attempt,
                    position: 0,
                    streamed: Arc::clone(streamed),
                })
            }
        }
    }

    /// Whether there can be another attempt.
    pub(super) fn is_repeatable(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Streamed(streamed) => {
                let state = lock(streamed);
                !state.released && state.kept.is_some()
            }
        }
    }

    /// `None` for a body that cannot fail any more.
    pub(super) fn own_failure(&self) -> Option<OwnFailure> {
        match self {
            Self::Whole(_) => None,
            Self::Streamed(streamed) => Some(lock(streamed).failed.clone()),
        }
    }

    /// The response has begun: there will be no other attempt.
    pub(super) fn release(&self) {
        if let Self::Streamed(streamed) = self {
            lock(streamed).released = true;
        }
    }
}

fn lock(streamed: &Mutex<Streamed>) -> MutexGuard<'_, Streamed> {
    streamed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of one attempt.
#[derive(Debug)]
pub(super) enum AttemptBody {
    Whole(Option<Bytes>),
    Streamed {
        streamed: Arc<Mutex<Streamed>>,
        attempt: u32,
        position: usize,
    },
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
                let mut state = lock(streamed);
                if state.attempt != *attempt {
                    let superseded = Status::cancelled("sent to another endpoint");
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
                let state = lock(streamed);
                let kept = state.kept.as_ref().map_or(0, Vec::len);
                state.ended && *position >= kept
            }
        }
    }

    fn size_hint(&self) -> SizeHint {
        // Not the exact size: hyper would send it as `content-length`, which gRPC requests
        // do not carry.
        SizeHint::default()
    }
}

impl Streamed {
    fn poll_frame(
        &mut self,
        position: &mut usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(kept) = &self.kept {
            if let Some(bytes) = kept.get(*position) {
                *position += 1;
                return Poll::Ready(Some(Ok(Frame::data(bytes.clone()))));
            }
            // Also what was at hand at the beginning may be more than is kept, once it was read.
            if self.released || self.kept_bytes > LIMIT {
                self.kept = None;
            }
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else {
            self.ended = true;
            return Poll::Ready(None);
        };
        let frame = frame.inspect_err(|status| {
            let _ = self.failed.0.set(status.clone());
        })?;
        self.ended = self.body.is_end_stream();
        if let (Some(kept), Some(data)) = (&mut self.kept, frame.data_ref()) {
            self.kept_bytes = self.kept_bytes.saturating_add(data.len());
            if self.kept_bytes > LIMIT {
                self.kept = None;
            } else {
                kept.push(data.clone());
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

    fn streamed() -> (mpsc::UnboundedSender<Bytes>, Body) {
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
        let frame = body.frame().now_or_never().expect("a frame at hand")?;
        Some(frame.unwrap().into_data().unwrap())
    }

    #[test]
    fn a_body_that_is_at_hand_is_sent_whole_as_often_as_needed() {
        for content in ["", "hello"] {
            let replay = replay(Body::new(http_body_util::Full::new(Bytes::from(content))));
            assert!(matches!(replay, Replay::Whole(_)));
            for _ in 0..3 {
                let mut body = replay.attempt().unwrap();
                let collected = body.collect().now_or_never().unwrap().unwrap();
                assert_eq!(collected.to_bytes(), content);
                body = replay.attempt().unwrap();
                assert_eq!(body.is_end_stream(), content.is_empty());
            }
        }
    }

    #[test]
    fn a_stream_is_replayed_and_then_goes_on_where_it_was() {
        let (sender, body) = streamed();
        sender.unbounded_send("a".into()).unwrap();
        let replay = replay(body);
        let mut first = replay.attempt().unwrap();
        assert_eq!(next(&mut first).unwrap(), "a");
        sender.unbounded_send("b".into()).unwrap();
        assert_eq!(next(&mut first).unwrap(), "b");
        let mut second = replay.attempt().unwrap();
        // The first is not torn down yet, and must not take anything from the second.
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
    fn what_is_at_hand_and_was_not_all_read_can_be_sent_again_whatever_its_size() {
        let (sender, body) = streamed();
        let chunk = Bytes::from(vec![7; LIMIT]);
        for _ in 0..3 {
            sender.unbounded_send(chunk.clone()).unwrap();
        }
        drop(sender);
        let replay = replay(body);
        // Its connection was closed before a byte was taken, and the next one's after some were.
        drop(replay.attempt().unwrap());
        assert!(replay.is_repeatable());
        let mut second = replay.attempt().unwrap();
        assert_eq!(next(&mut second).unwrap(), chunk);
        let mut third = replay.attempt().unwrap();
        for _ in 0..3 {
            assert_eq!(next(&mut third).unwrap(), chunk);
        }
        assert_eq!(next(&mut third), None);
        assert!(!replay.is_repeatable());
    }

    #[test]
    fn past_the_limit_nothing_is_kept_and_nothing_is_lost() {
        let (sender, body) = streamed();
        let replay = replay(body);
        let mut first = replay.attempt().unwrap();
        let chunk = Bytes::from(vec![7; LIMIT / 2]);
        for _ in 0..5 {
            sender.unbounded_send(chunk.clone()).unwrap();
            assert_eq!(next(&mut first).unwrap(), chunk);
        }
        assert!(replay.attempt().is_none());
        drop(sender);
        assert_eq!(next(&mut first), None);
    }

    #[test]
    fn once_the_response_has_begun_nothing_is_kept_and_nothing_is_lost() {
        let (sender, body) = streamed();
        sender.unbounded_send("a".into()).unwrap();
        sender.unbounded_send("b".into()).unwrap();
        let replay = replay(body);
        let mut first = replay.attempt().unwrap();
        assert_eq!(next(&mut first).unwrap(), "a");
        replay.release();
        assert_eq!(next(&mut first).unwrap(), "b");
        sender.unbounded_send("c".into()).unwrap();
        assert_eq!(next(&mut first).unwrap(), "c");
        assert!(replay.attempt().is_none());
    }
}
