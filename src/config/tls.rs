//! Which servers to trust, and which certificate to show them.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::{redacted, secret};

/// TLS towards etcd, or towards the servers of a channel. Every certificate and key is PEM, in a file or inline, not both.
///
/// With neither `ca_file` nor `ca_pem` the system's roots are trusted; with one of them only
/// that authority is. `cert` and `key` together are mutual TLS.
///
/// Files are read once, when a client connects or a channel is built. `Debug` does not show key material.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TlsConfig {
    /// File of the authorities to trust. Default: none.
    pub ca_file: Option<PathBuf>,
    /// File of the client's certificate chain. Default: none. Needs a key.
    pub cert_file: Option<PathBuf>,
    /// File of the client certificate's key. Default: none. Needs a certificate.
    pub key_file: Option<PathBuf>,
    /// The name that the server's certificate must carry. Default: the endpoint's host.
    pub server_name: Option<String>,
    /// Inline PEM in place of `ca_file`.
    #[serde(deserialize_with = "secret::ca_pem")]
    pub ca_pem: Option<String>,
    /// Inline PEM in place of `cert_file`.
    #[serde(deserialize_with = "secret::cert_pem")]
    pub cert_pem: Option<String>,
    /// Inline PEM in place of `key_file`.
    #[serde(deserialize_with = "secret::key_pem")]
    pub key_pem: Option<String>,
}

impl TlsConfig {
    /// What a PEM field holds, from its file or inline.
    #[cfg(feature = "_tls")]
    pub(crate) fn pem(
        &self,
        field: &'static str,
        file: &Option<PathBuf>,
        inline: &Option<String>,
    ) -> crate::error::Result<Option<Vec<u8>>> {
        match (file, inline) {
            // A few kilobytes once, when a client or a channel is made.
            (Some(file), _) => std::fs::read(file).map(Some).map_err(|error| {
                crate::error::Error::invalid(field, file.display().to_string(), error.to_string())
            }),
            (None, inline) => Ok(inline.clone().map(String::into_bytes)),
        }
    }

    /// Trusts the system's roots, shows no certificate.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the authorities in this PEM file, and only them.
    #[must_use]
    pub fn ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(file.into());
        self
    }

    /// Shows the certificate chain in this PEM file.
    #[must_use]
    pub fn cert_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.cert_file = Some(file.into());
        self
    }

    /// The key of that certificate, a PEM file.
    #[must_use]
    pub fn key_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.key_file = Some(file.into());
        self
    }

    /// The name that the server's certificate must carry, instead of the endpoint's host.
    #[must_use]
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Trusts these authorities, and only them.
    #[must_use]
    pub fn ca_pem(mut self, pem: impl Into<String>) -> Self {
        self.ca_pem = Some(pem.into());
        self
    }

    /// Shows this certificate chain.
    #[must_use]
    pub fn cert_pem(mut self, pem: impl Into<String>) -> Self {
        self.cert_pem = Some(pem.into());
        self
    }

    /// The key of that certificate.
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
            .field("ca_pem", &redacted(&self.ca_pem))
            .field("cert_pem", &redacted(&self.cert_pem))
            .field("key_pem", &redacted(&self.key_pem))
            .finish()
    }
}
