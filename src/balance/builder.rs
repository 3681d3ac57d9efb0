//! The settings of a channel.

use std::sync::Arc;
use std::time::Duration;

use http::uri::Scheme;
use http::{HeaderValue, Uri};
use tokio::sync::Semaphore;
use tower_service::Service;

use super::call::{Calls, RetryPolicy};
use super::channel::BalancedChannel;
use super::connection::{BoxError, Connector, CustomConnector, Settings, Tls, wrap_connector};
use super::pick::BalancePolicy;
use super::pool::{
    self, ConnectPlan, DEFAULT_KEEP_FOR, DEFAULT_WINDOW, MassDeletionGuard, Pool, View,
};
use super::source::Source;
use crate::config::TlsConfig;
use crate::error::{Error, Result};
use crate::time::MAX_DURATION;

/// What the channel calls itself, after what the user calls it.
const USER_AGENT: &str = concat!("goo-etcd/", env!("CARGO_PKG_VERSION"));

/// How long a call waits for an endpoint unless configured: G5.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest wait between attempts to connect unless configured. gRPC's is 120 s, which is long
/// for a server that was only restarted; the directory takes the ones that are gone for good away.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// The most connections to one endpoint: each of them carries thousands of calls.
const MOST_CONNECTIONS: usize = 1_000;

/// Settings of a [`BalancedChannel`]. Where tonic's `Endpoint` has a setting, it has the same name.
#[must_use = "a builder does nothing until `build`"]
pub struct BalancedChannelBuilder {
    source: Source,
    policy: BalancePolicy,
    settings: Settings,
    plan: ConnectPlan,
    tls: Option<TlsConfig>,
    connector: Option<CustomConnector>,
    ready_timeout: Duration,
    wait_for_ready: bool,
    timeout: Option<Duration>,
    retry: Option<RetryPolicy>,
    concurrency_limit: Option<usize>,
    user_agent: Option<String>,
    origin: Option<Uri>,
    mass_deletion_guard: Option<Duration>,
    mass_deletion_window: Option<Duration>,
}

impl BalancedChannel {
    /// A channel to a fixed list of addresses, `host:port` or `unix:/path`, without etcd.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for what is not an address.
    pub fn from_endpoints<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::builder(Source::addresses(addresses)?).build()
    }

    /// A channel with settings of its own, over a [`Directory`] or any other [`Source`].
    pub fn builder(source: impl Into<Source>) -> BalancedChannelBuilder {
        BalancedChannelBuilder::new(source.into())
    }
}

