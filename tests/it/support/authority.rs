//! Certificates for TLS.

use goo_etcd::TlsConfig;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};
use tonic::transport::{Identity, ServerTlsConfig};

/// Chooses a backend for tonic's server, which cannot choose one when both are compiled in.
pub fn choose_backend() {
    #[cfg(all(feature = "tls-ring", feature = "tls-aws-lc"))]
    tokio_rustls::rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
}

/// An authority that signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Different names tell the authorities apart.
        let name = format!("authority {}", fastrand::u64(..));
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// A certificate for these names, and its key.
    pub fn sign(&self, names: &[&str], usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    pub fn server(&self, names: &[&str]) -> ServerTlsConfig {
        let (cert, key) = self.sign(names, ExtendedKeyUsagePurpose::ServerAuth);
        ServerTlsConfig::new().identity(Identity::from_pem(cert, key))
    }

    /// The authority's own certificate.
    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// The settings of a client that trusts this authority.
    pub fn client_tls(&self) -> TlsConfig {
        let mut tls = TlsConfig::new();
        tls.ca_pem = Some(self.0.pem());
        tls
    }
}
