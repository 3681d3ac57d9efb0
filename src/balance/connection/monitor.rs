//! Watching a connection's bytes for the two frames that h2 does not report in time.
//!
//! A server's first frame is SETTINGS. Until it has arrived, nothing shows that a server is there,
//! even if the socket is connected. GOAWAY announces that the server accepts no new calls. h2
//! reports it with the next call, which is too late on an idle connection.
//!
//! The monitor also keeps a broken connection readable. h2 writes before it reads and gives up a
//! connection on the first write error, while the peer's last responses and its GOAWAY may be
//! unread.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::frames::{Frame, Scanner};
use super::held_read::HeldRead;
use super::ping_interval::PingInterval;
use super::state::ConnectionState;
use super::written::WrittenStreams;

/// The id of a client's first stream (RFC 9113, section 5.1.1).
const FIRST_STREAM: u32 = 1;

/// An I/O that reports the peer's first SETTINGS, its GOAWAY, and the first write error.
#[derive(Debug)]
pub(crate) struct MonitoredIo<T> {
    io: T,
    scanner: Scanner,
    settings: Option<oneshot::Sender<()>>,
    going_away: Option<oneshot::Sender<String>>,
    write_failed: Option<oneshot::Sender<String>>,
    /// Whether a GOAWAY was read.
    has_go_away: bool,
    held: Option<HeldRead>,
    written: WrittenStreams,
    blocked: Option<Blocked>,
    /// The stream that the peer ended last.
    last_ended: u32,
    ping_interval: PingInterval,
    state: Arc<ConnectionState>,
}

/// Writes or flushes that have found no room.
#[derive(Debug)]
struct Blocked {
    since: Instant,
    by: Operation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Write,
    Flush,
}

/// The events of a [`MonitoredIo`].
#[derive(Debug)]
pub(crate) struct IoEvents {
    /// The peer's first SETTINGS arrived.
    pub(crate) settings: oneshot::Receiver<()>,
    /// The connection accepts no new calls, and why.
    pub(crate) going_away: oneshot::Receiver<String>,
    /// The first write error. Later writes are discarded and reported as successful.
    pub(crate) write_failed: oneshot::Receiver<String>,
}

impl<T> MonitoredIo<T> {
    pub(super) fn new(
        io: T,
        state: Arc<ConnectionState>,
        ping_interval: PingInterval,
    ) -> (Self, IoEvents) {
        let (settings_tx, settings) = oneshot::channel();
        let (going_away_tx, going_away) = oneshot::channel();
        let (write_failed_tx, write_failed) = oneshot::channel();
        let monitored = Self {
            io,
            scanner: Scanner::default(),
            settings: Some(settings_tx),
            going_away: Some(going_away_tx),
            write_failed: Some(write_failed_tx),
            has_go_away: false,
            held: None,
            written: WrittenStreams::new(),
            blocked: None,
            last_ended: 0,
            ping_interval,
            state,
        };
        let events = IoEvents {
            settings,
            going_away,
            write_failed,
        };
        (monitored, events)
    }

    /// Returns whether the first GOAWAY was found.
    fn on_read(&mut self, bytes: &[u8]) -> bool {
        // h2 asks for more only after it has parsed all frames that it has got.
        let limits = &self.state.header_limits;
        if limits.is_reading_large() && !self.scanner.is_within_large_headers() {
            limits.record_large_read();
        }
        let had_go_away = self.has_go_away;
        let has_go_away = &mut self.has_go_away;
        let (settings, going_away) = (&mut self.settings, &mut self.going_away);
        let (last_ended, ping_interval) = (&mut self.last_ended, &self.ping_interval);
        let state = &self.state;
        self.scanner.scan(bytes, |frame| match frame {
            Frame::Headers => {
                // Headers before any call of ours show no server that serves calls.
                if state.is_written(FIRST_STREAM) {
                    state.record_served();
                }
                state.record_data();
            }
            Frame::Data => state.record_data(),
            // A server that does not wait for the end of a request sends RST_STREAM after its
            // response.
            Frame::StreamEnd(stream) if std::mem::replace(last_ended, stream) != stream => {
                state.record_stream_end(stream);
            }
            Frame::LargeHeaders {
                stream,
                ends_stream,
            } => state.header_limits.record_large(stream, ends_stream),
            Frame::Settings(sent) => {
                if let Some(limit) = sent.max_header_list_size {
                    state.header_limits.set_peer(limit);
                }
                notify(settings, || ());
            }
            Frame::GoAway(go_away) => {
                *has_go_away = true;
                state.first_response.record_close(true);
                state.record_go_away(go_away.last_stream);
                state.record_accepted(go_away.last_stream);
                let text = match ping_interval.on_go_away(&go_away) {
                    Some(advice) => format!("{go_away}; {advice}"),
                    None => go_away.to_string(),
                };
                // Calls that fail afterwards are told this cause.
                if go_away.code == h2::Reason::NO_ERROR {
                    state.close_reason.set_graceful(text.clone());
                } else {
                    state.close_reason.set(|| text.clone());
                }
                state.stop_accepting();
                notify(going_away, || text);
            }
            _ => {}
        });
        self.has_go_away && !had_go_away
    }

