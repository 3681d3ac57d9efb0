//! Renewing leases.

mod clock;

pub(in crate::client) use clock::LeaseClock;
