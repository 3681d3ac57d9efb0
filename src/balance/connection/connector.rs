//! Making one connection: TCP or a Unix socket, TLS, HTTP/2.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};
use tower::{Service, ServiceExt};

use super::driver::{self, KeepAlive};
use super::io::{BoxError, BoxIo};
use super::monitor::Observed;
use super::sender::Sender;
use super::state::Shared;
use super::target::Target;
use super::tls::Tls;
use crate::error::chain;

/// A connector of the user's.
pub(crate) type CustomConnector =
    Arc<dyn Fn(Uri) -> BoxFuture<'static, Result<BoxIo, BoxError>> + Send + Sync>;

/// HTTP/2 and TCP settings, under the names that tonic's `Endpoint` gives them.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) connect_timeout: Duration,
    pub(crate) tcp_nodelay: bool,
    pub(crate) tcp_keepalive: Option<Duration>,
    pub(crate) keep_alive: KeepAlive,
    pub(crate) initial_stream_window_size: u32,
    pub(crate) initial_connection_window_size: u32,
    pub(crate) max_header_list_size: u32,
    pub(crate) max_frame_size: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // The same as an etcd client's dial time-out.
            connect_timeout: Duration::from_secs(5),
            tcp_nodelay: true,
            tcp_keepalive: None,
            // gRPC servers may take pings more often than every 5 minutes for abuse (gRFC A8), but
            // those that are met here (tonic, etcd from 5 s on) do not, and a peer that turned silent
            // must be found out in time.
            keep_alive: KeepAlive {
                interval: Some(Duration::from_secs(10)),
                timeout: Duration::from_secs(3),
                while_idle: true,
            },
            // The same as hyper's, and so as that of tonic's channel.
            initial_stream_window_size: 2 * 1024 * 1024,
            // HTTP/2's largest: streams that nobody reads, each bounded by its own window, must not stop the
            // others on the connection.
            initial_connection_window_size: (1 << 31) - 1,
            max_header_list_size: 16 * 1024,
            max_frame_size: None,
        }
    }
}

/// Makes connections; shared by the endpoints of a channel.
pub(crate) struct Connector {
    settings: Settings,
    tls: Option<Tls>,
    custom: Option<CustomConnector>,
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

/// A connection on which the peer has spoken HTTP/2.
pub(crate) struct Connection {
    pub(crate) sender: Sender,
    /// Resolves when no new call can be sent on it any more, with the reason. Calls in flight on it
    /// go on, for as long as the peer lets them, when this is dropped.
    pub(crate) ended: Pin<Box<dyn Future<Output = String> + Send>>,
}

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
            Ok(Box::new(TokioIo::new(io)) as BoxIo)
        })
    })
}

/// How many calls that were given up a connection knows, for a second each, so that what still comes for one
/// is taken for late and not for wrong. As many as a busy one may have at a time; each is some hundred bytes.
const RESETS_KNOWN: usize = 1_000;

impl Connector {
    pub(crate) fn new(
        settings: Settings,
        tls: Option<Tls>,
        custom: Option<CustomConnector>,
    ) -> Self {
        Self {
            settings,
            tls,
            custom,
        }
    }

    /// Whether its connections are TLS.
    pub(crate) fn tls(&self) -> bool {
        self.tls.is_some()
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        self.settings.connect_timeout
    }

    /// Connects, within the connect time-out. The error says what failed, without the address.
    pub(crate) async fn connect(&self, target: &Target) -> Result<Connection, String> {
        let limit = self.settings.connect_timeout;
        let deadline = Instant::now() + limit;
        let late = |stage: &str| format!("{stage} took more than {limit:?}");
        let io = timeout_at(deadline, self.open(target))
            .await
            .map_err(|_| late("connecting"))?
            .map_err(|error| format!("cannot connect: {}", chain(&*error)))?;
        let io = match &self.tls {
            Some(tls) => timeout_at(deadline, tls.secure(target, io))
                .await
                .map_err(|_| late("the TLS handshake"))?
                .map(|io| Box::new(io) as BoxIo)
                .map_err(|error| format!("TLS failed: {error}"))?,
            None => io,
        };
        timeout_at(deadline, self.handshake(io))
            .await
            .map_err(|_| late("the HTTP/2 handshake"))?
    }

    async fn open(&self, target: &Target) -> Result<BoxIo, BoxError> {
        if let Some(custom) = &self.custom {
            return custom(target.uri()?).await;
        }
        if let Some(path) = target.address.strip_prefix("unix:") {
            return Ok(Box::new(UnixStream::connect(path).await?));
        }
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        // Shared out among the addresses of a name, so that one that does not answer leaves time for
        // the next.
        tcp.set_connect_timeout(Some(self.settings.connect_timeout));
        tcp.set_nodelay(self.settings.tcp_nodelay);
        tcp.set_keepalive(self.settings.tcp_keepalive);
        let io = tcp.oneshot(target.uri()?).await?;
        Ok(Box::new(io.into_inner()))
    }

    async fn handshake(&self, io: BoxIo) -> Result<Connection, String> {
        let shared = Shared::new();
        let (observed, observer) = Observed::new(io, Arc::clone(&shared));
        let (sender, connection) = self
            .http2()
            .handshake(observed)
            .await
            .map_err(|error| format!("HTTP/2 failed: {}", chain(&error)))?;
        let keep_alive = self.settings.keep_alive;
        let broken = observer.broken;
        let spent = Arc::clone(&shared);
        let opened = driver::start(sender, connection, shared, keep_alive, broken);
        let (sender, mut closed) = (opened.sender, opened.closed);
        tokio::select! {
            biased;
            Ok(()) = observer.settings => {}
            how = &mut closed => {
                let how = how.unwrap_or_else(|_| "connection lost".to_owned());
                return Err(format!("the peer did not answer as an HTTP/2 server: {how}"));
            }
        }
        let leaving = observer.leaving;
        let ended = Box::pin(async move {
            tokio::select! {
                biased;
                Ok(why) = leaving => why,
                how = closed => how.unwrap_or_else(|_| "connection lost".to_owned()),
                () = spent.spent() => "it can take no more calls".to_owned(),
            }
        });
        Ok(Connection { sender, ended })
    }

    fn http2(&self) -> h2::client::Builder {
        let settings = &self.settings;
        let mut http2 = h2::client::Builder::new();
        http2
            .enable_push(false)
            // Calls that are given up are reset from this side, however many: an answer that crosses a reset
            // is nothing that the server does wrong.
            .max_local_error_reset_streams(None)
            .max_concurrent_reset_streams(RESETS_KNOWN)
            // By default h2 ends a connection on which small messages wait for a reader. The windows bound what
            // may wait, and a slow reader is no fault of the server.
            .data_frame_budget(usize::MAX)
            .initial_window_size(settings.initial_stream_window_size)
            .initial_connection_window_size(settings.initial_connection_window_size)
            .max_header_list_size(settings.max_header_list_size);
        if let Some(size) = settings.max_frame_size {
            http2.max_frame_size(size);
        }
        http2
    }
}
