//! The promises of the crate, kept against real etcd servers and real gRPC servers.
//!
//! All tests are one program, so they are linked once and run in parallel. Each test therefore
//! starts its own servers, and no test changes the environment of the process. A test that needs a
//! process to itself runs in a child (see [`support::process`]); a test that measures time holds
//! [`support::alone`].

mod balance;
mod client;
mod config;
mod directory;
mod end_to_end;
mod formats;
mod idle_etcd;
mod invalid_arguments;
mod migration;
mod named_clients;
mod partitions;
mod reasons;
mod registrar;
mod runtimes;
mod structure;
mod support;
mod testing;
mod upgrade;
