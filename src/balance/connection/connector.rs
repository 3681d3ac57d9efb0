//! Opening a connection: TCP or a Unix socket, then TLS, then HTTP/2.

use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use tower::{Service, ServiceExt};

use super::address_order::AddressOrder;
use super::addresses::connect_to_any;
use super::advertised_limit::AdvertisedLimit;
use super::carried::Carried;
use super::connect::{Connect, Connection, Ended};
use super::custom_io::CustomIo;
use super::driver;
use super::first_response::FirstResponse;
use super::header_limits::{self, HeaderLimits};
use super::io::{BoxError, BoxIo};
use super::lookup::Lookups;
use super::monitor::MonitoredIo;
use super::ping_interval::PingInterval;
use super::sender::Sender;
use super::settings::ConnectionSettings;
use super::state::ConnectionState;
use super::target::Target;
use super::tcp;
use super::tls::Tls;
use crate::error::chain;

/// A connector that the user of the channel provides.
pub(crate) type CustomConnector =
    Arc<dyn Fn(Uri) -> BoxFuture<'static, Result<BoxIo, BoxError>> + Send + Sync>;

/// How many cancelled streams h2 remembers, each of them one second, so that frames which still
/// arrive for such a stream are ignored and are no protocol error. A busy connection may have this
/// many; each takes some hundred bytes.
const REMEMBERED_RESETS: usize = 1_000;

/// Opens the connections of a channel's endpoints.
pub(crate) struct Connector {
    settings: ConnectionSettings,
    tls: Option<Tls>,
    custom: Option<CustomConnector>,
    lookups: Lookups,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector")
            .field("settings", &self.settings)
            .field("tls", &self.tls.is_some())
            .field("custom", &self.custom.is_some())
            .finish()
    }
}

/// Turns a tower service from `Uri` to I/O into a [`CustomConnector`].
pub(crate) fn wrap_connector<C>(connector: C) -> CustomConnector
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    C::Error: Into<BoxError>,
    C::Future: Send,
{
    Arc::new(move |uri| {
        let connector = connector.clone();
        Box::pin(async move {
            let io = connector.oneshot(uri).await.map_err(Into::into)?;
            Ok(Box::new(CustomIo::new(TokioIo::new(io))) as BoxIo)
        })
    })
}

impl Connect for Connector {
    fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    fn connect_timeout(&self) -> Duration {
        self.settings.connect_timeout
    }

    async fn connect(&self, target: &Target) -> Result<Connection, String> {
        let deadline = Instant::now() + self.settings.connect_timeout;
        if let Some(custom) = &self.custom {
            let open = async { custom(target.uri()?).await };
            return self.establish(target, open, deadline).await;
        }
        if let Some(path) = target.address.strip_prefix("unix:") {
            let open = async { Ok(Box::new(UnixStream::connect(path).await?) as BoxIo) };
            return self.establish(target, open, deadline).await;
        }
        let found = self.look_up(target, deadline).await?;
        let order = &target.address_order;
        let (address, connection) = connect_to_any(order, &found, deadline, |address| {
            let open = async move {
                let stream = tcp::connect(address, &self.settings).await?;
                Ok(Box::new(stream) as BoxIo)
            };
            self.establish(target, open, deadline)
        })
        .await?;
        Ok(match found.len() {
            1 => connection,
            _ => record_end(order.clone(), address, connection),
        })
    }
}

/// Lets the end of a connection decide whether its address is tried first or last next time.
fn record_end(order: AddressOrder, address: SocketAddr, connection: Connection) -> Connection {
    let connected = Instant::now();
    let Connection { sender, ended } = connection;
    let ended = Box::pin(async move {
        let ended = ended.await;
        order.record_end(address, connected.elapsed(), &ended.carried);
        ended
    });
    Connection { sender, ended }
}

impl Connector {
    pub(crate) fn new(
        settings: ConnectionSettings,
        tls: Option<Tls>,
        custom: Option<CustomConnector>,
    ) -> Self {
        Self {
            settings,
            tls,
            custom,
            lookups: Lookups::of_process(),
        }
    }

    /// Replaces the resolver of names.
    #[cfg(test)]
    pub(super) fn with_lookups(mut self, lookups: Lookups) -> Self {
        self.lookups = lookups;
        self
    }

