//! The picker's view of an endpoint.

use super::load::Load;

/// An endpoint that can be picked.
pub(crate) trait Candidate {
    fn load(&self) -> &Load;
    /// The endpoint's share of the calls, above 0.
    fn weight(&self) -> u32;
    /// Whether a call can be sent now. Since the picker was made, a connection may have closed or
    /// have reached its server's limit on streams.
    fn is_usable(&self) -> bool;
}
