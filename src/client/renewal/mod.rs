//! Renewing leases.
//!
//! All leases of a client share a [`LeaseStreams`]: at most two open streams per member, and a
//! message for each renewal. Usually one stream carries all renewals.
//!
//! ```text
//!   LeaseStreams::renew     one renewal, until it has a response
//!     plan                  which member is asked next, and when: a pure function
//!     LeaseStream           a stream to one member, with the renewals that wait on it
//! ```
//!
//! etcd responds to the renewals of one stream one after the other. A follower passes each to the
//! leader, and waits 7 s for a leader that hangs, even after another was elected. A stream that
//! owes a response is therefore stuck for every lease. The renewal is sent on another member's
//! stream beside it, and the stuck one is closed once another member has responded. If no member
//! responds, each is asked on a second stream beside the silent one, because it may only be slow.
//!
//! etcd ends a stream when it refuses one lease. Only that lease gets the error. The others are
//! renewed on another stream, so each refused lease costs them a round trip.
//!
//! The streams end with the last handle to the `LeaseStreams`, so that a client without leases has
//! none.

mod clock;
mod pace;
mod plan;
mod standing;
mod stream;
mod streams;

pub(in crate::client) use clock::LeaseClock;
pub(in crate::client) use pace::Pace;
pub(in crate::client) use stream::Renewed;
pub(in crate::client) use streams::{LeaseStreams, operation};
