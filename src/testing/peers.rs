//! The network between the members of a cluster, in which one can be cut off from the others.
//!
//! Every member advertises a door of its own to its peers, and they come in by it. Each of two members
//! dials the other, so that to cut one off, the connections that it has made itself must go as well: those
//! go by the doors of the others. Who has dialled shows in the first request, in which rafthttp names the
//! peer URLs of the sender. Only the requests for a version and the probes do not say; they are let
//! through, except while a member is cut off.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::etcd::POLL;
use super::port::Port;
use super::{Result, TestingError};

/// The most that is read of a request to find out whose it is.
const HEAD: usize = 16 << 10;

/// Where rafthttp says whose request it is.
const SENDER: &str = "x-peerurls:";

/// The doors of all members. Dropping it closes them, with all connections between the members.
pub(super) struct Peers {
    shared: Arc<Shared>,
    doors: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    /// The peer URLs of those that are cut off.
    isolated: watch::Sender<BTreeSet<String>>,
    /// What is open, by a number of its own.
    open: Mutex<(u64, BTreeMap<u64, Route>)>,
}

/// By whose door a connection goes, and whose it is, as far as that is known: peer URLs.
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

impl Peers {
    pub(super) fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                isolated: watch::Sender::default(),
                open: Mutex::default(),
            }),
            doors: Mutex::default(),
        }
    }

    /// Lets the peers of the member with the URL `to`, which listens at `target`, in by `door`.
    pub(super) async fn open(&self, door: &Port, to: String, target: String) -> Result<()> {
        let listener = TcpListener::bind(door.endpoint())
            .await
            .map_err(TestingError::io("listening for the peers of an etcd"))?;
        let accepting = tokio::spawn(accept(listener, to, target, Arc::clone(&self.shared)));
        lock(&self.doors).push(accepting);
        Ok(())
    }

    /// Cuts the member with this peer URL off; when this returns, nothing reaches it or comes from it.
    pub(super) async fn isolate(&self, member: &str) {
        let isolated = &self.shared.isolated;
        isolated.send_modify(|isolated| _ = isolated.insert(member.to_owned()));
        while self.shared.is_any_cut_open() {
            tokio::time::sleep(POLL).await;
        }
    }

    pub(super) fn rejoin(&self, member: &str) {
        let isolated = &self.shared.isolated;
        isolated.send_modify(|isolated| _ = isolated.remove(member));
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        for accepting in lock(&self.doors).drain(..) {
            accepting.abort();
        }
    }
}

impl fmt::Debug for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peers")
            .field("isolated", &*self.shared.isolated.borrow())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn is_any_cut_open(&self) -> bool {
        let isolated = self.isolated.borrow();
        let open = lock(&self.open);
        open.1.values().any(|route| route.is_cut(&isolated))
    }
}

/// A connection that is counted for as long as it is open.
struct Open {
    shared: Arc<Shared>,
    number: u64,
}

impl Open {
    fn new(shared: Arc<Shared>, route: Route) -> Self {
        let number = {
            let mut open = lock(&shared.open);
            open.0 += 1;
            let number = open.0;
            open.1.insert(number, route);
            number
        };
        Self { shared, number }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.shared.open).1.remove(&self.number);
    }
}

/// What is under it is whole after each change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: TcpListener, to: String, target: String, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((peer, _)) => {
                    let shared = Arc::clone(&shared);
                    connections.spawn(connect(peer, to.clone(), target.clone(), shared));
                }
                // Out of file descriptors, most likely: leave some time for them to come back.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
}

async fn connect(mut peer: TcpStream, to: String, target: String, shared: Arc<Shared>) {
    let Some(head) = read_head(&mut peer).await else {
        return;
    };
    let route = Route {
        from: sender(&head),
        to,
    };
    let mut isolated = shared.isolated.subscribe();
    // Known before it is looked at: one that is not cut now is found by who cuts it next. The sockets
    // are closed before it is forgotten, for they come after it here.
    let _open = Open::new(shared, route.clone());
    let forwarded = async move {
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
        // It fails when the cluster is gone; then so is this connection.
        _ = isolated.wait_for(|isolated| route.is_cut(isolated)) => {}
        () = forwarded => {}
    }
}

/// What a peer sends first, with at least the head of its first request; `None` if that does not come.
async fn read_head(peer: &mut TcpStream) -> Option<Vec<u8>> {
    let mut head = Vec::new();
    while head.len() < HEAD && !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if peer.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    Some(head)
}

/// The peer URL of the member whose request this is.
fn sender(head: &[u8]) -> Option<String> {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.split("\r\n").take_while(|line| !line.is_empty());
    lines.find_map(|line| {
        let (name, value) = line.split_at_checked(SENDER.len())?;
        let url = value.trim().to_owned();
        name.eq_ignore_ascii_case(SENDER).then_some(url)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_whose_it_is() {
        let stream = "GET /raft/stream/msgapp/8e9e05c52164694d HTTP/1.1\r\nHost: 127.0.0.1:11002\r\n\
            X-Peerurls: http://127.0.0.1:11001\r\nX-Raft-To: 91bc3c398fb3c146\r\n\r\n";
        assert_eq!(
            sender(stream.as_bytes()).as_deref(),
            Some("http://127.0.0.1:11001")
        );
        let probe = "GET /raft/probing HTTP/1.1\r\nHost: 127.0.0.1:11002\r\n\r\n\
            X-PeerURLs: http://127.0.0.1:11001\r\n";
        assert_eq!(sender(probe.as_bytes()), None);
    }

    #[test]
    fn what_goes_to_or_comes_from_a_member_that_is_cut_off_is_cut_and_so_is_what_may_be() {
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
