//! Registrations: how they come, stay and go.

mod close;
mod faults;
#[cfg(feature = "health")]
mod health;
mod registration;
