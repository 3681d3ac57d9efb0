//! The members of the cluster that a client calls.
//!
//! - `channel`: members as the endpoints of a channel.
//! - `set`: which addresses are called, as a state machine without network.
//! - `membership`: that set as the calls see it, and the task that keeps it current.
//! - `probe`: finding out whether a member may be called.
//! - `auto_sync`: the lists of members that etcd sends.

mod auto_sync;
mod channel;
mod membership;
mod probe;
mod set;

pub(super) use auto_sync::auto_sync;
pub(in crate::client) use channel::single_member;
pub(super) use channel::{Addresses, describe_learner, refusal_of};
pub(super) use membership::{FollowedMembers, Membership, RefusalPauses};
