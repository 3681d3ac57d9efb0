//! Locks and elections, compatible with Go's `go.etcd.io/etcd/client/v3/concurrency`.

mod election;
mod entry;
mod entry_key;
mod entry_lease;
mod key_form;
mod lock;
mod loss;
mod queue;

pub use election::{Leaders, Leadership};
pub use lock::Lock;
