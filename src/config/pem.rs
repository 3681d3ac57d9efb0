//! The PEM texts of a TLS configuration, with the names of their fields for errors.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::tls::TlsConfig;
use crate::error::{Error, Result};

/// A PEM setting of a [`TlsConfig`], from a file or inline.
pub(crate) enum Pem<'a> {
    File(&'static str, &'a Path),
    Inline(&'static str, &'a str),
}

impl TlsConfig {
    /// The authorities to trust. `None`: the system's.
    pub(crate) fn ca(&self) -> Option<Pem<'_>> {
        Pem::of(
            ("tls_config.ca_file", &self.ca_file),
            ("tls_config.ca_pem", &self.ca_pem),
        )
    }

    /// The client's certificate chain.
    pub(crate) fn cert(&self) -> Option<Pem<'_>> {
        Pem::of(
            ("tls_config.cert_file", &self.cert_file),
            ("tls_config.cert_pem", &self.cert_pem),
        )
    }

    /// The key of the client's certificate.
    pub(crate) fn key(&self) -> Option<Pem<'_>> {
        Pem::of(
            ("tls_config.key_file", &self.key_file),
            ("tls_config.key_pem", &self.key_pem),
        )
    }
}

impl<'a> Pem<'a> {
    fn of(
        (file_field, file): (&'static str, &'a Option<PathBuf>),
        (inline_field, inline): (&'static str, &'a Option<String>),
    ) -> Option<Self> {
        match (file, inline) {
            (Some(file), _) => Some(Self::File(file_field, file)),
            (None, Some(inline)) => Some(Self::Inline(inline_field, inline)),
            (None, None) => None,
        }
    }

    /// Reads the PEM text. A file is some kilobytes, and read once when a client or a channel is
    /// built, so the read may block.
    pub(crate) fn read(&self) -> Result<Cow<'a, [u8]>> {
        match self {
            Self::File(_, file) => std::fs::read(file)
                .map(Cow::Owned)
                .map_err(|error| self.invalid(error.to_string())),
            Self::Inline(_, text) => Ok(Cow::Borrowed(text.as_bytes())),
        }
    }

    /// The error for a setting that cannot be used, with the field's name and, for a file, its
    /// path.
    pub(crate) fn invalid(&self, reason: impl Into<String>) -> Error {
        match self {
            Self::File(field, file) => Error::invalid(field, file.display().to_string(), reason),
            Self::Inline(field, _) => Error::invalid(field, "[redacted]", reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field_that_is_set() {
        let tls = TlsConfig::new()
            .ca_file("/no/such/file.pem")
            .key_pem("SECRET");
        let error = tls.ca().unwrap().read().unwrap_err().to_string();
        let expected = "invalid tls_config.ca_file \"/no/such/file.pem\"";
        assert!(error.starts_with(expected), "{error}");
        let error = tls.key().unwrap().invalid("no PEM").to_string();
        assert_eq!(error, "invalid tls_config.key_pem \"[redacted]\": no PEM");
        assert!(tls.cert().is_none());
    }

    #[test]
    fn inline_text_is_read_as_it_is() {
        let tls = TlsConfig::new().ca_pem("CERT");
        assert_eq!(*tls.ca().unwrap().read().unwrap(), *b"CERT");
    }
}
