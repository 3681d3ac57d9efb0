//! One HTTP/2 connection to an endpoint: made, driven by a task of its own, and used by calls.

mod connector;
mod driver;
mod io;
mod monitor;
mod sender;
mod settings;
mod state;
mod target;
mod tls;
mod upload;

pub(super) use connector::{Connector, CustomConnector, Settings, wrap_connector};
pub(super) use io::BoxError;
pub(super) use sender::{Fate, Incoming, Reserved, SendError, Sender};
pub(super) use target::Target;
pub(super) use tls::Tls;
