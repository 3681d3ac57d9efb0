//! Real etcd servers for tests, with real faults (feature `testing`).
//!
//! A test against a mock of etcd tests the mock. This module starts the real program. Each server
//! has free loopback ports and a temporary data folder, so that tests can run in parallel. The
//! faults are real too: SIGKILL, SIGSTOP, an empty disk, a compacted history, a cut network.
//!
//! ```no_run
//! use goo_etcd::testing::Etcd;
//!
//! #[tokio::test]
//! async fn my_service_survives_a_restart_of_etcd() -> Result<(), Box<dyn std::error::Error>> {
//!     let etcd = Etcd::start().await?;
//!     let mut client = etcd.client().await?; // or your own client, of `etcd.endpoint()`
//!     client.put("key", "value", None).await?;
//!
//!     etcd.kill().await?;
//!     // ... check how your service behaves without etcd ...
//!     etcd.start_again().await?; // the same port, the same data
//!
//!     assert_eq!(client.get("key", None).await?.count(), 1);
//!     Ok(()) // dropping the handle stops the server and removes its folder
//! }
//! # fn main() {}
//! ```
//!
//! - [`Etcd`] is one server and [`EtcdCluster`] several. [`Etcd::builder`] takes etcd's flags.
//! - [`EtcdCluster::start_partitionable`] starts members that can be cut off from each other while
//!   clients still reach them.
//! - [`Proxy`] is the network between a client and a server: it can be cut, silent or slow.
//!
//! # Which etcd
//!
//! The program is the one that the environment variable `ETCD` names, else `target/tools/bin/etcd`
//! in the current folder or a folder above it, else `etcd` on PATH. Any release since 3.4 works.
//!
//! # Limits
//!
//! This module needs Unix, because the faults are signals, and tokio's running clock, so it does
//! not work in tests with paused time. All servers bind to 127.0.0.1. etcd runs with
//! `--unsafe-no-fsync`: its data survives the process but not a crash of the machine.

mod builder;
mod cluster;
mod error;
mod etcd;
mod leader;
mod member;
mod options;
mod peers;
mod port;
mod process;
mod proxy;
mod ready;
mod socket_owner;
mod timing;

pub use builder::EtcdBuilder;
pub use cluster::EtcdCluster;
pub use error::TestingError;
pub use etcd::Etcd;
pub use proxy::Proxy;
