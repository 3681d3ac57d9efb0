//! TLS to the endpoints: trusted and refused certificates, and the errors.

use std::io;
use std::time::Duration;

use crate::support::authority::{Authority, choose_backend};
use crate::support::balanced::{call, instance, static_channel};
use crate::support::echo::{EchoServer, Options};
use goo_etcd::balance::Source;
use goo_etcd::{BalancedChannel, TlsConfig};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use http::Uri;
use hyper_util::rt::TokioIo;
use rcgen::ExtendedKeyUsagePurpose;
use tonic::Code;
use tonic::transport::{Certificate, ServerTlsConfig};

fn serve(tls: ServerTlsConfig) -> EchoServer {
    choose_backend();
    EchoServer::start_with(Options {
        tls: Some(tls),
        ..Options::default()
    })
}

fn channel(address: &str, tls: TlsConfig) -> BalancedChannel {
    static_channel([address], |builder| {
        builder.tls(tls).ready_timeout(Duration::from_secs(2))
    })
}

/// Asserts that a call fails, and that its error names the address and all `causes`.
async fn assert_refused(server: &EchoServer, channel: &BalancedChannel, causes: &[&str]) {
    let error = call(channel).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    let message = error.message();
    for cause in [&[server.address()], causes].concat() {
        assert!(message.contains(cause), "{cause} in {message}");
    }
    assert_eq!(server.counts().calls(), 0);
}

#[tokio::test]
async fn trusted_certificate_is_accepted() {
    let authority = Authority::new();
    let server = serve(authority.server(&["127.0.0.1"]));
    let channel = channel(server.address(), authority.client_tls());
    assert_eq!(call(&channel).await.unwrap(), server.address());
    let large = EchoRequest {
        payload: vec![1; 3 << 20],
        ..EchoRequest::default()
    };
    EchoClient::new(channel).unary(large).await.unwrap();
}

#[tokio::test]
async fn server_name_is_checked_instead_of_the_address() {
    let authority = Authority::new();
    let server = serve(authority.server(&["echo.internal"]));
    let mut tls = authority.client_tls();
    tls.server_name = Some("echo.internal".to_owned());
    let called = call(&channel(server.address(), tls)).await;
    assert_eq!(called.unwrap(), server.address());
}

#[tokio::test]
async fn certificate_for_another_name_is_refused() {
    let authority = Authority::new();
    let server = serve(authority.server(&["echo.internal"]));
    let by_address = channel(server.address(), authority.client_tls());
    let causes = ["TLS failed", "certificate not valid for name"];
    assert_refused(&server, &by_address, &causes).await;
    let mut tls = authority.client_tls();
    tls.server_name = Some("other.internal".to_owned());
    let by_name = channel(server.address(), tls);
    assert_refused(&server, &by_name, &["other.internal"]).await;
}

#[tokio::test]
async fn certificate_of_another_authority_is_refused() {
    let server = serve(Authority::new().server(&["127.0.0.1"]));
    let channel = channel(server.address(), Authority::new().client_tls());
    assert_refused(&server, &channel, &["TLS failed", "UnknownIssuer"]).await;
}

#[tokio::test]
async fn mutual_tls_requires_a_client_certificate() {
    let authority = Authority::new();
    let mutual = authority
        .server(&["127.0.0.1"])
        .client_ca_root(Certificate::from_pem(authority.pem()));
    let server = serve(mutual);
    let without = channel(server.address(), authority.client_tls());
    assert_refused(&server, &without, &["CertificateRequired"]).await;

    let client = |authority: &Authority| {
        let (cert, key) = authority.sign(&["client"], ExtendedKeyUsagePurpose::ClientAuth);
        (Some(cert), Some(key))
    };
    let mut wrong = authority.client_tls();
    (wrong.cert_pem, wrong.key_pem) = client(&Authority::new());
    let wrong = channel(server.address(), wrong);
    assert_refused(&server, &wrong, &["received fatal alert"]).await;

    let mut right = authority.client_tls();
    (right.cert_pem, right.key_pem) = client(&authority);
    let right = channel(server.address(), right);
    assert_eq!(call(&right).await.unwrap(), server.address());
}

#[tokio::test]
async fn tls_on_one_side_only_is_refused() {
    let authority = Authority::new();
    let plain = EchoServer::start();
    let secure = channel(plain.address(), authority.client_tls());
    assert_refused(&plain, &secure, &["TLS failed"]).await;

    let server = serve(authority.server(&["127.0.0.1"]));
    let plain = static_channel([server.address()], |builder| {
        builder.ready_timeout(Duration::from_secs(2))
    });
    let causes = ["did not answer as an HTTP/2 server"];
    assert_refused(&server, &plain, &causes).await;
}

#[tokio::test]
async fn tls_runs_over_a_custom_connector() {
    let authority = Authority::new();
    let server = serve(authority.server(&["echo.internal"]));
    let address = server.address().to_owned();
    let connector = tower::service_fn(move |uri: Uri| {
        assert_eq!(uri.scheme_str(), Some("https"));
        let address = address.clone();
        async move {
            let io = tokio::net::TcpStream::connect(address).await?;
            Ok::<_, io::Error>(TokioIo::new(io))
        }
    });
    let channel = static_channel(["echo.internal:443"], |builder| {
        builder.tls(authority.client_tls()).connector(connector)
    });
    assert_eq!(call(&channel).await.unwrap(), server.address());
}

#[tokio::test]
async fn invalid_certificates_are_named() {
    let build = |tls: TlsConfig| {
        let source = Source::fixed([instance("127.0.0.1:1")]);
        let built = BalancedChannel::builder(source).tls(tls).build();
        built.map(drop).unwrap_err().to_string()
    };
    let mut no_certificate = TlsConfig::new();
    no_certificate.ca_pem = Some("nonsense".to_owned());
    assert!(build(no_certificate).contains("invalid tls_config.ca_pem"));
    let error = build(TlsConfig::new().ca_file("/missing/ca.pem"));
    assert!(error.contains("/missing/ca.pem"), "{error}");

    let authority = Authority::new();
    let (cert, key) = authority.sign(&["client"], ExtendedKeyUsagePurpose::ClientAuth);
    let mut no_key = authority.client_tls();
    no_key.cert_pem = Some(cert);
    let error = build(no_key);
    assert!(
        error.contains("cert_pem \"[redacted]\": requires key_file or key_pem"),
        "{error}"
    );
    let mut wrong_key = authority.client_tls();
    wrong_key.cert_pem = Some(authority.pem());
    wrong_key.key_pem = Some(key.clone());
    let error = build(wrong_key);
    assert!(error.contains("invalid tls_config.key_pem"), "{error}");
    assert!(error.contains("does not belong"), "{error}");
    assert!(!error.contains(key.lines().nth(1).unwrap()), "{error}");
}
