//! The I/O of a connector that the user of the channel provides.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::panics;

/// Turns a panic of `I` into an error, after which `I` is not used any more.
///
/// h2 holds a lock while it writes. A panic would poison the lock, and each call that still uses
/// the connection would then panic as well.
pub(crate) struct CustomIo<I> {
    io: I,
    /// The text of the panic.
    panicked: Option<String>,
}

impl<I: Unpin> CustomIo<I> {
    pub(crate) fn new(io: I) -> Self {
        Self { io, panicked: None }
    }

    fn poll<T>(
        &mut self,
        poll: impl FnOnce(Pin<&mut I>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if let Some(text) = &self.panicked {
            return Poll::Ready(Err(panicked(text)));
        }
        let io = Pin::new(&mut self.io);
        catch_unwind(AssertUnwindSafe(|| poll(io))).unwrap_or_else(|payload| {
            let text = self.panicked.insert(panics::text(&*payload));
            Poll::Ready(Err(panicked(text)))
        })
    }
}

fn panicked(text: &str) -> io::Error {
    io::Error::other(format!("the connector's I/O panicked: {text}"))
}

impl<I: AsyncRead + Unpin> AsyncRead for CustomIo<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll(|io| io.poll_read(cx, buf))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for CustomIo<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(|io| io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(|io| io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|io| io.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll(|io| io.poll_shutdown(cx))
    }
}