    /// The addresses of a target's host.
    async fn look_up(&self, target: &Target, deadline: Instant) -> Result<Vec<SocketAddr>, String> {
        if let Ok(address) = target.address.parse() {
            return Ok(vec![address]);
        }
        let authority = &target.authority;
        let port = authority.port_u16().unwrap_or_default();
        let lookup = self.lookups.look_up(authority.host(), port);
        timeout_at(deadline, lookup).await.map_err(|_| {
            self.timed_out(match self.lookups.is_waiting(authority.host()) {
                true => "waiting for look-ups of other names",
                false => "looking up the name",
            })
        })?
    }

    /// Opens a connection to one address, up to the end of the HTTP/2 handshake.
    async fn establish(
        &self,
        target: &Target,
        open: impl Future<Output = Result<BoxIo, BoxError>>,
        deadline: Instant,
    ) -> Result<Connection, String> {
        let io = timeout_at(deadline, open)
            .await
            .map_err(|_| self.timed_out("connecting"))?
            .map_err(|error| format!("cannot connect: {}", chain(&*error)))?;
        let io = match &self.tls {
            Some(tls) => timeout_at(deadline, tls.secure(target, io))
                .await
                .map_err(|_| self.timed_out("the TLS handshake"))?
                .map(|io| Box::new(io) as BoxIo)
                .map_err(|error| format!("TLS failed: {error}"))?,
            None => io,
        };
        timeout_at(deadline, self.handshake(target, io))
            .await
            .map_err(|_| self.timed_out("the HTTP/2 handshake"))?
    }

    fn timed_out(&self, step: &str) -> String {
        let limit = self.settings.connect_timeout;
        format!("{step} took more than {limit:?}")
    }

    /// Performs the HTTP/2 handshake, which is complete when the peer's SETTINGS have arrived.
    async fn handshake(&self, target: &Target, io: BoxIo) -> Result<Connection, String> {
        let header_limit = self.settings.max_header_list_size;
        let first_response = FirstResponse::new(target.last_end.clone());
        let state = ConnectionState::with(HeaderLimits::new(header_limit), first_response);
        let io = Box::new(AdvertisedLimit::new(io, header_limit)) as BoxIo;
        let mut keep_alive = self.settings.keep_alive;
        let interval = PingInterval::new(&target.address, keep_alive.interval, &target.doublings);
        keep_alive.interval = interval.get();
        let (io, events) = MonitoredIo::new(io, Arc::clone(&state), interval);
        let (h2, connection) = self
            .http2()
            .handshake(io)
            .await
            .map_err(|error| format!("HTTP/2 failed: {}", chain(&error)))?;
        let sender = Sender::new(h2, Arc::clone(&state));
        let mut closed = driver::spawn(
            connection,
            Arc::clone(&state),
            keep_alive,
            events.write_failed,
        );
        // The driver's sender is dropped without a reason only if the runtime shuts down.
        let or_lost = |reason: Result<String, _>| reason.unwrap_or("connection lost".to_owned());
        tokio::select! {
            biased;
            Ok(()) = events.settings => {}
            reason = &mut closed => {
                let reason = or_lost(reason);
                return Err(format!("the peer did not answer as an HTTP/2 server: {reason}"));
            }
        }
        let going_away = events.going_away;
        let ended = Box::pin(async move {
            let reason = tokio::select! {
                biased;
                Ok(reason) = going_away => reason,
                reason = closed => or_lost(reason),
                () = state.wait_until_exhausted() => "the connection accepts no more streams".to_owned(),
            };
            Ended {
                reason,
                carried: Carried::of(&state),
            }
        });
        Ok(Connection { sender, ended })
    }

    fn http2(&self) -> h2::client::Builder {
        let settings = &self.settings;
        let mut http2 = h2::client::Builder::new();
        http2
            .enable_push(false)
            // This side resets cancelled calls, in any number. h2 would count a response that
            // crosses such a reset as the server's fault.
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(REMEMBERED_RESETS)
            // By default h2 closes a connection on which many small messages wait for a reader. The
            // windows already bound how much may wait, and a slow reader is no fault of the server.
            .data_frame_budget(usize::MAX)
            .initial_window_size(settings.initial_stream_window_size)
            .initial_connection_window_size(settings.initial_connection_window_size)
            .max_header_list_size(header_limits::readable(settings.max_header_list_size));
        if let Some(size) = settings.max_frame_size {
            http2.max_frame_size(size);
        }
        http2
    }
}
