//! One connection to an etcd cluster.
//!
//! [`Client`] wraps `etcd-client`: every method takes `&self`, every call is bounded by
//! [`Config::request_timeout`](crate::Config::request_timeout), and every error says what was tried.
//! [`Watch`], [`KeepAlive`], [`Lock`] and [`Leadership`] survive the loss of their stream.
//!
//! ```text
//!   Client --> etcd-client: messages, the user's token
//!                |
//!                v
//!              wire: reads again or beside on another member, limits, gzip, debug log
//!                |
//!                v
//!              BalancedChannel: members kept connected, one of them picked  <-- members: auto sync
//! ```
//!
//! A call that may change something is sent again only where it provably reached no member. Members are
//! chosen by peak EWMA, so that one that hangs or is far away gets little, and fast ones much.

mod answer;
mod call_log;
mod cluster;
mod concurrency;
mod handle;
mod keep_alive;
mod kv;
mod lease;
mod members;
mod message;
mod method;
mod transport;
mod txn;
mod watch;
mod wire;

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
pub(crate) use lease::Link;
pub use txn::Txn;
pub(crate) use watch::RawWatch;
pub use watch::{Watch, WatchOptions, WatchResponse};
