//! Explains failures of TLS: which certificate or key cannot work, and the remedy.

use std::io;

use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error, SignatureScheme};

use crate::error::chain;

/// The object identifier of the curve P-521 (`secp521r1`, 1.3.132.0.35), as certificates and keys
/// contain it.
const P521: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x23];

/// The remedy for P-521, which ring does not support.
pub(super) const P521_ADVICE: &str = "ring supports no P-521 keys; use the cargo feature \
    `tls-aws-lc` of goo-etcd instead of `tls-ring`";

/// The remedy for `CaUsedAsEndEntity`. Such a certificate often comes from `openssl req -x509`.
const SELF_SIGNED_ADVICE: &str = "the server uses an authority's own certificate; a server needs \
    one with the basic constraint CA:FALSE and its host as subjectAltName, self-signed or signed \
    by the authority";

/// Whether a key or certificate in DER names the curve P-521.
pub(super) fn is_p521(der: &[u8]) -> bool {
    der.windows(P521.len()).any(|window| window == P521)
}

/// Whether handshakes can use P-521.
pub(super) fn supports_p521(provider: &CryptoProvider) -> bool {
    let schemes = provider
        .signature_verification_algorithms
        .supported_schemes();
    schemes.contains(&SignatureScheme::ECDSA_NISTP521_SHA512)
}

/// Why a handshake failed, with the remedy if there is one.
pub(super) fn describe_handshake(error: &io::Error, supports_p521: bool) -> String {
    let text = chain(error);
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    match inner.and_then(|inner| advice(inner, supports_p521)) {
        Some(advice) => format!("{text}: {advice}"),
        None => text,
    }
}

fn advice(error: &Error, supports_p521: bool) -> Option<String> {
    match error {
        // Only the text of the error shows which one it is.
        Error::InvalidCertificate(CertificateError::Other(other))
            if format!("{other:?}").contains("CaUsedAsEndEntity") =>
        {
            Some(SELF_SIGNED_ADVICE.to_owned())
        }
        Error::InvalidCertificate(
            CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext {
                public_key_algorithm_id,
                ..
            },
        ) if !supports_p521 && is_p521(public_key_algorithm_id) => Some(P521_ADVICE.to_owned()),
        // A server sends the alert if it has no certificate of a kind that this client offers.
        Error::AlertReceived(AlertDescription::HandshakeFailure)
        | Error::InvalidCertificate(CertificateError::UnsupportedSignatureAlgorithmContext {
            ..
        }) if !supports_p521 => Some(format!("if a key of the server is P-521: {P521_ADVICE}")),
        _ => None,
    }
}

/// Why a certificate from a file cannot be used. rustls calls it the peer's.
pub(super) fn describe_certificate(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::BadEncoding) => {
            "not a valid X.509 certificate".to_owned()
        }
        Error::InvalidCertificate(cause) => cause.to_string(),
        other => other.to_string(),
    }
}
