//! An instance's place in the pool.

use tokio::time::Instant;

use super::supervisor::Supervised;

/// An instance's endpoint; while its address changes, the new one and the old.
pub(crate) struct Member {
    pub(crate) current: Supervised,
    pub(crate) next: Option<Next>,
}

impl Member {
    pub(crate) fn is_connected(&self) -> bool {
        self.current.endpoint.is_connected()
    }

    pub(crate) fn is_at(&self, address: &str) -> bool {
        *self.current.endpoint.target.address == *address
    }
}

/// The endpoint that replaces the current one as soon as it is connected.
pub(crate) struct Next {
    pub(crate) supervised: Supervised,
    /// When it replaces it even so.
    pub(crate) deadline: Instant,
}
