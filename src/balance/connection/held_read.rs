//! Bytes that h2 gets a moment later.
//!
//! A server that shuts down gracefully sends GOAWAY and a PING, and a second GOAWAY after the
//! response to the PING. The second one names the last stream that the server has seen. h2 responds
//! to the PING before it sends the HEADERS that it has queued, so that the second GOAWAY excludes
//! streams that arrive right after, and Netty ends the whole connection when DATA for an excluded
//! stream arrives. Therefore the bytes with the first GOAWAY are held back until h2 has written
//! what it had queued. h2 writes when a read is pending.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::ReadBuf;
use tokio::time::{Sleep, sleep};

use super::state::ConnectionState;

/// How long bytes are held back while the system takes none of ours. The peer's next frames, which
/// may make room in its windows, wait behind them.
const MAX_HELD: Duration = Duration::from_secs(1);

/// The bytes of the read in which the first GOAWAY arrived.
#[derive(Debug)]
pub(super) struct HeldRead {
    bytes: Bytes,
    /// Whether h2 has all requests, so that the pending read makes it write them.
    is_settled: bool,
    too_long: Pin<Box<Sleep>>,
}

impl HeldRead {
    /// Takes back what was read into `buf` after the first `before` bytes. The connection accepts no
    /// new calls any more.
    pub(super) fn take(buf: &mut ReadBuf<'_>, before: usize, state: &ConnectionState) -> Self {
        let bytes = Bytes::copy_from_slice(&buf.filled()[before..]);
        buf.set_filled(before);
        Self {
            bytes,
            is_settled: !state.is_opening_stream(),
            too_long: Box::pin(sleep(MAX_HELD)),
        }
    }

    /// Hands on the bytes, or as many as fit. The caller polls again as long as there are some, and
    /// when a write has found room again.
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        state: &ConnectionState,
        is_write_blocked: bool,
    ) -> Poll<()> {
        if !self.is_settled {
            // A call has begun to open its stream before the GOAWAY was read. Calls take no longer
            // for that than it takes to queue the HEADERS.
            self.is_settled = !state.is_opening_stream();
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if is_write_blocked && self.too_long.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let fitting = self.bytes.len().min(buf.remaining());
        buf.put_slice(&self.bytes[..fitting]);
        self.bytes.advance(fitting);
        Poll::Ready(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}
