//! TLS for the connections of a channel.
//!
//! - `with_rustls`: the handshake, or `without` in a build without TLS.
//! - `certificates`: the certificates and keys of a configuration.
//! - `failure`: the causes of failures, and their remedies.

#[cfg(feature = "_tls")]
mod certificates;
#[cfg(feature = "_tls")]
mod failure;
#[cfg(feature = "_tls")]
mod with_rustls;
#[cfg(not(feature = "_tls"))]
mod without;

#[cfg(feature = "_tls")]
pub(crate) use with_rustls::Tls;
#[cfg(not(feature = "_tls"))]
pub(crate) use without::Tls;
