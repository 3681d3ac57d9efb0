//! The network between the members of a cluster, from which members can be cut off.
//!
//! Each member has a proxy, and advertises the proxy's address to its peers. Members connect to
//! each other in both directions. To isolate a member, its own connections to the other members,
//! which go through their proxies, must be closed too. The first request of a connection shows the
//! sender: rafthttp (etcd's peer protocol) sends the sender's peer URLs in a header. Only version
//! requests and probes lack this header. They are forwarded, except while any member is isolated.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::error::{Result, TestingError};
use super::port::Port;
use super::timing::POLL_INTERVAL;

/// The maximum number of bytes to read of a request in search of its sender.
const MAX_HEAD: usize = 16 << 10;

/// The header in which rafthttp sends the sender's peer URLs.
const SENDER_HEADER: &str = "x-peerurls:";

/// The proxies of all members. Dropping it closes them and all connections between the members.
pub(super) struct PeerNetwork {
    state: Arc<NetworkState>,
    proxies: Mutex<Vec<JoinHandle<()>>>,
}

struct NetworkState {
    /// The peer URLs of the isolated members.
    isolated: watch::Sender<BTreeSet<String>>,
    connections: Mutex<Connections>,
}

/// The open connections, by a number that is never used again.
#[derive(Default)]
struct Connections {
    last: u64,
    routes: BTreeMap<u64, Route>,
}

/// The two ends of a connection: the peer URL of the receiver, and that of the sender if known.
#[derive(Debug, Clone)]
struct Route {
    from: Option<String>,
    to: String,
}

impl Route {
    fn is_cut(&self, isolated: &BTreeSet<String>) -> bool {
        let is_from = |from| isolated.contains(from);
        !isolated.is_empty()
            && (isolated.contains(&self.to) || self.from.as_ref().is_none_or(is_from))
    }
}

impl PeerNetwork {
    pub(super) fn new() -> Self {
        Self {
            state: Arc::new(NetworkState {
                isolated: watch::Sender::default(),
                connections: Mutex::default(),
            }),
            proxies: Mutex::default(),
        }
    }

    /// Starts the proxy of a member: forwards from `port` to `target`, where the member listens.
    /// `to` is the member's peer URL.
    pub(super) async fn add_proxy(&self, port: &Port, to: String, target: String) -> Result<()> {
        let listener = port
            .listen()
            .await
            .map_err(TestingError::io("listening for the peers of an etcd"))?;
        let proxy = tokio::spawn(accept(listener, to, target, Arc::clone(&self.state)));
        self.proxies.lock().push(proxy);
        Ok(())
    }

    /// Isolates the member with this peer URL. When this method returns, no more data passes to or
    /// from it.
    pub(super) async fn isolate(&self, member: &str) {
        let isolated = &self.state.isolated;
        isolated.send_modify(|isolated| _ = isolated.insert(member.to_owned()));
        while self.state.has_cut_connection() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    pub(super) fn rejoin(&self, member: &str) {
        let isolated = &self.state.isolated;
        isolated.send_modify(|isolated| _ = isolated.remove(member));
    }
}

impl Drop for PeerNetwork {
    fn drop(&mut self) {
        for proxy in self.proxies.get_mut().drain(..) {
            proxy.abort();
        }
    }
}

impl fmt::Debug for PeerNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerNetwork")
            .field("isolated", &*self.state.isolated.borrow())
            .finish_non_exhaustive()
    }
}

impl NetworkState {
    /// Whether a connection is still open that must be cut.
    fn has_cut_connection(&self) -> bool {
        let isolated = self.isolated.borrow();
        let connections = self.connections.lock();
        let mut routes = connections.routes.values();
        routes.any(|route| route.is_cut(&isolated))
    }
}

/// Keeps a connection in [`Connections`] until dropped.
struct OpenConnection {
    state: Arc<NetworkState>,
    number: u64,
}

impl OpenConnection {
    fn new(state: Arc<NetworkState>, route: Route) -> Self {
        let number = {
            let mut connections = state.connections.lock();
            connections.last += 1;
            let number = connections.last;
            connections.routes.insert(number, route);
            number
        };
        Self { state, number }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.state.connections.lock().routes.remove(&self.number);
    }
}

async fn accept(listener: TcpListener, to: String, target: String, state: Arc<NetworkState>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((peer, _)) => {
                    let state = Arc::clone(&state);
                    connections.spawn(forward(peer, to.clone(), target.clone(), state));
                }
                // Most likely the process has no free file descriptor: pause, then try again.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
}

async fn forward(mut peer: TcpStream, to: String, target: String, state: Arc<NetworkState>) {
    let Some(head) = read_head(&mut peer).await else {
        return;
    };
    let route = Route {
        from: parse_sender(&head),
        to,
    };
    let mut isolated = state.isolated.subscribe();
    // Registered before the check below, so that a later `isolate` finds it. Declared before the
    // sockets, so that it drops after them: they are closed when `isolate` no longer sees it.
    let _open = OpenConnection::new(state, route.clone());
    let copy = async move {
        let Ok(mut member) = TcpStream::connect(target).await else {
            return;
        };
        let _ = peer.set_nodelay(true);
        let _ = member.set_nodelay(true);
        if member.write_all(&head).await.is_ok() {
            let _ = copy_bidirectional(&mut peer, &mut member).await;
        }
    };
    tokio::select! {
        biased;
        // An error means that the cluster is gone; then this connection ends too.
        _ = isolated.wait_for(|isolated| route.is_cut(isolated)) => {}
        () = copy => {}
    }
}

/// Reads at least the head of a peer's first request; `None` if the connection ends before.
async fn read_head(peer: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    while head.len() < MAX_HEAD && !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if peer.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

/// The peer URL of the member that sent the request, from its head.
fn parse_sender(head: &[u8]) -> Option<String> {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.split("\r\n").take_while(|line| !line.is_empty());
    lines.find_map(|line| {
        let (name, value) = line.split_at_checked(SENDER_HEADER.len())?;
        let url = value.trim().to_owned();
        name.eq_ignore_ascii_case(SENDER_HEADER).then_some(url)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sender_is_parsed_from_the_head() {
        let stream = "GET /raft/stream/msgapp/8e9e05c52164694d HTTP/1.1\r\nHost: 127.0.0.1:11002\r\n\
            X-Peerurls: http://127.0.0.1:11001\r\nX-Raft-To: 91bc3c398fb3c146\r\n\r\n";
        assert_eq!(
            parse_sender(stream.as_bytes()).as_deref(),
            Some("http://127.0.0.1:11001")
        );
        let probe = "GET /raft/probing HTTP/1.1\r\nHost: 127.0.0.1:11002\r\n\r\n\
            X-PeerURLs: http://127.0.0.1:11001\r\n";
        assert_eq!(parse_sender(probe.as_bytes()), None);
    }

    #[test]
    fn connections_of_isolated_members_are_cut() {
        let isolated = BTreeSet::from(["a".to_owned()]);
        let is_cut = |from: Option<&str>, to: &str, isolated: &_| {
            let (from, to) = (from.map(str::to_owned), to.to_owned());
            Route { from, to }.is_cut(isolated)
        };
        assert!(is_cut(Some("a"), "b", &isolated));
        assert!(is_cut(Some("b"), "a", &isolated));
        assert!(is_cut(None, "b", &isolated));
        assert!(!is_cut(Some("b"), "c", &isolated));
        assert!(!is_cut(None, "a", &BTreeSet::new()));
    }
}
