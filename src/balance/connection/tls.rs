//! TLS for the connections of a channel.

#[cfg(feature = "_tls")]
pub(crate) use with_rustls::Tls;

#[cfg(not(feature = "_tls"))]
pub(crate) use without::Tls;

#[cfg(feature = "_tls")]
mod with_rustls {
    use std::sync::Arc;

    use tokio::io::{AsyncRead, AsyncWrite};
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};

    use super::super::target::Target;
    use crate::config::{Pem, TlsConfig};
    use crate::error::chain;
    use crate::error::{Error, Result};

    /// HTTP/2's name in the TLS handshake.
    const ALPN: &[u8] = b"h2";

    /// A TLS configuration, checked and loaded.
    pub(crate) struct Tls {
        connector: TlsConnector,
        server_name: Option<ServerName<'static>>,
    }

    impl Tls {
        pub(crate) fn new(config: &TlsConfig) -> Result<Self> {
            let builder = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .map_err(|error| Error::invalid("tls", "protocol versions", error.to_string()))?
                .with_root_certificates(roots(config)?);
            let mut rustls = match (config.cert(), config.key()) {
                (None, None) => builder.with_no_client_auth(),
                (Some(cert), Some(key)) => builder
                    .with_client_auth_cert(cert_chain(&cert)?, private_key(&key)?)
                    .map_err(|error| cert.invalid(error.to_string()))?,
                (Some(cert), None) => return Err(cert.invalid("a certificate needs its key")),
                (None, Some(key)) => return Err(key.invalid("a key needs its certificate")),
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
                .map_err(|error| chain(&error))?;
            if stream.get_ref().1.alpn_protocol() != Some(ALPN) {
                return Err("the server does not speak HTTP/2 (it did not choose \"h2\")".into());
            }
            Ok(stream)
        }
    }

    fn cert_chain(pem: &Pem<'_>) -> Result<Vec<CertificateDer<'static>>> {
        CertificateDer::pem_slice_iter(&pem.read()?)
            .collect::<Result<_, _>>()
            .map_err(|error| pem.invalid(error.to_string()))
    }

    fn private_key(pem: &Pem<'_>) -> Result<PrivateKeyDer<'static>> {
        PrivateKeyDer::from_pem_slice(&pem.read()?).map_err(|error| pem.invalid(error.to_string()))
    }

    /// The program's default provider if it has installed one, else ring if that backend is enabled
    /// (both backends may be), else aws-lc.
    fn provider() -> Arc<tokio_rustls::rustls::crypto::CryptoProvider> {
        if let Some(chosen) = tokio_rustls::rustls::crypto::CryptoProvider::get_default() {
            return Arc::clone(chosen);
        }
        #[cfg(feature = "tls-ring")]
        let provider = tokio_rustls::rustls::crypto::ring::default_provider();
        #[cfg(not(feature = "tls-ring"))]
        let provider = tokio_rustls::rustls::crypto::aws_lc_rs::default_provider();
        Arc::new(provider)
    }

    fn roots(config: &TlsConfig) -> Result<RootCertStore> {
        let mut roots = RootCertStore::empty();
        if let Some(ca) = config.ca() {
            for certificate in cert_chain(&ca)? {
                roots
                    .add(certificate)
                    .map_err(|error| ca.invalid(error.to_string()))?;
            }
            if roots.is_empty() {
                return Err(ca.invalid("it contains no PEM certificate"));
            }
            return Ok(roots);
        }
        #[cfg(feature = "tls-native-roots")]
        {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                tracing::warn!(%error, "cannot read a root certificate of the system");
            }
            roots.add_parsable_certificates(found.certs);
        }
        #[cfg(feature = "tls-webpki-roots")]
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        if roots.is_empty() {
            return Err(Error::invalid(
                "tls_config.ca_file",
                "none",
                "there are no root certificates; set it, or enable the cargo feature \
                 `tls-native-roots` or `tls-webpki-roots` of goo-etcd",
            ));
        }
        Ok(roots)
    }
}

#[cfg(not(feature = "_tls"))]
mod without {
    use super::super::target::Target;
    use crate::config::TlsConfig;
    use crate::error::{Error, Result};

    /// Has no values, because this build has no TLS.
    pub(crate) enum Tls {}

    impl Tls {
        pub(crate) fn new(_: &TlsConfig) -> Result<Self> {
            Err(Error::invalid(
                "tls",
                "enabled",
                "this build has no TLS; enable the cargo feature `tls`, `tls-ring` or \
                 `tls-aws-lc` of goo-etcd",
            ))
        }

        pub(crate) async fn secure<T>(&self, _: &Target, io: T) -> Result<T, String> {
            let _ = io;
            match *self {}
        }
    }
}
