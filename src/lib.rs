#![forbid(unsafe_code)]
#![warn(missing_docs)]
//! Service registration, discovery and client-side load balancing for tonic gRPC, on etcd.
//!
//! Servers come and go, and etcd holds the list of the running ones. This crate keeps a server on
//! that list while it runs, and keeps a client's channel connected to the servers on the list.
//!
//! # Server
//!
//! A [`Registrar`] holds the desired state of etcd and keeps restoring it. Instances are written
//! under a lease, which is renewed at a third of its time to live and replaced when it is lost.
//! [`Registration::leave_on`] makes the shutdown signal for tonic: on your signal it marks the
//! instance as draining, deletes its key, and only then lets the server stop accepting.
//!
//! ```no_run
//! use goo_etcd::{Client, Config, Instance, Registrar};
//! use helloworld::greeter::greeter_server::{Greeter, GreeterServer};
//! use tonic::transport::server::{Server, TcpIncoming};
//!
//! # async fn serve(greeter: impl Greeter) -> Result<(), Box<dyn std::error::Error>> {
//! // Bind before registering, so that clients can connect as soon as they find the server. With
//! // Nagle's algorithm, 100 calls of a Go client take 3.3 s instead of 33 ms: switch it off.
//! let incoming = TcpIncoming::bind("0.0.0.0:50051".parse()?)?.with_nodelay(Some(true));
//! let client = Client::connect("server", Config::from_env()?).await?;
//! let registration = Registrar::new(&client)
//!     .register(Instance::new("greeter", "10.0.0.5:50051").zone("eu-1a"))
//!     .await?;
//! Server::builder()
//!     .add_service(GreeterServer::new(greeter))
//!     .serve_with_incoming_shutdown(incoming, registration.leave_on(tokio::signal::ctrl_c()))
//!     .await?;
//! # Ok(())
//! # }
//! ```
//!
//! A process with several registrations ends them all with [`Registrar::close`].
//!
//! # Client
//!
//! A [`Directory`] lists and watches the instances of a service, and publishes them as complete,
//! immutable [`Snapshot`]s. While etcd is down the last snapshot stays in use; its
//! [freshness](Snapshot::freshness) tells its age. A [`BalancedChannel`] connects to every instance
//! in the snapshot and sends each call to a connected one.
//!
//! ```no_run
//! use goo_etcd::{BalancedChannel, Client, Config};
//! use helloworld::greeter::{HelloRequest, greeter_client::GreeterClient};
//!
//! # async fn greet() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("client", Config::from_env()?).await?;
//! let channel = BalancedChannel::connect(&client, "greeter").await?;
//! let mut greeter = GreeterClient::new(channel);
//! let reply = greeter.say_hello(HelloRequest { name: "you".into() }).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Overview
//!
//! - [`mod@balance`] explains how a call finds its server, and what happens when a server dies.
//! - [`Directory::balance_channel`] feeds tonic's own balancing, [`Directory::discover`] feeds a
//!   tower balancer, and [`Directory::changes`] is a stream of snapshots.
//! - [`Client`] is the etcd client: keys, leases, transactions, locks, elections, and watches that
//!   resume ([`Watch`]). A process can register its clients by name; see [`clients`].
//! - [`Config`] comes from code, from the [environment](Config::from_env), or from a file through
//!   serde.
//! - [`mod@format`] defines how an instance is written in etcd: like Go's
//!   `go.etcd.io/etcd/client/v3/naming` (the default), go-zero, kratos, kitex, go-micro or
//!   dubbo-go, or in several formats at once.
//! - `testing` (a feature) runs real etcd servers for tests, and injects faults.
//!
//! # Runtime and features
//!
//! This crate needs the Tokio runtime. Every background task belongs to a handle and ends when the
//! last handle that uses it drops. A directory, a registrar and a watch hold their client, so they
//! continue without the [`Client`] they were made from.
//!
//! No feature is enabled by default:
//!
//! - `tls`: TLS; the same as `tls-ring` and `tls-native-roots`. `tls-ring` and `tls-aws-lc` choose
//!   the cryptography, `tls-native-roots` and `tls-webpki-roots` the trusted root certificates.
//! - `health`: registers a server while its own health service reports it as serving.
//! - `metrics`: counts mass deletions (see
//!   [`mass_deletion_guard`](balance::BalancedChannelBuilder::mass_deletion_guard)) through the
//!   facade crate `metrics`.
//! - `testing`: the module `testing`.
//!
//! # Public dependencies
//!
//! Signatures of this crate use types of these crates, so that a new incompatible version of one of
//! them is an incompatible change of this crate:
//!
//! - `tonic` 0.14: channels, bodies and statuses; re-exported as [`tonic`].
//! - `etcd-client` 0.21: options and responses of etcd; re-exported as [`etcd_client`].
//! - `tower` 0.5 (`Change`) and `tower-service` 0.3 (`Service`).
//! - `futures` 0.3 (`Stream`), `http` 1 (`Uri`), and for a connector `hyper` 1 (`Read`, `Write`).
//! - `serde` 1, for `Config`, `TlsConfig` and `BalancePolicy`.

mod backoff;
pub mod balance;
pub mod client;
pub mod clients;
mod config;
mod directory;
mod error;
pub mod format;
mod host_port;
mod instance;
mod panics;
mod reasons;
mod registrar;
mod runtime;
mod snapshot;
mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod time;

pub use balance::{
    BalancePolicy, BalancedChannel, BalancedChannelBuilder, EndpointState, EndpointStatus,
    EndpointStatuses, ParseBalancePolicyError, RetryPolicy, ServedBy,
};
pub use client::{
    Client, Compare, CompareOp, DeleteOptions, Event, EventType, GetOptions, KeepAlive, KeyValue,
    Leaders, Leadership, LeaseTimeToLiveOptions, Lock, PutOptions, SortOrder, SortTarget, Txn,
    TxnOp, TxnOpResponse, Watch, WatchFilterType, WatchOptions, WatchResponse,
};
#[doc(no_inline)]
pub use clients::{
    close_all, default, get_client, get_default_client, ping, register, register_default,
    set_default, unregister, unregister_default,
};
pub use config::{Config, ConfigBuilder, TlsConfig};
pub use directory::{Directory, DirectoryBuilder, Discovery, EndpointChanges, Snapshots};
pub use error::{Error, Result};
pub use instance::Instance;
pub use registrar::{
    Registrar, RegistrarBuilder, Registration, RegistrationState, RegistrationStates,
};
#[cfg(feature = "health")]
pub use registrar::{Serving, serving};
pub use snapshot::{Freshness, InstanceKey, Snapshot, SnapshotIter};

/// The etcd client that this crate builds on; see [`Client::client`].
pub use etcd_client;
/// The gRPC library whose types this crate's signatures use.
pub use tonic;

/// Compiles the code in the README and in the guide for users of the Go package.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../FROM_GO.md")]
struct ReadmeDoctests;
