//! The byte stream under a connection.

use tokio::io::{AsyncRead, AsyncWrite};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A byte stream to and from a peer.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub(crate) type BoxIo = Box<dyn Io>;
