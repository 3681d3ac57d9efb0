//! Listening in on a connection for the two frames that h2 keeps to itself.
//!
//! SETTINGS is the first thing an HTTP/2 server says: until it came, nobody has shown to be there,
//! whatever the socket's state. GOAWAY says that no new call will be taken, and h2 tells of
//! it when the next call comes, which on an idle connection is too late.
//!
//! It also reads to its end what a peer has sent before it went: h2 writes before it reads, and gives up
//! a connection that cannot be written to, with the last answers and a GOAWAY still unread.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use super::state::Shared;

/// Length, type, flags and stream of a frame (RFC 9113, section 4.1).
const HEADER: usize = 9;
const SETTINGS: u8 = 0x4;
const GOAWAY: u8 = 0x7;

/// Finds frames in a stream of bytes that arrives in any pieces.
#[derive(Debug, Default)]
struct Scanner {
    header: [u8; HEADER],
    have: usize,
    payload_left: usize,
}

impl Scanner {
    /// Calls `found` with the type of each frame whose header ends in `bytes`.
    fn scan(&mut self, mut bytes: &[u8], mut found: impl FnMut(u8)) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let skipped = self.payload_left.min(bytes.len());
                self.payload_left -= skipped;
                bytes = &bytes[skipped..];
                continue;
            }
            let taken = (HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == HEADER {
                let [a, b, c, kind, ..] = self.header;
                self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
                self.have = 0;
                found(kind);
            }
        }
    }
}

/// An I/O that tells when the peer sent its first SETTINGS, when it sent GOAWAY, and when it cannot be
/// written to any more.
#[derive(Debug)]
pub(crate) struct Observed<T> {
    io: T,
    scanner: Scanner,
    settings: Option<oneshot::Sender<()>>,
    leaving: Option<oneshot::Sender<String>>,
    broken: Option<oneshot::Sender<String>>,
    shared: Arc<Shared>,
}

/// The other end of an [`Observed`].
#[derive(Debug)]
pub(crate) struct Observer {
    pub(crate) settings: oneshot::Receiver<()>,
    /// Why no new call may be sent.
    pub(crate) leaving: oneshot::Receiver<String>,
    /// Why nothing can be written. What is written from then on is thrown away.
    pub(crate) broken: oneshot::Receiver<String>,
}

impl<T> Observed<T> {
    pub(crate) fn new(io: T, shared: Arc<Shared>) -> (Self, Observer) {
        let (settings, settings_seen) = oneshot::channel();
        let (leaving, leaving_seen) = oneshot::channel();
        let (broken, broken_seen) = oneshot::channel();
        let observed = Self {
            io,
            scanner: Scanner::default(),
            settings: Some(settings),
            leaving: Some(leaving),
            broken: Some(broken),
            shared,
        };
        let observer = Observer {
            settings: settings_seen,
            leaving: leaving_seen,
            broken: broken_seen,
        };
        (observed, observer)
    }

    fn saw(&mut self, bytes: &[u8]) {
        // After GOAWAY there is nothing left to wait for.
        if self.leaving.is_none() {
            return;
        }
        let (settings, leaving) = (&mut self.settings, &mut self.leaving);
        let shared = &self.shared;
        self.scanner.scan(bytes, |kind| match kind {
            SETTINGS => tell(settings, || ()),
            GOAWAY => {
                shared.shut();
                tell(leaving, || {
                    "the server is shutting down (GOAWAY)".to_owned()
                });
            }
            _ => {}
        });
    }

    /// The result of a write; once one has failed, all of it is as good as written.
    fn written<V>(
        &mut self,
        write: impl FnOnce(&mut Self) -> Poll<io::Result<V>>,
        all: V,
    ) -> Poll<io::Result<V>> {
        if self.broken.is_none() {
            return Poll::Ready(Ok(all));
        }
        match write(self) {
            Poll::Ready(Err(error)) => {
                self.shared.shut();
                tell(&mut self.leaving, || format!("connection lost: {error}"));
                tell(&mut self.broken, || error.to_string());
                Poll::Ready(Ok(all))
            }
            other => other,
        }
    }
}

fn tell<V>(whom: &mut Option<oneshot::Sender<V>>, what: impl FnOnce() -> V) {
    if let Some(whom) = whom.take() {
        // Nobody may be there to hear it any more.
        let _ = whom.send(what());
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Observed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        if let Poll::Ready(Ok(())) = result {
            let read = &buf.filled()[before..];
            if !read.is_empty() {
                self.shared.heard();
            } else if buf.remaining() > 0 {
                self.shared.ending.set(|| "closed by the peer".to_owned());
            }
            self.saw(read);
        }
        if let Poll::Ready(Err(error)) = &result {
            self.shared.ending.set(|| error.to_string());
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Observed<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.written(|this| Pin::new(&mut this.io).poll_write(cx, buf), buf.len())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.written(|this| Pin::new(&mut this.io).poll_flush(cx), ())
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
        let all = bufs.iter().map(|buf| buf.len()).sum();
        self.written(
            |this| Pin::new(&mut this.io).poll_write_vectored(cx, bufs),
            all,
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_are_found_however_the_bytes_are_cut(
            frames in proptest::collection::vec((0u8..10, 0usize..300), 0..20),
            cuts in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let mut bytes = Vec::new();
            for (kind, length) in &frames {
                let [_, a, b, c] = (*length as u32).to_be_bytes();
                bytes.extend([a, b, c, *kind, 0, 0, 0, 0, 1]);
                // Payloads full of what looks like a type.
                bytes.extend(std::iter::repeat_n(GOAWAY, *length));
            }
            let mut scanner = Scanner::default();
            let mut found = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                scanner.scan(piece, |kind| found.push(kind));
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let kinds: Vec<u8> = frames.iter().map(|(kind, _)| *kind).collect();
            prop_assert_eq!(found, kinds);
        }
    }
}
