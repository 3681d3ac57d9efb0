//! The handshake, with rustls.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::ServerName;

use super::certificates::{client_certificate, roots};
use super::failure::{describe_handshake, supports_p521};
use crate::balance::connection::target::Target;
use crate::config::TlsConfig;
use crate::error::{Error, Result};

/// HTTP/2's name in the TLS handshake.
const ALPN: &[u8] = b"h2";

/// A TLS configuration, checked and loaded.
pub(crate) struct Tls {
    connector: TlsConnector,
    server_name: Option<ServerName<'static>>,
    supports_p521: bool,
}

impl Tls {
    pub(crate) fn new(config: &TlsConfig) -> Result<Self> {
        let provider = provider();
        let supports_p521 = supports_p521(&provider);
        let certificate = client_certificate(config, &provider)?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::invalid("tls", "protocol versions", error.to_string()))?
            .with_root_certificates(roots(config)?);
        let mut rustls = match certificate {
            None => builder.with_no_client_auth(),
            Some(certificate) => builder.with_client_cert_resolver(certificate),
        };
        rustls.alpn_protocols = vec![ALPN.to_vec()];
        let server_name = config
            .server_name
            .clone()
            .map(|name| {
                ServerName::try_from(name.clone()).map_err(|error| {
                    Error::invalid("tls_config.server_name", name, error.to_string())
                })
            })
            .transpose()?;
        Ok(Self {
            connector: TlsConnector::from(Arc::new(rustls)),
            server_name,
            supports_p521,
        })
    }

    pub(crate) async fn secure<T>(&self, target: &Target, io: T) -> Result<TlsStream<T>, String>
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let name = match &self.server_name {
            Some(name) => name.clone(),
            None => {
                let host = target.authority.host();
                // A URI puts an IPv6 address in brackets; a certificate does not.
                let host = host.trim_start_matches('[').trim_end_matches(']');
                ServerName::try_from(host.to_owned())
                    .map_err(|error| format!("{host:?} is not a server name: {error}"))?
            }
        };
        let stream = self
            .connector
            .connect(name, io)
            .await
            .map_err(|error| describe_handshake(&error, self.supports_p521))?;
        if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
            return Err("the server does not speak HTTP/2 (it did not choose \"h2\")".into());
        }
        Ok(stream)
    }
}

/// The program's default provider if it has installed one, else ring if that backend is enabled
/// (both backends may be), else aws-lc.
fn provider() -> Arc<CryptoProvider> {
    if let Some(chosen) = CryptoProvider::get_default() {
        return Arc::clone(chosen);
    }
    #[cfg(feature = "tls-ring")]
    let provider = tokio_rustls::rustls::crypto::ring::default_provider();
    #[cfg(not(feature = "tls-ring"))]
    let provider = tokio_rustls::rustls::crypto::aws_lc_rs::default_provider();
    Arc::new(provider)
}
