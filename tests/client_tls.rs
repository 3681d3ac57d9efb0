//! The client over TLS: a cluster with a private authority and client certificates, and what must fail.
#![cfg(feature = "tls-ring")]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use goo_etcd::etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use goo_etcd::testing::{Etcd, EtcdCluster};
use goo_etcd::{Client, Config, Error, TlsConfig};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType,
    date_time_ymd,
};
use support::TestResult;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

const DIAL: Duration = Duration::from_secs(3);

/// An authority, made for one test.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate of an authority and its key, in PEM.
struct Signed {
    cert: String,
    key: String,
}

#[derive(Default)]
struct Flaws {
    expired: bool,
    other_name: bool,
}

impl Authority {
    fn new(name: &str) -> TestResult<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self { issuer })
    }

    fn pem(&self) -> String {
        self.issuer.pem()
    }

    fn sign(&self, flaws: Flaws) -> TestResult<Signed> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.subject_alt_names = if flaws.other_name {
            vec![SanType::DnsName("elsewhere.example".try_into()?)]
        } else {
            vec![
                SanType::IpAddress([127, 0, 0, 1].into()),
                SanType::DnsName("etcd.example".try_into()?),
            ]
        };
        if flaws.expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate()?;
        Ok(Signed {
            cert: params.signed_by(&key, &self.issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }

    /// The client's side of mutual TLS.
    fn client(&self) -> TestResult<TlsConfig> {
        let own = self.sign(Flaws::default())?;
        Ok(TlsConfig::new()
            .ca_pem(self.pem())
            .cert_pem(own.cert)
            .key_pem(own.key))
    }

    /// etcd that shows this certificate and asks for one of ours.
    async fn cluster(&self, folder: &Path, shown: &Signed, size: usize) -> TestResult<EtcdCluster> {
        let file = |name: &str, content: &str| {
            let path = folder.join(name);
            std::fs::write(&path, content).map(|()| path.display().to_string())
        };
        let flags = [
            format!("--cert-file={}", file("cert", &shown.cert)?),
            format!("--key-file={}", file("key", &shown.key)?),
            format!("--trusted-ca-file={}", file("ca", &self.pem())?),
            "--client-cert-auth".to_owned(),
        ];
        let own = self.sign(Flaws::default())?;
        let tls = TlsOptions::new()
            .ca_certificate(Certificate::from_pem(self.pem()))
            .identity(Identity::from_pem(own.cert, own.key));
        let options = ConnectOptions::new().with_tls(tls);
        let builder = Etcd::builder().args(flags).connect_options(options);
        Ok(builder.start_cluster(size).await?)
    }
}

fn config(endpoints: Vec<String>, tls: TlsConfig) -> Config {
    let mut config = Config::default();
    config.endpoints = endpoints;
    config.enable_tls = true;
    config.tls_config = Some(tls);
    config.dial_timeout = DIAL;
    config
}

/// The error of a client that cannot be made, which comes in time, with the address.
async fn refused(config: Config) -> String {
    let endpoint = config.endpoints[0].clone();
    let begun = Instant::now();
    let error = timeout(support::PATIENCE, Client::new("main", config))
        .await
        .expect("in time")
        .expect_err("it is refused");
    assert!(
        begun.elapsed() < DIAL + Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&endpoint), "{text}");
    text
}

#[tokio::test]
async fn given_a_cluster_with_mutual_tls_then_all_works_through_the_loss_of_a_member() -> TestResult
{
    let folder = tempfile::tempdir()?;
    let authority = Authority::new("ours")?;
    let shown = authority.sign(Flaws::default())?;
    let cluster = authority.cluster(folder.path(), &shown, 3).await?;
    let mut config = config(cluster.endpoints(), authority.client()?);
    config.dial_timeout = support::PATIENCE;
    let client = Client::new("main", config.clone()).await?;
    client.put("key", "value", None).await?;
    let mut watch = client.watch("key", None).await?;
    for member in cluster.members() {
        client.status(member.endpoint()).await?;
    }
    cluster.member(0).kill().await?;
    for _ in 0..100 {
        assert_eq!(client.get("key", None).await?.count(), 1);
    }
    support::eventually("a put", async || client.put("key", "2", None).await.is_ok()).await;
    use futures::StreamExt;
    support::soon("an event", watch.next()).await.unwrap()?;

    // The name in the certificate, in place of the address.
    let tls = authority.client()?.server_name("etcd.example");
    config.tls_config = Some(tls);
    Client::new("named", config).await?.ping().await?;
    Ok(())
}

