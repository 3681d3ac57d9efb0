//! The certificates and keys of a configuration.

use std::sync::Arc;

use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{Error as RustlsError, InconsistentKeys, RootCertStore};

use super::failure::{P521_ADVICE, describe_certificate, is_p521, supports_p521};
use crate::config::{Pem, TlsConfig};
use crate::error::{Error, Result};

/// The client's certificate with its key, for mutual TLS.
pub(super) fn client_certificate(
    config: &TlsConfig,
    provider: &CryptoProvider,
) -> Result<Option<Arc<SingleCertAndKey>>> {
    let (cert, key) = match (config.cert(), config.key()) {
        (None, None) => return Ok(None),
        (Some(cert), Some(key)) => (cert, key),
        (Some(cert), None) => return Err(cert.invalid("a certificate needs its key")),
        (None, Some(key)) => return Err(key.invalid("a key needs its certificate")),
    };
    let chain = cert_chain(&cert)?;
    let private_key = private_key(&key)?;
    let is_unsupported = is_p521(private_key.secret_der()) && !supports_p521(provider);
    let loaded = provider.key_provider.load_private_key(private_key);
    let loaded = loaded.map_err(|error| match is_unsupported {
        true => key.invalid(P521_ADVICE),
        false => key.invalid(error.to_string()),
    })?;
    let certified = CertifiedKey::new(chain, loaded);
    match certified.keys_match() {
        // Some keys do not tell their public half.
        Ok(()) | Err(RustlsError::InconsistentKeys(InconsistentKeys::Unknown)) => {}
        Err(RustlsError::InconsistentKeys(_)) => {
            return Err(key.invalid("the key does not belong to the client's certificate"));
        }
        Err(error) => return Err(cert.invalid(describe_certificate(&error))),
    }
    Ok(Some(Arc::new(SingleCertAndKey::from(certified))))
}

/// The certificates of a setting; at least one, and each of them valid X.509.
fn cert_chain(pem: &Pem<'_>) -> Result<Vec<CertificateDer<'static>>> {
    let mut chain = Vec::new();
    for (index, certificate) in CertificateDer::pem_slice_iter(&pem.read()?).enumerate() {
        let invalid = |reason| pem.invalid(format!("certificate {}: {reason}", index + 1));
        let certificate = certificate.map_err(|error| invalid(describe_pem(&error)))?;
        ParsedCertificate::try_from(&certificate)
            .map_err(|error| invalid(describe_certificate(&error)))?;
        chain.push(certificate);
    }
    if chain.is_empty() {
        return Err(pem.invalid("it contains no PEM certificate"));
    }
    Ok(chain)
}

fn private_key(pem: &Pem<'_>) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(&pem.read()?).map_err(|error| {
        pem.invalid(match error {
            pem::Error::NoItemsFound => "it contains no PEM private key".to_owned(),
            error => describe_pem(&error),
        })
    })
}

/// Why a text is not PEM. Shows none of its lines, because a key may be on them.
fn describe_pem(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } | pem::Error::IllegalSectionStart { .. } => {
            "-----BEGIN ...----- or -----END ...----- has no line of its own".to_owned()
        }
        pem::Error::Base64Decode(_) => "not valid base64".to_owned(),
        other => other.to_string(),
    }
}

/// The authorities to trust.
pub(super) fn roots(config: &TlsConfig) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    if let Some(ca) = config.ca() {
        for (index, certificate) in cert_chain(&ca)?.into_iter().enumerate() {
            roots.add(certificate).map_err(|error| {
                let reason = describe_certificate(&error);
                ca.invalid(format!("certificate {}: {reason}", index + 1))
            })?;
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
