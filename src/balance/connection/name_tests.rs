//! A name with several addresses, on real sockets: each address is one of 127.0.0.0/8, and the
//! servers have one port.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::lookup::Lookups;
use super::*;
use crate::instance::Instance;

/// How a server treats a connection.
#[derive(Clone, Copy, PartialEq)]
enum Behaviour {
    Http2,
    /// Accepts, and never sends anything.
    Silent,
    Closes,
    Http1,
    /// Sends part of an HTTP/2 SETTINGS frame and nothing more.
    HalfFrame,
    /// Completes the HTTP/2 handshake and closes the connection, as a proxy without a backend.
    Greets,
    /// Completes the HTTP/2 handshake and ends the connection gracefully after 500 ms without a
    /// call.
    ClosesIdle,
}

/// The servers of one name. The n-th listens on 127.0.0.n, from 1 on.
struct Servers {
    port: u16,
    accepted: Vec<Arc<AtomicUsize>>,
    /// Connections that the client has closed.
    ended: Arc<AtomicUsize>,
    tasks: Vec<JoinSet<()>>,
}

fn address(index: usize, port: u16) -> SocketAddr {
    let last = u8::try_from(index + 1).unwrap();
    (Ipv4Addr::new(127, 0, 0, last), port).into()
}

impl Servers {
    async fn start(behaviours: &[Behaviour]) -> Self {
        // A port that is free on the first address may be taken on another.
        let (port, listeners) = loop {
            let first = TcpListener::bind(address(0, 0)).await.unwrap();
            let port = first.local_addr().unwrap().port();
            let mut listeners = vec![first];
            for index in 1..behaviours.len() {
                let Ok(next) = TcpListener::bind(address(index, port)).await else {
                    break;
                };
                listeners.push(next);
            }
            if listeners.len() == behaviours.len() {
                break (port, listeners);
            }
        };
        let ended = Arc::<AtomicUsize>::default();
        let (mut accepted, mut tasks) = (Vec::new(), Vec::new());
        for (listener, behaviour) in listeners.into_iter().zip(behaviours) {
            let count = Arc::<AtomicUsize>::default();
            let mut task = JoinSet::new();
            task.spawn(accept(
                listener,
                *behaviour,
                Arc::clone(&count),
                Arc::clone(&ended),
            ));
            accepted.push(count);
            tasks.push(task);
        }
        Self {
            port,
            accepted,
            ended,
            tasks,
        }
    }

    /// Connections accepted by each server.
    fn accepted(&self) -> Vec<usize> {
        let counts = self.accepted.iter();
        counts.map(|count| count.load(Ordering::SeqCst)).collect()
    }

    fn stop(&mut self, index: usize) {
        self.tasks[index] = JoinSet::new();
    }

    /// A connector for which the name has the servers' addresses, and the name's target.
    fn connector(&self) -> (Connector, Target) {
        let found = (0..self.tasks.len()).map(|n| address(n, 0)).collect();
        self.connector_to(found, Duration::from_secs(30))
    }

    /// A connector for which the name has these addresses.
    fn connector_to(&self, found: Vec<SocketAddr>, timeout: Duration) -> (Connector, Target) {
        let lookups = Lookups::new(move |_: &str| Ok(found.clone()));
        let settings = ConnectionSettings {
            connect_timeout: timeout,
            ..ConnectionSettings::default()
        };
        let connector = Connector::new(settings, None, None).with_lookups(lookups);
        let instance = Instance::new("echo", format!("name.example:{}", self.port));
        (connector, Target::new(&instance, false).unwrap())
    }
}

async fn accept(
    listener: TcpListener,
    behaviour: Behaviour,
    accepted: Arc<AtomicUsize>,
    ended: Arc<AtomicUsize>,
) {
    let mut connections = JoinSet::new();
    while let Ok((io, _)) = listener.accept().await {
        accepted.fetch_add(1, Ordering::SeqCst);
        let ended = Arc::clone(&ended);
        connections.spawn(async move {
            serve(io, behaviour).await;
            ended.fetch_add(1, Ordering::SeqCst);
        });
    }
}

