//! Calls through a `BalancedChannel`.

mod addresses;
mod attempts;
mod fairness;
mod faults;
mod frames;
mod header_limits;
mod http_pages;
mod input;
mod interop;
mod isolation;
mod limits;
mod mass_deletion;
mod picking;
mod pings;
mod poison;
mod ready;
mod recycling;
mod requests;
mod served_by;
mod streams;
#[cfg(feature = "_tls")]
mod tls;
mod transport;
mod uploads;
mod waiting;
