//! The settings of a channel.

mod build;

use std::fmt;
use std::time::Duration;

use http::Uri;
use tower_service::Service;

use super::call::RetryPolicy;
use super::channel::BalancedChannel;
use super::connection::{
    BoxError, ConnectionSettings, CustomConnector, PingPolicy, wrap_connector,
};
use super::pick::BalancePolicy;
use super::pool::ConnectPlan;
use super::source::Source;
use crate::config::TlsConfig;
use crate::error::Result;

/// How long a call waits for an endpoint by default.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// Settings of a [`BalancedChannel`]. Settings that tonic's `Endpoint` has too have the same names.
///
/// [`build`](Self::build) refuses values out of range, and names the setting. Durations longer than
/// 30 years are taken as 30 years.
///
/// ```no_run
/// # async fn example(directory: goo_etcd::Directory) -> goo_etcd::Result<()> {
/// use std::time::Duration;
///
/// use goo_etcd::{BalancePolicy, BalancedChannel, RetryPolicy};
///
/// let channel = BalancedChannel::builder(directory)
///     .policy(BalancePolicy::LeastRequest)
///     .retry(RetryPolicy::new(3))
///     .timeout(Duration::from_secs(10))
///     .build()?;
/// # Ok(())
/// # }
/// ```
#[must_use = "a builder does nothing until `build`"]
pub struct BalancedChannelBuilder {
    source: Source,
    policy: BalancePolicy,
    settings: ConnectionSettings,
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
    /// Creates a channel to a fixed list of addresses, `host:port` or `unix:/path`, without etcd.
    ///
    /// Must be called within a Tokio runtime, as [`BalancedChannelBuilder::build`]. For other
    /// settings than the default ones, build a channel over [`Source::addresses`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for an address that is not valid, and
    /// [`Error::NoRuntime`](crate::Error::NoRuntime), as for [`BalancedChannelBuilder::build`].
    pub fn from_endpoints<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::builder(Source::addresses(addresses)?).build()
    }

    /// Returns a builder of a channel over a [`Directory`](crate::Directory) or another [`Source`].
    pub fn builder(source: impl Into<Source>) -> BalancedChannelBuilder {
        BalancedChannelBuilder::new(source.into())
    }
}

