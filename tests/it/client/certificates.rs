//! Certificates and keys that cannot work: the errors name the cause and the remedy.

use std::sync::Arc;
use std::time::Duration;

use goo_etcd::{Client, Config, Error, TlsConfig};
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, KeyPair};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::Code;

use crate::support::TestResult;

/// A self-signed certificate with a P-521 key, which rcgen cannot make with ring.
const P521_CERT: &str = include_str!("p521/cert.pem");
const P521_KEY: &str = include_str!("p521/key.pem");

/// A server that completes TLS handshakes and nothing else.
async fn start_server(provider: CryptoProvider, cert: &str, key: &str) -> TestResult<String> {
    let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = listener.local_addr()?.to_string();
    tokio::spawn(async move {
        while let Ok((io, _)) = listener.accept().await {
            let handshake = acceptor.accept(io);
            tokio::spawn(async move {
                if let Ok(io) = handshake.await {
                    serve(io).await;
                }
            });
        }
    });
    Ok(endpoint)
}

/// Responds to each call that it is not implemented.
async fn serve<I>(io: I)
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let Ok(mut connection) = h2::server::handshake(io).await else {
        return;
    };
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        let head = http::Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", (Code::Unimplemented as i32).to_string());
        respond.send_response(head.body(()).unwrap(), true).ok();
    }
}

async fn connect(endpoint: &str, tls: TlsConfig) -> Error {
    let mut config = Config::default();
    config.endpoints = vec![endpoint.to_owned()];
    config.enable_tls = true;
    config.tls_config = Some(tls);
    config.dial_timeout = Duration::from_secs(2);
    Client::connect("main", config).await.unwrap_err()
}

/// The error of a configuration that is refused before anything is sent.
async fn refused(tls: TlsConfig) -> String {
    let error = connect("127.0.0.1:1", tls).await;
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    error.to_string()
}

fn self_signed(is_ca: IsCa) -> TestResult<(Certificate, KeyPair)> {
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    params.is_ca = is_ca;
    let key = KeyPair::generate()?;
    Ok((params.self_signed(&key)?, key))
}

/// `openssl req -x509` makes such certificates, and Go's clients accept them.
#[tokio::test]
async fn authority_as_server_certificate_is_explained() -> TestResult {
    let (cert, key) = self_signed(IsCa::Ca(BasicConstraints::Unconstrained))?;
    let key = key.serialize_pem();
    let endpoint = start_server(ring::default_provider(), &cert.pem(), &key).await?;
    let error = connect(&endpoint, TlsConfig::new().ca_pem(cert.pem())).await;
    let text = error.to_string();
    for part in ["CaUsedAsEndEntity", "CA:FALSE", "subjectAltName"] {
        assert!(text.contains(part), "{part} in {text}");
    }

    // The certificate that the error asks for.
    let (cert, key) = self_signed(IsCa::ExplicitNoCa)?;
    let key = key.serialize_pem();
    let endpoint = start_server(ring::default_provider(), &cert.pem(), &key).await?;
    let error = connect(&endpoint, TlsConfig::new().ca_pem(cert.pem())).await;
    assert_eq!(error.code(), Some(Code::Unimplemented), "{error}");
    Ok(())
}

#[tokio::test]
async fn broken_block_of_an_authority_file() -> TestResult {
    let (cert, _) = self_signed(IsCa::Ca(BasicConstraints::Unconstrained))?;
    let (good, folder) = (cert.pem(), tempfile::tempdir()?);
    let begin = "-----BEGIN CERTIFICATE-----";
    let end = "-----END CERTIFICATE-----";
    for (broken, reason) in [
        (
            format!("{begin}\nAAAA\n{end}\n"),
            "certificate 2: not a valid X.509",
        ),
        (
            format!("{begin}\n{end}\n"),
            "certificate 2: not a valid X.509",
        ),
        (
            format!("{begin}\nA!B\n{end}\n"),
            "certificate 2: not valid base64",
        ),
        (format!("{begin}\nAAAA\n"), "certificate 2: -----BEGIN"),
        (good.replace("\n", " "), "certificate 2: -----BEGIN"),
        (
            good.replacen("M", "A", 1),
            "certificate 2: not a valid X.509",
        ),
    ] {
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, format!("{good}{broken}"))?;
        let text = refused(TlsConfig::new().ca_file(&file)).await;
        assert!(text.starts_with("invalid tls_config.ca_file"), "{text}");
        assert!(text.contains(reason), "{reason} in {text}");
        assert!(!text.contains("peer"), "{text}");
    }
    Ok(())
}

#[tokio::test]
async fn unusable_certificate_of_the_client() -> TestResult {
    let (cert, key) = self_signed(IsCa::NoCa)?;
    let (_, other_key) = self_signed(IsCa::NoCa)?;
    let (cert, key) = (cert.pem(), key.serialize_pem());
    let body = key.lines().nth(1).unwrap_or_default();
    for (cert, key, field, reason) in [
        (
            cert.as_str(),
            other_key.serialize_pem(),
            "key_pem",
            "does not belong",
        ),
        ("", key.clone(), "cert_pem", "no PEM certificate"),
        (&cert, String::new(), "key_pem", "no PEM private key"),
        // From an environment variable that lost its line breaks.
        (
            &cert,
            key.replace('\n', " "),
            "key_pem",
            "no line of its own",
        ),
    ] {
        let tls = TlsConfig::new().cert_pem(cert).key_pem(key);
        let text = refused(tls).await;
        assert!(
            text.starts_with(&format!("invalid tls_config.{field}")),
            "{text}"
        );
        assert!(text.contains(reason), "{reason} in {text}");
        assert!(!text.contains(body), "{text}");
    }
    Ok(())
}

/// ring has no P-521, but etcd's own tools accept such keys.
#[tokio::test]
async fn p521_key_leads_to_tls_aws_lc() -> TestResult {
    // The backend of this crate if none is installed, as other tests do.
    ring::default_provider().install_default().ok();
    let tls = TlsConfig::new().ca_pem(P521_CERT);
    let text = refused(tls.clone().cert_pem(P521_CERT).key_pem(P521_KEY)).await;
    assert!(text.starts_with("invalid tls_config.key_pem"), "{text}");
    assert!(
        text.contains("P-521") && text.contains("`tls-aws-lc`"),
        "{text}"
    );

    #[cfg(feature = "tls-aws-lc")]
    {
        let provider = tokio_rustls::rustls::crypto::aws_lc_rs::default_provider();
        let endpoint = start_server(provider, P521_CERT, P521_KEY).await?;
        let text = connect(&endpoint, tls).await.to_string();
        assert!(
            text.contains("P-521") && text.contains("`tls-aws-lc`"),
            "{text}"
        );
    }
    Ok(())
}
