//! I/O with faults.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// The direction of an access to a connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Access {
    Read,
    Write,
}

/// A TCP connection that asks a closure before each read and write, which fail with the closure's
/// error.
pub struct FaultyTcp<F> {
    tcp: TcpStream,
    check: F,
}

impl<F: Fn(Access) -> io::Result<()>> FaultyTcp<F> {
    pub fn new(tcp: TcpStream, check: F) -> Self {
        Self { tcp, check }
    }
}

impl<F: Fn(Access) -> io::Result<()> + Unpin> AsyncRead for FaultyTcp<F> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        (self.check)(Access::Read)?;
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl<F: Fn(Access) -> io::Result<()> + Unpin> AsyncWrite for FaultyTcp<F> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        (self.check)(Access::Write)?;
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
