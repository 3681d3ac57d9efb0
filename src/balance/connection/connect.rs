//! The seam between the pool and the network.

use std::future::Future;
use std::time::Duration;

use futures::future::BoxFuture;

use super::carried::Carried;
use super::sender::Sender;
use super::target::Target;

/// Opens connections for the endpoints of a pool.
///
/// The pool is generic over this trait so that unit tests can drive it in paused time with a
/// scripted connector. Calls do not pass through the trait, because [`Sender`] is a concrete type.
pub(crate) trait Connect: Send + Sync + 'static {
    /// Whether connections use TLS.
    fn is_tls(&self) -> bool;

    /// The longest time that one attempt to connect takes.
    fn connect_timeout(&self) -> Duration;

    /// Connects, within the connect timeout. The error says which step failed, without the address.
    fn connect(&self, target: &Target) -> impl Future<Output = Result<Connection, String>> + Send;
}

/// A connection whose peer has sent its HTTP/2 SETTINGS.
pub(crate) struct Connection {
    pub(crate) sender: Sender,
    /// Resolves when the connection accepts no more calls. After it is dropped, calls in flight on
    /// the connection still finish if the peer lets them.
    pub(crate) ended: BoxFuture<'static, Ended>,
}

/// How a connection ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) reason: String,
    pub(crate) carried: Carried,
}
