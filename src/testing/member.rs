//! The name and the ports of one member.

use std::io;

use super::port::Port;

/// The name and the ports of one member of a cluster.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) client: Port,
    pub(super) peer: Port,
    /// The port of the proxy through which the other members reach this one, if there is a proxy.
    pub(super) peer_proxy: Option<Port>,
}

impl Member {
    pub(super) fn new(index: usize, with_peer_proxy: bool) -> io::Result<Self> {
        Ok(Self {
            name: format!("etcd{index}"),
            client: Port::claim()?,
            peer: Port::claim()?,
            peer_proxy: with_peer_proxy.then(Port::claim).transpose()?,
        })
    }

    /// The URL at which the other members reach this one.
    pub(super) fn peer_url(&self) -> String {
        let port = self.peer_proxy.as_ref().unwrap_or(&self.peer);
        format!("http://{}", port.endpoint())
    }
}
