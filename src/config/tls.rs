//! TLS settings.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::{redact, secret};

/// TLS settings for connections to etcd, or to the servers of a channel.
///
/// Certificates and keys are PEM, either in a file or inline. With `ca_file` or `ca_pem` only these
/// authorities are trusted, otherwise the system's root certificates. A client certificate and its
/// key enable mutual TLS.
///
/// Files are read once, when a client connects or a channel is built. `Debug` shows no key
/// material.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TlsConfig {
    /// The file with the authorities to trust. Default: none.
    pub ca_file: Option<PathBuf>,
    /// The file with the client's certificate chain. Default: none. Requires a key.
    pub cert_file: Option<PathBuf>,
    /// The file with the key of the client certificate. Default: none. Requires a certificate.
    pub key_file: Option<PathBuf>,
    /// The name that the server's certificate must have. Default: the endpoint's host.
    pub server_name: Option<String>,
    /// Inline PEM instead of `ca_file`.
    #[serde(deserialize_with = "secret::ca_pem")]
    pub ca_pem: Option<String>,
    /// Inline PEM instead of `cert_file`.
    #[serde(deserialize_with = "secret::cert_pem")]
    pub cert_pem: Option<String>,
    /// Inline PEM instead of `key_file`.
    #[serde(deserialize_with = "secret::key_pem")]
    pub key_pem: Option<String>,
}

impl TlsConfig {
    /// Settings that trust the system's root certificates and have no client certificate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts only the authorities in this PEM file.
    #[must_use]
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(file.into());
        self
    }

    /// Sets the client's certificate chain, a PEM file.
    #[must_use]
    pub fn cert_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.cert_file = Some(file.into());
        self
    }

    /// Sets the key of the client certificate, a PEM file.
    #[must_use]
    pub fn key_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.key_file = Some(file.into());
        self
    }

    /// Sets the name that the server's certificate must have. Default: the endpoint's host.
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Trusts only these authorities, given as PEM.
    #[must_use]
    pub fn ca_pem(mut self, pem: impl Into<String>) -> Self {
        self.ca_pem = Some(pem.into());
        self
    }

    /// Sets the client's certificate chain, given as PEM.
    #[must_use]
    pub fn cert_pem(mut self, pem: impl Into<String>) -> Self {
        self.cert_pem = Some(pem.into());
        self
    }

    /// Sets the key of the client certificate, given as PEM.
    #[must_use]
    pub fn key_pem(mut self, pem: impl Into<String>) -> Self {
        self.key_pem = Some(pem.into());
        self
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsConfig")
            .field("ca_file", &self.ca_file)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .field("server_name", &self.server_name)
            .field("ca_pem", &redact(&self.ca_pem))
            .field("cert_pem", &redact(&self.cert_pem))
            .field("key_pem", &redact(&self.key_pem))
            .finish()
    }
}
