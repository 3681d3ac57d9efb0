#![forbid(unsafe_code)]
#![warn(missing_docs)]
//! Service registration, discovery and client-side load balancing for tonic gRPC, on etcd.
//!
//! Servers come and go; etcd holds the list of those that are there. This crate keeps a server on that
//! list for as long as it lives, and keeps a client's channel connected to who is on it.
//!
//! # A server registers
//!
//! A [`Registrar`] holds what should be in etcd and keeps making it so: under a lease, renewed at a third
//! of its time to live, and granted anew when it was lost. [`Registration::leave_on`] is what tonic's
//! shutdown waits for: the instance is marked as draining, then its key is deleted, then the server
//! stops accepting.
//!
//! ```no_run
//! use goo_etcd::{Client, Config, Instance, Registrar};
//! use helloworld::greeter::greeter_server::{Greeter, GreeterServer};
//! use tonic::transport::server::{Server, TcpIncoming};
//!
//! # async fn serve(greeter: impl Greeter) -> Result<(), Box<dyn std::error::Error>> {
//! // Bound before it registers: whoever finds it can connect.
//! let incoming = TcpIncoming::bind("0.0.0.0:50051".parse()?)?;
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
//! # A client follows
//!
//! A [`Directory`] lists a service and watches it, and publishes what it knows as whole, immutable
//! [`Snapshot`]s. While etcd is away the last one stays in use, marked with its
//! [age](Snapshot::freshness). A [`BalancedChannel`] keeps each of them connected and sends every call to
//! one that is.
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
//! # Where to go from here
//!
//! - [`mod@balance`] tells how a call finds its server, and what happens when one dies.
//! - [`Directory::balance_channel`] feeds tonic's own balancing, [`Directory::discover`] a tower
//!   balancer of yours, and [`Directory::changes`] anything else.
//! - [`Client`] is etcd itself: keys, leases, transactions, locks, elections, watches ([`Watch`] resumes by itself). The
//!   clients of a process can have names: see [`clients`].
//! - [`Config`] comes from code, from the [environment](Config::from_env), or from a file through serde.
//! - [`mod@format`] is how an instance is written in etcd: by default as Go's
//!   `go.etcd.io/etcd/client/v3/naming` does, or as go-zero, kratos, kitex, go-micro or dubbo-go do, or
//!   in several formats at once.
//! - `testing` (feature of that name) runs real etcd servers for tests, and hurts them.
//!
//! # Runtime and features
//!
//! Everything runs on Tokio. Every background task belongs to a handle and ends with its last clone.
//! No feature is on by default; TLS to etcd is `tls`, or a backend of your choice: `tls-ring`,
//! `tls-aws-lc`, with `tls-native-roots` or `tls-webpki-roots`. `health` registers a
//! server while its own health service says that it serves. `metrics` counts what the guard against
//! [mass deletion](balance::BalancedChannelBuilder::mass_deletion_guard) does, for whatever recorder of
//! the crate `metrics` is installed.

mod backoff;
pub mod balance;
pub mod client;
pub mod clients;
mod config;
mod directory;
mod error;
pub mod format;
mod instance;
mod registrar;
mod snapshot;
mod telemetry;
#[cfg(feature = "testing")]
pub mod testing;
mod time;

pub use balance::{
    BalancePolicy, BalancedChannel, BalancedChannelBuilder, EndpointState, EndpointStatus,
    RetryPolicy,
};
pub use client::{
    Client, Compare, CompareOp, DeleteOptions, Event, EventType, GetOptions, KeepAlive, KeyValue,
    Leaders, Leadership, Lock, PutOptions, SortOrder, SortTarget, Txn, TxnOp, TxnOpResponse, Watch,
    WatchOptions, WatchResponse,
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
#[cfg(feature = "health")]
pub use registrar::serving;
pub use registrar::{
    Registrar, RegistrarBuilder, Registration, RegistrationState, RegistrationStates,
};
pub use snapshot::{Freshness, InstanceKey, Snapshot, SnapshotIter};

/// The client beneath; [`Client::client`] gives one of its own.
pub use etcd_client;

/// What the README and the guide for those who come from Go show compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
#[doc = include_str!("../FROM_GO.md")]
struct ReadmeDoctests;
