//! The network between the members of a cluster, from which members can be cut off.
//!
//! Each member has a proxy, and advertises the proxy's address to its peers. Members connect to
//! each other in both directions. To isolate a member, its own connections to the other members,
//! which go through their proxies, must be closed too. The sender of a connection is the process
//! that owns it, because not every request names its sender: a follower's renewal of a lease, which
//! it sends to the leader, does not. Where the system does not tell the owner, the connection counts
//! as cut while any member is isolated.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use super::etcd::{Etcd, WeakEtcd};
use super::socket_owner::find_owner;
use super::timing::POLL_INTERVAL;

/// The proxies of all members. Dropping it closes them and all connections between the members.
pub(super) struct PeerNetwork {
    state: Arc<NetworkState>,
    proxies: Vec<JoinHandle<()>>,
}

struct NetworkState {
    /// The members, which here are their indices.
    members: Vec<WeakEtcd>,
    isolated: watch::Sender<BTreeSet<usize>>,
    connections: Mutex<Connections>,
}

/// The open connections, by a number that is never used again.
#[derive(Default)]
struct Connections {
    last: u64,
    routes: BTreeMap<u64, Route>,
}

/// The two ends of a connection: the receiver, and the sender if known.
#[derive(Debug, Clone, Copy)]
struct Route {
    from: Option<usize>,
    to: usize,
}

impl Route {
    fn is_cut(self, isolated: &BTreeSet<usize>) -> bool {
        let is_from = |from| isolated.contains(&from);
        !isolated.is_empty() && (isolated.contains(&self.to) || self.from.is_none_or(is_from))
    }
}

impl PeerNetwork {
    /// Starts the proxies of the members: forwards from each listener to the member of the same
    /// index.
    pub(super) fn start(listeners: Vec<TcpListener>, members: &[Etcd]) -> Self {
        let state = Arc::new(NetworkState {
            members: members.iter().map(Etcd::downgrade).collect(),
            isolated: watch::Sender::default(),
            connections: Mutex::default(),
        });
        let proxies = listeners.into_iter().zip(members).enumerate();
        let proxies = proxies.map(|(to, (listener, member))| {
            let target = member.peer_endpoint();
            tokio::spawn(accept(listener, to, target, Arc::clone(&state)))
        });
        Self {
            proxies: proxies.collect(),
            state,
        }
    }

    /// Isolates the member with this index. When this method returns, no more data passes to or
    /// from it.
    pub(super) async fn isolate(&self, member: usize) {
        let isolated = &self.state.isolated;
        isolated.send_modify(|isolated| _ = isolated.insert(member));
        while self.state.has_cut_connection() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    pub(super) fn rejoin(&self, member: usize) {
        let isolated = &self.state.isolated;
        isolated.send_modify(|isolated| _ = isolated.remove(&member));
    }
}

impl Drop for PeerNetwork {
    fn drop(&mut self) {
        for proxy in self.proxies.drain(..) {
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

    /// The member that has opened this connection.
    fn find_sender(&self, peer: &TcpStream) -> Option<usize> {
        let (SocketAddr::V4(from), SocketAddr::V4(to)) =
            (peer.peer_addr().ok()?, peer.local_addr().ok()?)
        else {
            return None;
        };
        let pids: Vec<_> = self.members.iter().map(WeakEtcd::pid).collect();
        let running: Vec<_> = pids.iter().copied().flatten().collect();
        let owner = find_owner(from, to, &running)?;
        pids.iter().position(|pid| *pid == Some(owner))
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

async fn accept(listener: TcpListener, to: usize, target: String, state: Arc<NetworkState>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((peer, _)) => {
                    connections.spawn(forward(peer, to, target.clone(), Arc::clone(&state)));
                }
                // Most likely the process has no free file descriptor: pause, then try again.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
}

async fn forward(peer: TcpStream, to: usize, target: String, state: Arc<NetworkState>) {
    let network = Arc::clone(&state);
    // The search reads many files.
    let search = spawn_blocking(move || (network.find_sender(&peer), peer));
    let Ok((from, mut peer)) = search.await else {
        return;
    };
    let route = Route { from, to };
    let mut isolated = state.isolated.subscribe();
    // Registered before the check below, so that a later `isolate` finds it. Declared before the
    // sockets, so that it drops after them: they are closed when `isolate` no longer sees it.
    let _open = OpenConnection::new(state, route);
    let copy = async move {
        let Ok(mut member) = TcpStream::connect(target).await else {
            return;
        };
        let _ = peer.set_nodelay(true);
        let _ = member.set_nodelay(true);
        let _ = copy_bidirectional(&mut peer, &mut member).await;
    };
    tokio::select! {
        biased;
        // An error means that the cluster is gone; then this connection ends too.
        _ = isolated.wait_for(|isolated| route.is_cut(isolated)) => {}
        () = copy => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_of_isolated_members_are_cut() {
        let isolated = BTreeSet::from([0]);
        let is_cut = |from, to, isolated: &_| Route { from, to }.is_cut(isolated);
        assert!(is_cut(Some(0), 1, &isolated));
        assert!(is_cut(Some(1), 0, &isolated));
        assert!(is_cut(None, 1, &isolated));
        assert!(!is_cut(Some(1), 2, &isolated));
        assert!(!is_cut(None, 0, &BTreeSet::new()));
    }
}
