//! TLS to etcd: a private authority, client certificates, and connections that must fail.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::TestResult;
use goo_etcd::etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use goo_etcd::testing::{Etcd, EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Error, TlsConfig};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType,
    date_time_ymd,
};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

const DIAL: Duration = Duration::from_secs(3);

/// A certificate authority for one test.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A signed certificate and its key, in PEM.
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

fn tls_config(endpoints: Vec<String>, tls: TlsConfig) -> Config {
    let mut config = crate::support::config(endpoints);
    config.enable_tls = true;
    config.tls_config = Some(tls);
    config.dial_timeout = DIAL;
    config
}

/// The error of a client that cannot connect: in time, and with the address.
async fn connect_error(config: Config) -> String {
    let endpoint = config.endpoints[0].clone();
    let started = Instant::now();
    let error = timeout(crate::support::PATIENCE, Client::new("main", config))
        .await
        .expect("in time")
        .expect_err("it connected");
    assert!(
        started.elapsed() < DIAL + Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&endpoint), "{text}");
    text
}

#[tokio::test]
async fn mutual_tls_survives_the_loss_of_a_member() -> TestResult {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new("ours")?;
    let shown = authority.sign(Flaws::default())?;
    let cluster = authority.cluster(folder.path(), &shown, 3).await?;
    assert!(cluster.leader().await? < 3);
    let mut config = tls_config(cluster.endpoints(), authority.client()?);
    config.dial_timeout = crate::support::PATIENCE;
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
    crate::support::wait_until("a put succeeds", async || {
        client.put("key", "2", None).await.is_ok()
    })
    .await;
    use futures::StreamExt;
    crate::support::wait_for("an event", watch.next())
        .await
        .unwrap()?;

    // The name in the certificate is checked instead of the address.
    let tls = authority.client()?.server_name("etcd.example");
    config.tls_config = Some(tls);
    Client::new("named", config).await?.ping().await?;
    Ok(())
}

#[tokio::test]
async fn untrusted_certificates_are_connect_error() -> TestResult {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new("ours")?;
    let shown = authority.sign(Flaws::default())?;
    let cluster = authority.cluster(folder.path(), &shown, 1).await?;
    let endpoints = cluster.endpoints();

    let stranger = Authority::new("a stranger")?;
    let tls = authority.client()?;
    let wrong_ca = connect_error(tls_config(
        endpoints.clone(),
        tls.clone().ca_pem(stranger.pem()),
    ))
    .await;
    assert!(wrong_ca.contains("UnknownIssuer"), "{wrong_ca}");

    let named = tls.clone().server_name("other.example");
    let wrong_name = connect_error(tls_config(endpoints.clone(), named)).await;
    assert!(
        wrong_name.contains("not valid for name \"other.example\""),
        "{wrong_name}"
    );

    // Without a client certificate, and with one of another authority.
    let none = TlsConfig::new().ca_pem(authority.pem());
    let anonymous = connect_error(tls_config(endpoints.clone(), none)).await;
    assert!(
        anonymous.to_lowercase().contains("certificate"),
        "{anonymous}"
    );
    let foreign = stranger.client()?.ca_pem(authority.pem());
    let foreign = connect_error(tls_config(endpoints, foreign)).await;
    assert!(
        foreign.to_lowercase().contains("certificate") || foreign.contains("UnknownCA"),
        "{foreign}"
    );
    Ok(())
}

#[tokio::test]
async fn expired_or_misnamed_certificate_is_connect_error() -> TestResult {
    let authority = Authority::new("ours")?;
    let expired = Flaws {
        expired: true,
        ..Flaws::default()
    };
    let elsewhere = Flaws {
        other_name: true,
        ..Flaws::default()
    };
    for (flaws, cause) in [(expired, "expired"), (elsewhere, "not valid for name")] {
        let shown = authority.sign(flaws)?;
        let server = tls_server(&shown)?;
        let text = connect_error(tls_config(vec![server], authority.client()?)).await;
        assert!(text.contains(cause), "{cause} in {text}");
    }
    Ok(())
}

/// A server with a flawed certificate. etcd itself would not become ready with it.
fn tls_server(shown: &Signed) -> TestResult<String> {
    use tokio_rustls::rustls::crypto::ring::default_provider;
    use tonic::transport::{Identity, Server, ServerTlsConfig};
    // tonic's server cannot choose when both backends are compiled in. Installing twice is
    // harmless.
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
async fn nothing_is_sent_in_plaintext() -> TestResult {
    let etcd = Etcd::start().await?;
    let authority = Authority::new("ours")?;
    let text = connect_error(tls_config(vec![etcd.endpoint()], authority.client()?)).await;
    assert!(text.contains("TLS failed"), "{text}");

    // A plain listener records all bytes that the client sends.
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
    let mut config = tls_config(vec![endpoint], authority.client()?);
    config.username = Some("somebody".to_owned());
    config.password = Some("hunter2".to_owned());
    connect_error(config).await;
    let received = received.lock().unwrap();
    assert!(!received.is_empty());
    for connection in received.iter() {
        // The first byte is a TLS handshake record (RFC 8446, section 5.1), not HTTP/2's preface.
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

/// Over TLS etcd sends a learner's refusal of a stream after the response's head.
#[tokio::test]
async fn streams_open_beside_a_learner() -> TestResult {
    let folder = tempfile::tempdir()?;
    let authority = Authority::new("ours")?;
    let shown = authority.sign(Flaws::default())?;
    let cluster = authority.cluster(folder.path(), &shown, 3).await?;
    cluster.replace_with_learner(2).await?;
    let learner = cluster.member(2).endpoint();
    let mut proxies = Vec::new();
    for voter in &cluster.members()[..2] {
        let proxy = Proxy::start(voter.endpoint()).await?;
        // The learner is connected first, so it gets the first calls.
        proxy.delay(Duration::from_millis(150));
        proxies.push(proxy);
    }
    let endpoints = proxies.iter().map(Proxy::endpoint).chain([learner]);
    let mut config = tls_config(endpoints.collect(), authority.client()?);
    config.dial_timeout = crate::support::PATIENCE;
    let client = Client::new("main", config.clone()).await?;
    drop(client.watch("key", None).await?);
    let client = Client::new("main", config).await?;
    let lease = client.grant(30).await?;
    client.keep_alive_once(lease.id()).await?;
    Ok(())
}