#[tokio::test]
async fn given_certificates_that_must_not_be_trusted_then_the_error_says_why() -> TestResult {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new("ours")?;
    let shown = authority.sign(Flaws::default())?;
    let cluster = authority.cluster(folder.path(), &shown, 1).await?;
    let endpoints = cluster.endpoints();

    let stranger = Authority::new("a stranger")?;
    let tls = authority.client()?;
    let wrong_ca = refused(config(
        endpoints.clone(),
        tls.clone().ca_pem(stranger.pem()),
    ))
    .await;
    assert!(wrong_ca.contains("UnknownIssuer"), "{wrong_ca}");

    let named = tls.clone().server_name("other.example");
    let wrong_name = refused(config(endpoints.clone(), named)).await;
    assert!(
        wrong_name.contains("not valid for name \"other.example\""),
        "{wrong_name}"
    );

    // Without a certificate of its own, and with one of another authority's.
    let none = TlsConfig::new().ca_pem(authority.pem());
    let anonymous = refused(config(endpoints.clone(), none)).await;
    assert!(
        anonymous.to_lowercase().contains("certificate"),
        "{anonymous}"
    );
    let foreign = stranger.client()?.ca_pem(authority.pem());
    let foreign = refused(config(endpoints, foreign)).await;
    assert!(
        foreign.to_lowercase().contains("certificate") || foreign.contains("UnknownCA"),
        "{foreign}"
    );
    Ok(())
}

#[tokio::test]
async fn given_a_server_whose_certificate_has_expired_or_is_for_another_name_then_the_error_says_so()
-> TestResult {
    let authority = Authority::new("ours")?;
    let expired = Flaws {
        expired: true,
        ..Flaws::default()
    };
    let elsewhere = Flaws {
        other_name: true,
        ..Flaws::default()
    };
    for (flaws, said) in [(expired, "expired"), (elsewhere, "not valid for name")] {
        let shown = authority.sign(flaws)?;
        let server = tls_server(&shown)?;
        let text = refused(config(vec![server], authority.client()?)).await;
        assert!(text.contains(said), "{said} in {text}");
    }
    Ok(())
}

/// A server that shows a certificate with which etcd would not be ready for its own tests.
fn tls_server(shown: &Signed) -> TestResult<String> {
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use tonic::transport::{Identity, Server, ServerTlsConfig};
    // The tests are built with both backends, and tonic's server does not choose. Set twice is fine.
    let _ = default_provider().install_default();
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let endpoint = listener.local_addr()?.to_string();
    let identity = Identity::from_pem(&shown.cert, &shown.key);
    let server = Server::builder()
        .tls_config(ServerTlsConfig::new().identity(identity))?
        .add_routes(tonic::service::Routes::default());
    let listener = TcpListener::from_std(listener)?;
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(server.serve_with_incoming(incoming));
    Ok(endpoint)
}

#[tokio::test]
async fn given_a_server_without_tls_then_nothing_is_ever_sent_in_plaintext() -> TestResult {
    let etcd = Etcd::start().await?;
    let authority = Authority::new("ours")?;
    let said = refused(config(vec![etcd.endpoint()], authority.client()?)).await;
    assert!(said.contains("TLS failed"), "{said}");

    // What is sent, seen by a listener that takes it all.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = listener.local_addr()?.to_string();
    let received = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&received);
    tokio::spawn(async move {
        while let Ok((mut peer, _)) = listener.accept().await {
            let mut bytes = vec![0; 64 * 1024];
            let read = peer.read(&mut bytes).await.unwrap_or(0);
            bytes.truncate(read);
            into.lock().unwrap().push(bytes);
        }
    });
    let mut config = config(vec![endpoint], authority.client()?);
    config.username = Some("somebody".to_owned());
    config.password = Some("hunter2".to_owned());
    refused(config).await;
    let received = received.lock().unwrap();
    assert!(!received.is_empty());
    for connection in received.iter() {
        // A TLS handshake record (RFC 8446, section 5.1), and no preface of HTTP/2.
        assert_eq!(connection.first(), Some(&22), "{connection:?}");
        for plain in [
            &b"PRI * HTTP/2.0"[..],
            b"somebody",
            b"hunter2",
            b"etcdserverpb",
        ] {
            assert!(!connection.windows(plain.len()).any(|part| part == plain));
        }
    }
    Ok(())
}