impl BalancedChannelBuilder {
    fn new(source: Source) -> Self {
        Self {
            source,
            policy: BalancePolicy::default(),
            settings: ConnectionSettings::default(),
            plan: ConnectPlan::default(),
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

    /// Sets how the endpoint of a call is picked. Default: [`BalancePolicy::PeakEwma`].
    pub fn policy(mut self, policy: BalancePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Speaks TLS to every endpoint, never plaintext. Default: plaintext.
    ///
    /// The certificates are read by [`build`](Self::build). A server's certificate must be valid
    /// for the host of its address, or for the `server_name` of the [`TlsConfig`].
    pub fn tls(mut self, tls: TlsConfig) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets the timeout of one attempt to connect: looking up the name, TCP, TLS and the server's
    /// first HTTP/2 frame together. Default 5 s; must be more than zero.
    ///
    /// If the name has several addresses, the time is for all of them. Each address is tried to the
    /// end of the handshake. The next one starts after 250 ms (RFC 8305), or at once when an
    /// attempt fails. The first that completes is used, and is tried first next time; last if its
    /// connection ended within 1 s, or with calls sent on it, without a response.
    ///
    /// At most 16 names are looked up at a time in a process; others wait. A name keeps its turn
    /// when the time is over. At most 12 of the look-ups are of names that are new or did not
    /// resolve within 1 s last time, and at most 8 are of names that did not resolve. Look-ups that
    /// hang, because name servers do not respond, therefore leave threads for the other names. A
    /// new name behind 1,000 new ones that hang for 10 s may wait for 14 minutes, or for 42 if 8
    /// names hang as well that did not resolve last time.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.settings.connect_timeout = timeout;
        self
    }

    /// Sets the longest backoff between two attempts to connect to an endpoint. Default 30 s;
    /// must be more than zero.
    ///
    /// The backoff is gRPC's: 1 s at first, growing by a factor of 1.6, with a jitter of 20 %. A
    /// connection that has carried a response or was ready for 1 s resets the backoff and is
    /// replaced at once; others that became ready are replaced at once twice in a row.
    pub fn max_connect_backoff(mut self, max: Duration) -> Self {
        self.plan.max_backoff = max;
        self
    }

    /// Sets how long a call waits for a ready endpoint with a free stream, because servers limit
    /// the streams of a connection. Calls are served in the order in which they started. The call's
    /// own deadline may be earlier. Default 5 s. With zero a call does not wait.
    ///
    /// After this time the call fails with `UNAVAILABLE` and the state of up to ten endpoints. Time
    /// that the call has spent at servers before a transparent retry counts as well.
    ///
    /// A waiting call is handed its stream when its turn comes, whether or not its future is
    /// polled. A call that is not polled keeps that stream from other calls until it is polled or
    /// dropped.
    ///
    /// Waiting calls do not shorten the backoff after a failed attempt to connect. For a call to
    /// survive the restart of the only server, set this to the time of a restart plus
    /// [`max_connect_backoff`](Self::max_connect_backoff).
    pub fn ready_timeout(mut self, timeout: Duration) -> Self {
        self.ready_timeout = timeout;
        self
    }

    /// Sets whether a call waits for endpoints that fail. Default true. With false a call fails at
    /// once with `UNAVAILABLE` while no endpoint is ready and the last attempt to connect to each
    /// of them has failed.
    ///
    /// As in gRPC, a call always waits while the first attempts to connect run or a lost
    /// connection is being replaced. A call also waits for the first set of instances, for a free
    /// stream if the ready endpoints have none, and for its turn under
    /// [`concurrency_limit`](Self::concurrency_limit).
    pub fn wait_for_ready(mut self, wait: bool) -> Self {
        self.wait_for_ready = wait;
        self
    }

    /// Sets the number of connections to each endpoint, from 1 to 1,000. Default 1.
    ///
    /// More connections help where the limit is one connection's throughput or number of streams.
    pub fn connections_per_endpoint(mut self, count: usize) -> Self {
        self.plan.connections = count;
        self
    }

    /// Retries failed calls. Default: none.
    ///
    /// Without a policy, only calls that provably reached no server application are sent again.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self
    }

    /// Sets the longest timeout of a call, whose own may be shorter. Default: none.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets how many calls may be in flight on the channel at a time. Further calls wait, for at
    /// most [`ready_timeout`](Self::ready_timeout), which also limits their wait for an endpoint.
    /// Default: no limit; must be at least 1.
    pub fn concurrency_limit(mut self, limit: usize) -> Self {
        self.concurrency_limit = Some(limit);
        self
    }

    /// Sets the user agent, which precedes the channel's own name and version. Default: none.
    ///
    /// [`build`](Self::build) refuses text that cannot be the value of a header.
    pub fn user_agent(mut self, agent: impl Into<String>) -> Self {
        self.user_agent = Some(agent.into());
        self
    }

    /// Sets the scheme and authority of requests. Default: the endpoint's. Must be `http://` or
    /// `https://` with an authority.
    pub fn origin(mut self, origin: Uri) -> Self {
        self.origin = Some(origin);
        self
    }

    /// Sets how connections are opened: any service from `Uri` to I/O, as for tonic's
    /// `connect_with_connector`. TLS, if set, is spoken over that I/O.
    ///
    /// For the address `unix:/path` the connector gets `http://localhost/`. Default: TCP, and Unix
    /// sockets for `unix:` addresses.
    ///
    /// A panic of the connector or its I/O is a failed attempt to connect, or ends the connection.
    ///
    /// The connector sets the options of its sockets. A small `TCP_NOTSENT_LOWAT`, which the
    /// channel sets on its own, keeps pings from waiting behind a long upload over a slow network.
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

    /// Sets `TCP_NODELAY`. Default true.
    pub fn tcp_nodelay(mut self, enabled: bool) -> Self {
        self.settings.tcp_nodelay = enabled;
        self
    }

    /// Sets after which idle time the operating system probes a TCP connection; `None`: never.
    /// Default 20 s. A host that does not answer is found after 3 probes, 5 s apart, also while the
    /// connection may not be pinged.
    pub fn tcp_keepalive(mut self, idle: Option<Duration>) -> Self {
        self.settings.tcp_keepalive = idle;
        self
    }

    /// Sets after how long without received data to ping; `None`: never. Default 10 s;
    /// must be more than zero.
    ///
    /// Servers treat pings without traffic as abuse and close the connection (gRFC A8), so the
    /// channel limits them to the number that gRPC servers accept by default: after each HEADERS or
    /// DATA frame of the server two pings at the interval, then one every 5 minutes, or every 2
    /// hours while there is no call. One of the two is sent while the connection is idle. After
    /// that, the next call is preceded by the second, and is sent when the server has responded.
    /// Without a response within an eighth of the [`keep_alive_timeout`](Self::keep_alive_timeout),
    /// 375 ms by default, that call and later ones go to other connections until the server
    /// responds. After the whole timeout the connection is considered lost.
    ///
    /// A server may permit fewer pings than usual. When it closes a connection because of too many
    /// pings, the interval doubles for this endpoint, up to 2 hours, and a warning is logged.
    pub fn http2_keep_alive_interval(mut self, interval: Option<Duration>) -> Self {
        self.settings.keep_alive.interval = interval;
        self
    }

    /// Sets how long after a ping without a response a connection is considered lost. Default 3 s;
    /// must be more than zero.
    ///
    /// During an upload the response waits until the server has read what the systems on both sides
    /// have buffered. The timeout is therefore longer by the time for which writes had to wait. For
    /// uploads of less than about 12 KiB/s set a longer timeout.
    pub fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.settings.keep_alive.timeout = timeout;
        self
    }