async fn serve(mut io: TcpStream, behaviour: Behaviour) {
    let sent: &[u8] = match behaviour {
        Behaviour::Http2 => {
            let mut h2: h2::server::Connection<_, bytes::Bytes> =
                h2::server::handshake(io).await.unwrap();
            while h2.accept().await.is_some() {}
            return;
        }
        Behaviour::Greets => {
            io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            io.shutdown().await.unwrap();
            b""
        }
        Behaviour::ClosesIdle => {
            io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
            // GOAWAY with NO_ERROR.
            &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        Behaviour::Silent => b"",
        Behaviour::Closes => return,
        Behaviour::Http1 => b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n",
        Behaviour::HalfFrame => &[0, 0, 6, 4, 0, 0, 0],
    };
    io.write_all(sent).await.unwrap();
    // Until the client closes the connection.
    let mut received = Vec::new();
    let _ = io.read_to_end(&mut received).await;
}

#[tokio::test]
async fn address_without_a_grpc_server_is_passed_over() {
    for behaviour in [
        Behaviour::Silent,
        Behaviour::Closes,
        Behaviour::Http1,
        Behaviour::HalfFrame,
    ] {
        let servers = Servers::start(&[behaviour, Behaviour::Http2]).await;
        let (connector, target) = servers.connector();
        let first = connector.connect(&target).await.unwrap();
        assert_eq!(servers.accepted(), [1, 1]);
        // The one that completed is tried first, and alone.
        let second = connector.connect(&target).await.unwrap();
        assert_eq!(servers.accepted(), [1, 2]);
        assert!(first.sender.is_open() && second.sender.is_open());
        // The attempt that lost is closed.
        while servers.ended.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn lost_winner_gives_way_to_the_others() {
    let mut servers =
        Servers::start(&[Behaviour::Closes, Behaviour::Http2, Behaviour::Http2]).await;
    let (connector, target) = servers.connector();
    connector.connect(&target).await.unwrap();
    assert_eq!(servers.accepted(), [1, 1, 0]);
    servers.stop(1);
    connector.connect(&target).await.unwrap();
    assert_eq!(servers.accepted(), [2, 1, 1]);
    connector.connect(&target).await.unwrap();
    assert_eq!(servers.accepted(), [2, 1, 2]);
}

#[tokio::test]
async fn address_that_greets_and_closes_is_tried_last() {
    let servers = Servers::start(&[Behaviour::Greets, Behaviour::Greets, Behaviour::Http2]).await;
    let (connector, target) = servers.connector();
    for _ in 0..2 {
        let greeted = connector.connect(&target).await.unwrap();
        // On a machine that stands still for 250 ms, the third may be the first to complete.
        if servers.accepted()[2] == 0 {
            greeted.ended.await;
        }
    }
    connector.connect(&target).await.unwrap();
    assert_ne!(servers.accepted()[2], 0);
}

#[tokio::test]
async fn address_that_closes_idle_connections_stays_first() {
    for other in [Behaviour::Silent, Behaviour::Greets] {
        let servers = Servers::start(&[other, Behaviour::ClosesIdle]).await;
        let (connector, target) = servers.connector();
        while servers.accepted()[1] == 0 {
            connector.connect(&target).await.unwrap().ended.await;
        }
        let tried = servers.accepted()[0];
        for count in 2..4 {
            connector.connect(&target).await.unwrap().ended.await;
            assert_eq!(servers.accepted(), [tried, count]);
        }
    }
}

#[tokio::test]
async fn error_has_the_reason_of_each_address() {
    let servers = Servers::start(&[Behaviour::Closes, Behaviour::Http1]).await;
    let (connector, target) = servers.connector();
    let error = connector.connect(&target).await.err().unwrap();
    for (index, reason) in error.split("; ").enumerate() {
        let address = address(index, servers.port);
        assert!(reason.starts_with(&format!("{address}: ")), "{error}");
    }
    assert_eq!(error.split("; ").count(), 2, "{error}");
    assert_eq!(servers.accepted(), [1, 1]);
}

#[tokio::test]
async fn timeout_names_the_step_of_each_address() {
    let servers = Servers::start(&[Behaviour::Silent, Behaviour::HalfFrame]).await;
    let found = vec![address(0, 0), address(1, 0)];
    let (connector, target) = servers.connector_to(found, Duration::from_secs(2));
    let error = connector.connect(&target).await.err().unwrap();
    for index in 0..2 {
        let address = address(index, servers.port);
        let reason = format!("{address}: the HTTP/2 handshake took more than 2s");
        assert!(error.contains(&reason), "{error}");
    }
}

/// The addresses are for documentation (RFC 3849), so nothing responds there.
#[tokio::test]
async fn unreachable_ipv6_addresses_are_passed_over() {
    let servers = Servers::start(&[Behaviour::Http2]).await;
    let documentation = ["[2001:db8::1]:0", "[2001:db8::2]:0"];
    let unreachable = documentation.map(|text| text.parse().unwrap());
    let found = [&unreachable[..], &[address(0, 0)]].concat();
    let (connector, target) = servers.connector_to(found, Duration::from_secs(30));
    connector.connect(&target).await.unwrap();
    assert_eq!(servers.accepted(), [1]);
}

#[tokio::test]
async fn timeout_says_whether_the_look_up_had_begun() {
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let opened = std::sync::Mutex::new(opened);
    let lookups = Lookups::new(move |_: &str| {
        let _ = opened.lock().unwrap().recv();
        Ok(vec![])
    });
    let settings = ConnectionSettings {
        connect_timeout: Duration::from_millis(200),
        ..ConnectionSettings::default()
    };
    let connector = Connector::new(settings, None, None).with_lookups(lookups);
    let targets: Vec<Target> = (0..20)
        .map(|n| Instance::new("echo", format!("name-{n}.example:1")))
        .map(|instance| Target::new(&instance, false).unwrap())
        .collect();
    let attempts = targets.iter().map(|target| connector.connect(target));
    let results = futures::future::join_all(attempts).await;
    let errors: Vec<String> = results.into_iter().filter_map(Result::err).collect();
    let count = |text: &str| {
        errors
            .iter()
            .filter(|error| error.starts_with(text))
            .count()
    };
    // At most 12 new names are looked up at a time.
    assert_eq!(count("looking up the name took"), 12);
    assert_eq!(count("waiting for look-ups of other names took"), 8);
    drop(open);
}