    fn on_written(&mut self, bytes: &[u8]) {
        if let Some(stream) = self.written.scan(bytes) {
            self.state.record_written(stream);
        }
    }

    /// Runs a write or a flush. After the first write error, and after the end of the peer's bytes,
    /// no more are run, and `complete`, the result of a successful one, is returned instead. Calls
    /// that were not written before are then known to be unsent.
    ///
    /// A write that succeeds after one that found no room is a sign of life: the peer has taken
    /// bytes. Other writes are none, because the bytes may only have gone to a buffer. Therefore
    /// only a flush ends the wait of a flush, unless the buffer was full in the meantime.
    fn on_write<V>(
        &mut self,
        cx: &mut Context<'_>,
        operation: Operation,
        write: impl FnOnce(&mut Self, &mut Context<'_>) -> Poll<io::Result<V>>,
        complete: V,
    ) -> Poll<io::Result<V>> {
        if self.state.has_stopped_writing() || self.write_failed.is_none() {
            return Poll::Ready(Ok(complete));
        }
        match write(self, cx) {
            Poll::Ready(Err(error)) => {
                self.state.stop_writing();
                self.state.stop_accepting();
                notify(&mut self.going_away, || format!("connection lost: {error}"));
                notify(&mut self.write_failed, || error.to_string());
                Poll::Ready(Ok(complete))
            }
            Poll::Ready(Ok(done)) => {
                let ends_wait = |blocked: &mut Blocked| {
                    operation == Operation::Flush || blocked.by == Operation::Write
                };
                if let Some(blocked) = self.blocked.take_if(ends_wait) {
                    self.state.record_activity();
                    self.state.record_write_wait(blocked.since.elapsed());
                    // h2 has written its requests and may read the GOAWAY now.
                    if self.held.is_some() {
                        cx.waker().wake_by_ref();
                    }
                }
                Poll::Ready(Ok(done))
            }
            Poll::Pending => {
                let blocked = self.blocked.get_or_insert_with(|| Blocked {
                    since: Instant::now(),
                    by: operation,
                });
                if operation == Operation::Write {
                    blocked.by = Operation::Write;
                }
                Poll::Pending
            }
        }
    }
}

/// Sends an event once. The receiver may have been dropped, when nobody waits for the event any
/// more.
fn notify<V>(sender: &mut Option<oneshot::Sender<V>>, event: impl FnOnce() -> V) {
    if let Some(sender) = sender.take() {
        let _ = sender.send(event());
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for MonitoredIo<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if let Some(held) = &mut this.held {
            let polled = held.poll(cx, buf, &this.state, this.blocked.is_some());
            if held.is_empty() {
                this.held = None;
            }
            return polled.map(Ok);
        }
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = result {
            let read = &buf.filled()[before..];
            if !read.is_empty() {
                self.state.record_activity();
                self.state.forget_write_waits();
            } else if buf.remaining() > 0 {
                self.state
                    .close_reason
                    .set(|| "closed by the peer".to_owned());
                self.state.first_response.record_close(self.has_go_away);
                self.state.stop_writing();
            }
            if self.on_read(read) {
                self.held = Some(HeldRead::take(buf, before, &self.state));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        if let Poll::Ready(Err(error)) = &result {
            self.state.close_reason.set(|| error.to_string());
            self.state.stop_writing();
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for MonitoredIo<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let write = |this: &mut Self, cx: &mut Context<'_>| {
            let written = Pin::new(&mut this.io).poll_write(cx, buf);
            if let Poll::Ready(Ok(count)) = written {
                this.on_written(&buf[..count]);
            }
            written
        };
        self.on_write(cx, Operation::Write, write, buf.len())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flush = |this: &mut Self, cx: &mut Context<'_>| Pin::new(&mut this.io).poll_flush(cx);
        self.on_write(cx, Operation::Flush, flush, ())
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        let write = |this: &mut Self, cx: &mut Context<'_>| {
            let written = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
            if let Poll::Ready(Ok(count)) = written {
                let mut left = count;
                for buf in bufs {
                    let taken = left.min(buf.len());
                    this.on_written(&buf[..taken]);
                    left -= taken;
                }
            }
            written
        };
        self.on_write(cx, Operation::Write, write, length)
    }
}
