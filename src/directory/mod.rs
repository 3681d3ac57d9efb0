//! A service's live instances, read from etcd.
//!
//! A [`Directory`] lists a service's instances in etcd, then watches them, and publishes them as
//! whole, immutable [`Snapshot`](crate::Snapshot)s. Consumers read the newest snapshot and compare
//! it with the one they acted on. Missing a snapshot costs nothing.
//!
//! ```text
//!   per layout (a format under a prefix):                             per directory:
//!
//!   etcd <-list, watch- Driver -event-> ListWatchState --> Publisher --> MergedView --> Directory
//!                         ^                    |               |
//!                         +-------action-------+               +--> cache file
//! ```
//!
//! # Recovery
//!
//! When the watch is lost (etcd restarts, the network is cut, the history is compacted), the last
//! snapshot stays in use, marked [`Stale`](crate::Freshness::Stale) with the time and the reason.
//! The directory lists again at a random moment of the first 500 ms, and then with a backoff of up
//! to 1 s between attempts, until it succeeds. The new list replaces the old one: an instance that
//! left meanwhile is removed, and an instance that stayed is untouched. A directory never gives up
//! while a handle to it is held, except when its client is closed.
//!
//! # Files
//!
//! - `handle`, `builder`, `discover`, `channel`: the public types.
//! - `registry`, `service_watch`, `follower`: sharing one watch among handles and runtimes.
//! - `open`, `driver`, `list_watch`: the requests to etcd.
//! - `state`, `keys`, `event`: the state machine, without I/O.
//! - `publisher`, `merge`, `cache`: the way of its snapshots to readers and to disk.

mod builder;
mod cache;
mod channel;
mod discover;
mod driver;
mod event;
mod follower;
mod handle;
mod keys;
mod list_watch;
mod merge;
#[cfg(test)]
mod model;
mod open;
mod publisher;
mod registry;
mod service_watch;
mod state;

pub use builder::DirectoryBuilder;
pub use discover::{Discovery, EndpointChanges};
pub use handle::{Directory, Snapshots};
