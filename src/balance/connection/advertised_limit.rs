//! Telling the peer another limit of headers than h2 enforces.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frames::{HEADER, MAX_HEADER_LIST_SIZE, SETTINGS};

/// The bytes that a client sends before its first frame (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// An I/O of a client that replaces `SETTINGS_MAX_HEADER_LIST_SIZE` in its SETTINGS.
///
/// The client's preface and its SETTINGS, which are the first that a client sends, are held until
/// they are complete. Everything after that passes through.
#[derive(Debug)]
pub(super) struct AdvertisedLimit<T> {
    io: T,
    limit: u32,
    first: First,
}

/// The preface and the SETTINGS.
#[derive(Debug)]
enum First {
    /// The bytes so far.
    Held(Vec<u8>),
    /// All bytes, and how many of them are written.
    Writing(Vec<u8>, usize),
    Written,
}

impl<T> AdvertisedLimit<T> {
    pub(super) fn new(io: T, limit: u32) -> Self {
        Self {
            io,
            limit,
            first: First::Held(Vec::with_capacity(PREFACE.len() + 2 * HEADER + 6 * 6)),
        }
    }

    /// Takes bytes until the first frame is complete. Returns how many were taken.
    fn hold(&mut self, bytes: &[u8]) -> usize {
        let First::Held(held) = &mut self.first else {
            return 0;
        };
        let mut taken = 0;
        loop {
            let missing = first_length(held).saturating_sub(held.len());
            if missing == 0 {
                let mut first = std::mem::take(held);
                replace(&mut first, self.limit);
                self.first = First::Writing(first, 0);
                return taken;
            }
            let piece = &bytes[taken..bytes.len().min(taken + missing)];
            if piece.is_empty() {
                return taken;
            }
            held.extend_from_slice(piece);
            taken += piece.len();
        }
    }
}

/// The length of the preface and the first frame, as far as these bytes tell.
fn first_length(bytes: &[u8]) -> usize {
    let header = PREFACE.len() + HEADER;
    match bytes.get(PREFACE.len()..header) {
        Some(&[a, b, c, ..]) => header + u32::from_be_bytes([0, a, b, c]) as usize,
        _ => header,
    }
}

/// Replaces the limit in the preface and SETTINGS.
fn replace(first: &mut [u8], limit: u32) {
    if !first.starts_with(PREFACE) || first[PREFACE.len() + 3] != SETTINGS {
        return;
    }
    for setting in first[PREFACE.len() + HEADER..].chunks_exact_mut(6) {
        if setting[..2] == MAX_HEADER_LIST_SIZE.to_be_bytes() {
            setting[2..].copy_from_slice(&limit.to_be_bytes());
        }
    }
}

impl<T: AsyncWrite + Unpin> AdvertisedLimit<T> {
    /// Writes the preface and SETTINGS if they are complete.
    fn poll_write_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let First::Writing(first, written) = &mut self.first {
            while *written < first.len() {
                let count = ready!(Pin::new(&mut self.io).poll_write(cx, &first[*written..]))?;
                if count == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                *written += count;
            }
            self.first = First::Written;
        }
        Poll::Ready(Ok(()))
    }

    /// Handles a write while the preface or SETTINGS are not written. `None` afterwards.
    fn poll_first(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Option<Poll<io::Result<usize>>> {
        match &self.first {
            First::Written => None,
            First::Held(_) => Some(Poll::Ready(Ok(self.hold(bytes)))),
            First::Writing(..) => match self.poll_write_first(cx) {
                Poll::Ready(Ok(())) => None,
                Poll::Ready(Err(error)) => Some(Poll::Ready(Err(error))),
                Poll::Pending => Some(Poll::Pending),
            },
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for AdvertisedLimit<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.poll_first(cx, buf) {
            Some(polled) => polled,
            None => Pin::new(&mut self.io).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_first(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_write_first(cx))?;
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
        let bytes = bufs.iter().find(|buf| !buf.is_empty());
        match self.poll_first(cx, bytes.map_or(&[], |buf| buf)) {
            Some(polled) => polled,
            None => Pin::new(&mut self.io).poll_write_vectored(cx, bufs),
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for AdvertisedLimit<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    /// The preface, SETTINGS with this limit, and two more bytes.
    fn bytes(limit: u32) -> Vec<u8> {
        let mut bytes = PREFACE.to_vec();
        bytes.extend([0, 0, 18, SETTINGS, 0, 0, 0, 0, 0]);
        bytes.extend([0, 2, 0, 0, 0, 0]);
        bytes.extend([0, 6]);
        bytes.extend(limit.to_be_bytes());
        bytes.extend([0, 5, 0, 0, 0x40, 0]);
        bytes.extend([7, 8]);
        bytes
    }

    async fn received(mut peer: DuplexStream) -> Vec<u8> {
        let mut received = Vec::new();
        peer.read_to_end(&mut received).await.unwrap();
        received
    }

    #[tokio::test]
    async fn limit_is_replaced_in_writes_of_any_size() {
        for size in 1..=bytes(0).len() {
            // The pipe has room for less than the first frame.
            let (io, peer) = tokio::io::duplex(10);
            let mut io = AdvertisedLimit::new(io, 77);
            let writing = async {
                for piece in bytes(1 << 20).chunks(size) {
                    io.write_all(piece).await.unwrap();
                    io.flush().await.unwrap();
                }
                drop(io);
            };
            let ((), received) = tokio::join!(writing, received(peer));
            assert_eq!(received, bytes(77), "{size}");
        }
    }

    #[tokio::test]
    async fn vectored_writes_are_the_same() {
        let (io, peer) = tokio::io::duplex(1024);
        let mut io = AdvertisedLimit::new(io, 77);
        let all = bytes(1 << 20);
        let mut written = 0;
        while written < all.len() {
            let (first, second) = all[written..].split_at(all[written..].len() / 2);
            let bufs = [
                io::IoSlice::new(&[]),
                io::IoSlice::new(first),
                io::IoSlice::new(second),
            ];
            written += io.write_vectored(&bufs).await.unwrap();
        }
        io.flush().await.unwrap();
        drop(io);
        assert_eq!(received(peer).await, bytes(77));
    }

    #[tokio::test]
    async fn flush_writes_what_is_complete() {
        let (io, mut peer) = tokio::io::duplex(1024);
        let mut io = AdvertisedLimit::new(io, 77);
        let all = bytes(1 << 20);
        let first = &all[..all.len() - 2];
        io.write_all(first).await.unwrap();
        io.flush().await.unwrap();
        let mut received = vec![0; first.len()];
        let reading = peer.read_exact(&mut received).now_or_never();
        reading.expect("the first frame is written").unwrap();
    }
}