impl std::fmt::Debug for BalancedChannelBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalancedChannelBuilder")
            .field("source", &self.source)
            .field("policy", &self.policy)
            .field("settings", &self.settings)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl BalancedChannelBuilder {
    pub(super) fn new(source: Source) -> Self {
        Self {
            source,
            policy: BalancePolicy::default(),
            settings: Settings::default(),
            plan: ConnectPlan {
                connections: 1,
                max_backoff: MAX_BACKOFF,
            },
            tls: None,
            connector: None,
            ready_timeout: READY_TIMEOUT,
            wait_for_ready: true,
            timeout: None,
            retry: None,
            concurrency_limit: None,
            user_agent: None,
            origin: None,
            mass_deletion_guard: None,
            mass_deletion_window: None,
        }
    }

    /// How endpoints are chosen. Default: [`BalancePolicy::PeakEwma`].
    pub fn policy(mut self, policy: BalancePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Speaks TLS to every endpoint, never plaintext. Default: plaintext.
    pub fn tls(mut self, tls: TlsConfig) -> Self {
        self.tls = Some(tls);
        self
    }

    /// How long making a connection may take: TCP, TLS and the server's first word of HTTP/2
    /// together. Default 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.settings.connect_timeout = timeout;
        self
    }

    /// The longest wait between attempts to connect to one endpoint. Default 30 s.
    ///
    /// The waits are those of gRPC: 1 s at first, growing by 1.6, with a jitter of 20 %, starting over
    /// after a connection that held.
    pub fn max_connect_backoff(mut self, max: Duration) -> Self {
        self.plan.max_backoff = max;
        self
    }

    /// How long a call waits for an endpoint that is ready and has room for it, as servers limit the streams
    /// on a connection, if its own time-out does not end before. Default 5 s. Then it fails with UNAVAILABLE and what is known of the endpoints, of ten of them at most.
    ///
    /// Attempts to connect go on beside it at the pace of [`max_connect_backoff`](Self::max_connect_backoff): for
    /// a call to outlast the restart of an only server, this is to be longer than that takes and one wait
    /// more.
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.ready_timeout = timeout;
        self
    }

    /// Whether a call waits for an endpoint at all. Default true; with false it fails at once with
    /// UNAVAILABLE when none is ready. For room on one that is ready it waits even so.
    pub fn wait_for_ready(mut self, wait: bool) -> Self {
        self.wait_for_ready = wait;
        self
    }

    /// How many connections there are to each endpoint. Default 1; more help where a single connection's
    /// throughput is the limit, or the number of streams on it that the server allows. From 1 to 1,000.
    pub fn connections_per_endpoint(mut self, count: usize) -> Self {
        self.plan.connections = count;
        self
    }

    /// Sends failed calls again. Default: none; what provably reached no server is always sent to
    /// another endpoint.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self
    }

    /// The most that each call may take, as if it had set it itself; the shorter of the two counts.
    /// Default: none.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// The most calls in flight on the channel at a time; the others wait for their turn, as long
    /// as for an endpoint. Default: no limit.
    pub fn concurrency_limit(mut self, limit: usize) -> Self {
        self.concurrency_limit = Some(limit);
        self
    }

    /// What the channel calls itself, before its own name and version.
    pub fn user_agent(mut self, agent: impl Into<String>) -> Self {
        self.user_agent = Some(agent.into());
        self
    }

    /// The scheme and authority that requests carry. Default: the endpoint's own.
    pub fn origin(mut self, origin: Uri) -> Self {
        self.origin = Some(origin);
        self
    }

    /// Makes connections: any tower service from `Uri` to I/O, as for tonic's
    /// `connect_with_connector`. TLS, if set, is spoken over what it returns.
    ///
    /// An endpoint `unix:/path` is given to it as `http://localhost/`. Default: TCP, and Unix sockets
    /// for `unix:` addresses.
    pub fn connector<C>(mut self, connector: C) -> Self
    where
        C: Service<Uri> + Clone + Send + Sync + 'static,
        C::Response: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
        C::Error: Into<BoxError>,
        C::Future: Send,
    {
        self.connector = Some(wrap_connector(connector));
        self
    }

    /// Whether `TCP_NODELAY` is set. Default true.
    pub fn tcp_nodelay(mut self, enabled: bool) -> Self {
        self.settings.tcp_nodelay = enabled;
        self
    }

    /// How long a TCP connection is idle before the system probes it. Default: never; HTTP/2's
    /// keep-alive does more.
    pub fn tcp_keepalive(mut self, idle: Option<Duration>) -> Self {
        self.settings.tcp_keepalive = idle;
        self
    }

    /// After how long without a sign of life a connection is pinged; `None`: never. Default 10 s.
    ///
    /// Some servers take pings more often than every 5 minutes for abuse and close the connection
    /// (gRFC A8: those of grpc-go and grpc-java unless told otherwise); set their permitted interval
    /// here.
    pub fn http2_keep_alive_interval(mut self, interval: impl Into<Option<Duration>>) -> Self {
        self.settings.keep_alive.interval = interval.into();
        self
    }

    /// How long a ping may go unanswered before the connection counts as lost. Default 3 s.
    pub fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.settings.keep_alive.timeout = timeout;
        self
    }

    /// Whether connections without calls are pinged too. Default true.
    pub fn keep_alive_while_idle(mut self, enabled: bool) -> Self {
        self.settings.keep_alive.while_idle = enabled;
        self
    }

    /// HTTP/2's flow-control window of a stream, in bytes. Default 2 MiB.
    pub fn initial_stream_window_size(mut self, size: u32) -> Self {
        self.settings.initial_stream_window_size = size;
        self
    }

    /// HTTP/2's flow-control window of a connection, in bytes: how much of all its answers together may wait to
    /// be read. Default 2 GiB - 1, the largest: each stream has a window of its own, and with less a few
    /// streams that nobody reads (3 with tonic's default of 5 MiB) stop all other calls on the connection.
    pub fn initial_connection_window_size(mut self, size: u32) -> Self {
        self.settings.initial_connection_window_size = size;
        self
    }

    /// The most bytes of headers that a response may have. Default 16 KiB.
    pub fn http2_max_header_list_size(mut self, size: u32) -> Self {
        self.settings.max_header_list_size = size;
        self
    }

    /// The largest HTTP/2 frame that is accepted, in bytes, from 16 KiB to 16 MiB less one.
    /// Default 16 KiB.
    pub fn http2_max_frame_size(mut self, size: u32) -> Self {
        self.settings.max_frame_size = Some(size);
        self
    }

    /// For how long endpoints that have vanished from the set together are kept, each while it is
    /// connected; zero: not at all. Default 60 s for a [`Directory`](crate::Directory), whose instances
    /// vanish as well when leases end though the servers live, and none for other sources.
    ///
    /// Together means that within the time of [`mass_deletion_window`](Self::mass_deletion_window) more have
    /// vanished than there are left in the set, new ones included: a fleet that is replaced by another is
    /// let go. One that has said that it is draining is let go
    /// at once, and so is one whose connection is lost; it is not connected anew. What is kept shows as
    /// [`EndpointStatus::retained`](super::EndpointStatus::retained), with a warning in the log; and with the feature
    /// `metrics` as the counter `goo_etcd_mass_deletions_total` and the gauge `goo_etcd_kept_endpoints`, whose
    /// label `service` is the key prefix that the instances are read from.
    pub fn mass_deletion_guard(mut self, keep_for: Duration) -> Self {
        self.mass_deletion_guard = Some(keep_for);
        self
    }

    /// Within which time instances have vanished together, for
    /// [`mass_deletion_guard`](Self::mass_deletion_guard). As leases that are renewed at a third of their time
    /// to live end within a third of it, the default is that of the directory's format and a little more: 5 s
    /// for one of 10 s. Say a longer one where registrars have been given a longer time to live than
    /// the format's own. An endpoint that vanishes alone is out of use at once; for this long its
    /// connection is kept.
    pub fn mass_deletion_window(mut self, window: Duration) -> Self {
        self.mass_deletion_window = Some(window);
        self
    }

    /// Makes the channel and starts to connect. Returns at once.
    ///
    /// Must be called within a Tokio runtime: tasks of its own keep the endpoints connected.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for settings that cannot be used, certificates that cannot be read among
    /// them.
    pub fn build(self) -> Result<BalancedChannel> {
        let mut settings = self.settings;
        let mut plan = self.plan;
        // Longer than any of this will run, and short enough to be added to a time.
        let bounded = |duration: &mut Duration| *duration = (*duration).min(MAX_DURATION);
        bounded(&mut settings.connect_timeout);
        bounded(&mut settings.keep_alive.timeout);
        settings.keep_alive.interval.iter_mut().for_each(bounded);
        bounded(&mut plan.max_backoff);
        let interval = settings.keep_alive.interval;
        let positive = [
            ("connect_timeout", settings.connect_timeout),
            ("max_connect_backoff", plan.max_backoff),
            ("keep_alive_timeout", settings.keep_alive.timeout),
            (
                "http2_keep_alive_interval",
                interval.unwrap_or(MAX_DURATION),
            ),
        ];
        for (field, value) in positive {
            if value.is_zero() {
                return Err(Error::invalid(field, "0 s", "it must be more than zero"));
            }
        }
        // RFC 9113, section 4.2; h2 panics outside of it.
        let frame_sizes = 1 << 14..1 << 24;
        if let Some(size) = settings.max_frame_size.filter(|s| !frame_sizes.contains(s)) {
            let reason = "it must be from 16,384 to 16,777,215";
            return Err(Error::invalid(
                "http2_max_frame_size",
                size.to_string(),
                reason,
            ));
        }
        // RFC 9113, section 6.9.1.
        let windows = [
            (
                "initial_stream_window_size",
                settings.initial_stream_window_size,
            ),
            (
                "initial_connection_window_size",
                settings.initial_connection_window_size,
            ),
        ];
        for (field, size) in windows {
            if size == 0 || size >= 1 << 31 {
                let reason = "a window is from 1 to 2,147,483,647 bytes";
                return Err(Error::invalid(field, size.to_string(), reason));
            }
        }
        if plan.connections == 0 {
            let reason = "at least one connection is needed";
            return Err(Error::invalid("connections_per_endpoint", "0", reason));
        }
        if plan.connections > MOST_CONNECTIONS {
            return Err(Error::invalid(
                "connections_per_endpoint",
                plan.connections.to_string(),
                format!("at most {MOST_CONNECTIONS} are of use"),
            ));
        }
        if self.concurrency_limit == Some(0) {
            let reason = "no call could ever be made";
            return Err(Error::invalid("concurrency_limit", "0", reason));
        }
        let user_agent = match self.user_agent {
            Some(own) => HeaderValue::try_from(format!("{own} {USER_AGENT}"))
                .map_err(|error| Error::invalid("user_agent", own, error.to_string()))?,
            None => HeaderValue::from_static(USER_AGENT),
        };
        if let Some(origin) = &self.origin {
            let known = [Some(&Scheme::HTTP), Some(&Scheme::HTTPS)].contains(&origin.scheme());
            if !known || origin.authority().is_none() {
                let reason = "it must be http:// or https:// with an authority";
                return Err(Error::invalid("origin", origin.to_string(), reason));
            }
        }
        if let Some(tls) = &self.tls {
            tls.validate()?;
        }
        let tls = self.tls.as_ref().map(Tls::new).transpose()?;
        let connector = Arc::new(Connector::new(settings, tls, self.connector));
        let view = Arc::new(View::new(Arc::clone(self.source.name())));
        let keep_for = match self.mass_deletion_guard {
            Some(keep_for) => keep_for.min(MAX_DURATION),
            None if self.source.ttl().is_some() => DEFAULT_KEEP_FOR,
            None => Duration::ZERO,
        };
        let usual = self.source.ttl().map_or(DEFAULT_WINDOW, pool::window);
        let window = self.mass_deletion_window.unwrap_or(usual).min(MAX_DURATION);
        let guard = MassDeletionGuard::new(keep_for, window);
        let pool = Pool::new(Arc::clone(&view), connector, plan, self.policy, guard);
        let calls = Calls {
            view,
            ready_timeout: self.ready_timeout.min(MAX_DURATION),
            wait_for_ready: self.wait_for_ready,
            timeout: self.timeout.map(|timeout| timeout.min(MAX_DURATION)),
            retry: self.retry,
            concurrency: self
                .concurrency_limit
                .map(|limit| Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)))),
            user_agent,
            origin: self.origin,
        };
        let task = tokio::spawn(pool.run(self.source));
        Ok(BalancedChannel::new(calls, task))
    }
}
