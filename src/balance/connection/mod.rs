//! One HTTP/2 connection to an endpoint.
//!
//! ```text
//!   Connector: open (TCP, Unix socket) -> TLS -> HTTP/2 handshake -> Connection
//!                                                                      |
//!   Sender --reserve--> ReservedStream --send--> Incoming (the response's body)
//!      |                                            |
//!      +-- ConnectionState, shared with the driver task and the MonitoredIo
//! ```
//!
//! The connection uses h2 directly and not hyper's client. hyper hands each call through a queue to
//! a task and each response through another task back, which costs two more scheduler turns per
//! call than the stream itself needs. h2 also tells for certain whether a call was sent.
//!
//! [`Connect`] is the seam to the pool: its unit tests use a scripted connector and no network.

mod address_order;
mod addresses;
mod advertised_limit;
mod cancelled_streams;
mod capacity;
mod carried;
mod close_reason;
mod connect;
mod connector;
mod custom_io;
mod driver;
#[cfg(test)]
mod fake;
mod first_response;
mod frames;
mod go_away;
mod header_limits;
mod held_read;
mod io;
mod keep_alive;
mod liveness;
mod lookup;
mod monitor;
#[cfg(test)]
mod name_tests;
mod ping_budget;
mod ping_interval;
mod sender;
mod settings;
mod state;
mod target;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;
mod unprocessed;
mod upload;
mod written;

pub(super) use capacity::Capacity;
pub(super) use carried::{Carried, GREETING};
pub(super) use connect::{Connect, Connection, Ended};
pub(super) use connector::{Connector, CustomConnector, wrap_connector};
#[cfg(test)]
pub(super) use fake::{FakeConnector, STREAM_LIMIT, Script};
pub(super) use header_limits::HeadersTooLarge;
pub(super) use io::BoxError;
pub(crate) use ping_budget::PingPolicy;
pub(super) use sender::{
    Incoming, LATE_RESPONSE_TO_PING, ReservedStream, SendError, SendErrorKind, Sender,
};
pub(super) use settings::ConnectionSettings;
pub(super) use target::Target;
pub(super) use tls::Tls;
pub(super) use unprocessed::Unprocessed;