    /// Sets whether connections without calls are pinged too. Default true.
    ///
    /// If not, a call on a connection that was idle for longer than the interval is preceded by a
    /// ping.
    pub fn keep_alive_while_idle(mut self, enabled: bool) -> Self {
        self.settings.keep_alive.while_idle = enabled;
        self
    }

    /// Sets how many pings the servers accept. Default: as many as gRPC servers by default.
    pub(crate) fn ping_policy(mut self, policy: PingPolicy) -> Self {
        self.settings.keep_alive.policy = policy;
        self
    }

    /// Sets HTTP/2's flow-control window of a stream, in bytes, from 1 to 2 GiB - 1. Default 2 MiB.
    pub fn initial_stream_window_size(mut self, size: u32) -> Self {
        self.settings.initial_stream_window_size = size;
        self
    }

    /// Sets HTTP/2's flow-control window of a connection, in bytes, from 1 to 2 GiB - 1. The window
    /// is how much of all responses together may wait to be read. Default 2 GiB - 1.
    ///
    /// Each stream has its own window. With a smaller connection window, a few streams that
    /// nobody reads (3 with tonic's default of 5 MiB) stop all other calls on the connection.
    pub fn initial_connection_window_size(mut self, size: u32) -> Self {
        self.settings.initial_connection_window_size = size;
        self
    }

    /// Sets the largest size of a response's headers and of its trailers, in bytes, at least 256.
    /// Default 16 KiB.
    ///
    /// Each header counts with the lengths of its name and value and 32 bytes more (RFC 9113,
    /// section 6.5.2). Servers are told the limit (`SETTINGS_MAX_HEADER_LIST_SIZE`). A call whose
    /// response exceeds the limit fails with `RESOURCE_EXHAUSTED`. No other call is affected unless
    /// the headers also exceed 1 MiB, which may end the connection.
    ///
    /// The setting does not apply to requests. A call whose headers exceed the limit that its
    /// server has announced fails with `RESOURCE_EXHAUSTED` and is not sent.
    pub fn http2_max_header_list_size(mut self, size: u32) -> Self {
        self.settings.max_header_list_size = size;
        self
    }

    /// Sets the largest HTTP/2 frame that is accepted, in bytes, from 16 KiB to 16 MiB - 1. Default
    /// 16 KiB.
    pub fn http2_max_frame_size(mut self, size: u32) -> Self {
        self.settings.max_frame_size = Some(size);
        self
    }

    /// Sets how long connected endpoints are retained after a mass deletion; zero disables the
    /// guard. Default 60 s for a [`Directory`](crate::Directory), because leases can expire while
    /// the servers live, and zero for other sources.
    ///
    /// A mass deletion: within the [`mass_deletion_window`](Self::mass_deletion_window) more
    /// instances have disappeared than remain in the set. Remaining instances include new ones, so
    /// a fleet that is replaced by another is not retained. Draining and disconnected endpoints are
    /// never retained, and a retained endpoint is not reconnected.
    ///
    /// Retained endpoints show as [`EndpointStatus::retained`](super::EndpointStatus::retained),
    /// and a warning is logged. With the feature `metrics` the counter
    /// `goo_etcd_mass_deletions_total` counts mass deletions, and the gauge
    /// `goo_etcd_retained_endpoints` is the number of retained endpoints; their label `service` is
    /// the key prefix of the instances.
    pub fn mass_deletion_guard(mut self, keep_for: Duration) -> Self {
        self.mass_deletion_guard = Some(keep_for);
        self
    }

    /// Sets the time within which the [`mass_deletion_guard`](Self::mass_deletion_guard) counts
    /// deletions as one mass deletion. Default: a third of the TTL of the directory's format plus
    /// 1.7 s, which is 5 s for the usual TTL of 10 s; and 5 s for other sources.
    ///
    /// Leases are renewed at a third of their TTL, so leases that end by one cause end within that
    /// time. Set a longer window if registrars use a longer TTL than the format's. An endpoint that
    /// disappears gets no new calls at once; its connection is kept for the window.
    pub fn mass_deletion_window(mut self, window: Duration) -> Self {
        self.mass_deletion_window = Some(window);
        self
    }
}

impl fmt::Debug for BalancedChannelBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalancedChannelBuilder")
            .field("source", &self.source)
            .field("policy", &self.policy)
            .field("settings", &self.settings)
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}
