//! Locks and elections, compatible with Go's `go.etcd.io/etcd/client/v3/concurrency`.

mod election;
mod entry_lease;
mod lock;
mod queue;

pub use election::{Leaders, Leadership};
pub use lock::Lock;
