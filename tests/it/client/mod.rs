//! The client of etcd: calls, streams, leases, locks, members and users.

mod auth;
mod call_log;
#[cfg(feature = "tls-ring")]
mod certificates;
mod close;
mod endpoints;
mod faults;
mod gateways;
mod idle_connections;
mod learners;
mod leases;
mod limits;
mod locks;
mod members;
mod operations;
mod refused_renewals;
#[cfg(feature = "tls-ring")]
mod tls;
mod watch;
