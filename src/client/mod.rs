//! A client of one etcd cluster.
//!
//! [`Client`] wraps `etcd-client`. Every method takes `&self`, every call is bounded by
//! [`Config::request_timeout`](crate::Config::request_timeout), and every error says which
//! operation failed. [`Watch`], [`KeepAlive`], [`Lock`] and [`Leadership`] survive the loss of
//! their stream.
//!
//! ```text
//!   Client --> etcd-client        encodes messages, adds the user's token
//!                |
//!                v
//!              transport          retries and hedges reads; message limits, gzip, debug log
//!                |
//!                v
//!              BalancedChannel    keeps the members connected and picks one  <-- auto sync
//! ```
//!
//! A call that may change something is repeated only if it provably reached no member. Members are
//! picked by peak EWMA, so that a hung or distant member gets few calls.

mod close;
mod cluster;
mod compacted;
mod concurrency;
pub(crate) mod etcd_error;
mod handle;
mod held_leases;
mod keep_alive;
mod kv;
mod lease;
mod probes;
mod renewal;
mod transport;
mod txn;
mod watch;

pub(crate) use crate::balance::AttemptRecord;
pub use concurrency::{Leaders, Leadership, Lock};
pub use etcd_client::{
    CompactionOptions, CompactionResponse, Compare, CompareOp, DeleteOptions, DeleteResponse,
    Event, EventType, GetOptions, GetResponse, KeyValue, LeaseGrantResponse,
    LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseRevokeResponse, LeaseTimeToLiveOptions,
    LeaseTimeToLiveResponse, Member, MemberAddResponse, MemberListResponse, MemberPromoteResponse,
    MemberRemoveResponse, MemberUpdateResponse, PutOptions, PutResponse, ResponseHeader, SortOrder,
    SortTarget, StatusResponse, TxnOp, TxnOpResponse, TxnResponse, WatchFilterType,
};
pub use handle::Client;
pub use keep_alive::KeepAlive;
pub(crate) use keep_alive::Renewals;
pub use txn::Txn;
pub(crate) use watch::RawWatch;
pub use watch::{Watch, WatchOptions, WatchResponse};
