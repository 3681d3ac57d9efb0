//! Keeps instances registered in etcd.
//!
//! A [`Registrar`] holds the instances that should be in etcd, and keeps working until etcd has
//! them: it grants a lease, puts the instances' keys under the lease, and renews the lease after a
//! third of its TTL. After a lost lease, a restart of etcd or a cut network the registrar registers
//! again after a random pause, and keeps trying until the registration is deregistered or dropped.
//!
//! The instances of a registrar share a lease and its stream of renewals, up to a hundred keys per
//! lease.
//!
//! # Parts
//!
//! - [`handle`] and [`builder`]: the public [`Registrar`]. [`registration`]: its [`Registration`]s.
//! - [`lease_groups`] assigns each registration to a lease.
//! - [`driver`]: one task per lease, which drives the state machine of [`state`]. The page of
//!   `state` lists the faults, and how each of them is handled.
//! - [`executor`] performs the state machine's requests at etcd; [`key_watch`] reports changes of
//!   the keys by other clients.
//! - [`readiness`] registers an instance only while its server is ready.
//!
//! # Changes by other clients
//!
//! Each key is watched. A key that was deleted or overwritten by hand is restored at once. If
//! another process registers the same key, the later registration wins, and this one becomes
//! [`Superseded`](RegistrationState::Superseded) until the other is gone. When both recover at the
//! same time, the first to write keeps the key. Each write is conditional on the revisions that
//! were read before, so a late write undoes nothing. A registrar needs permission to read and to
//! write its keys.
//!
//! # Shutdown
//!
//! [`Registration::leave_on`] is made for servers: on the signal it marks the instance as draining,
//! so that clients stop choosing it, deletes the key after a grace period, and then lets the server
//! stop accepting. [`Registrar::close`] drains all registrations of a process, and waits until etcd
//! has deleted the keys and revoked the leases. Dropping a registration deregisters the instance at
//! once, but does not wait for etcd. After a crash the keys disappear with the lease, after its TTL
//! at most.

mod builder;
mod driver;
mod executor;
mod handle;
mod key_watch;
mod lease_groups;
mod readiness;
mod registration;
#[cfg(feature = "health")]
mod serving;
mod settings;
mod state;
mod states;

pub use builder::RegistrarBuilder;
pub use handle::Registrar;
pub use registration::Registration;
#[cfg(feature = "health")]
pub use serving::{Serving, serving};
pub use state::RegistrationState;
pub use states::RegistrationStates;
