//! The configuration of a client: from code, from a file through serde, or from the environment.

mod builder;
mod endpoint;
mod env;
#[cfg(feature = "_tls")]
mod pem;
mod secret;
mod service_variable;
mod tls;
mod validate;

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

pub use builder::ConfigBuilder;
pub(crate) use endpoint::endpoint_address;
use endpoint::redact_userinfo;
#[cfg(feature = "_tls")]
pub(crate) use pem::Pem;
pub use tls::TlsConfig;
pub(crate) use validate::MIN_KEEP_ALIVE_INTERVAL;

/// How a [`Client`](crate::Client) reaches an etcd cluster.
///
/// Make one with [`Config::builder`], with [`Config::from_env`], from [`Config::default`] field by
/// field, or with serde from YAML, TOML or JSON. In a file, durations are written as `"5s"` or
/// `"1m 30s"`, missing fields have their default, and unknown fields are errors.
///
/// [`Client::connect`](crate::Client::connect) calls [`Config::validate`], which refuses fields
/// that are invalid or contradict each other.
///
/// Neither `Debug` nor errors show the password or key material. For a password that is a number
/// instead of a string, for example, the error names only the field. (When the `toml` crate prints
/// an error it adds the line of the file; its `message()` does not.)
///
/// ```
/// use std::time::Duration;
/// use goo_etcd::Config;
///
/// # fn main() -> goo_etcd::Result<()> {
/// let config = Config::builder()
///     .endpoints(["etcd-1:2379", "etcd-2:2379", "etcd-3:2379"])
///     .username("app")
///     .password("secret")
///     .dial_timeout(Duration::from_secs(3))
///     .build()?;
/// assert!(!format!("{config:?}").contains("secret"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Config {
    /// The addresses of the members: `host:port`, or URLs `http://host:port`, `https://host:port`.
    /// Default: `["localhost:2379"]`. An empty list is an error.
    pub endpoints: Vec<String>,

    /// The etcd user. Default: none. Requires `password`.
    pub username: Option<String>,

    /// The user's password. Default: none. Requires `username`.
    #[serde(deserialize_with = "secret::password")]
    pub password: Option<String>,

    /// The time limit for connecting: TCP, TLS and the first response together. Default: 5 s.
    #[serde(with = "humantime_serde")]
    pub dial_timeout: Duration,

    /// Whether to fetch the list of members from the cluster. Default: false. Requires
    /// `auto_sync_interval`.
    ///
    /// Learners, members that have not started, and URLs of the other scheme (`http` with TLS,
    /// `https` without) are ignored. So are loopback addresses, unless an endpoint is configured
    /// with one. A listed member is called once it has responded, and the configured endpoints stay
    /// in use until every listed member has been connected, so a list of addresses that cannot be
    /// reached from here changes nothing. They also stay if a voting member has no usable URL. The
    /// configured endpoints are used again while no member is connected or no list can be fetched.
    ///
    /// With authentication enabled, some releases of etcd, such as 3.6.9, list their members to root
    /// only; for another user the client logs one warning. Some releases, such as 3.6.9 and 3.6.16,
    /// tell the cluster's id only to users, and the client sends its password and token to members
    /// only. Listed addresses that are not configured are therefore not called there.
    ///
    /// A listed address counts as a member if it has the cluster's id. etcd derives the id from the
    /// first members' names, peer URLs and `--initial-cluster-token`, so two etcds with default
    /// settings have the same one: give each cluster a token of its own where both are reached
    /// through loopback.
    pub auto_sync: bool,

    /// The interval at which the list of members is fetched. Default: 0, never.
    #[serde(with = "humantime_serde")]
    pub auto_sync_interval: Duration,

    /// The maximum size of a message to send, in bytes, before compression. Default: 2 MiB. A
    /// larger message is an error and is not sent.
    pub max_call_send_msg_size: usize,

    /// The maximum size of a received message, in bytes, after decompression. Default: 2 MiB.
    ///
    /// A lower limit may end a watch that has many events to catch up with, because etcd sends them
    /// in messages of up to 2 MiB. A limit above 4 MiB applies to keys and watches only; other
    /// responses, such as those about leases and members, are limited to 4 MiB.
    pub max_call_recv_msg_size: usize,

    /// Whether to compress requests with gzip, and to ask for compressed responses. Default: false.
    /// Requires etcd 3.5 or newer.
    pub enable_compression: bool,

    /// Whether to emit a `tracing` debug event at the end of every call to etcd, with its method,
    /// member, status and duration, but never with keys or values. Default: false.
    pub enable_grpc_debug_log: bool,

    /// Whether to connect with TLS. Default: false. Without `tls_config` the system's root
    /// certificates are trusted.
    pub enable_tls: bool,

    /// The certificates to trust and the client certificate. Default: none. Requires `enable_tls`.
    pub tls_config: Option<TlsConfig>,

    /// The time limit for one operation, from call to response. Default: 5 s. For a stream it
    /// limits the opening only.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,

    /// The time without traffic after which a connection is tested with an HTTP/2 ping.
    /// Default: 10 s. Minimum: 5 s, because etcd refuses more frequent pings. A connection without
    /// operations is tested once, and again before the next operation, because etcd closes
    /// connections that ping while idle.
    #[serde(with = "humantime_serde")]
    pub keep_alive_interval: Duration,

    /// The time limit for the response to that ping; then the connection is closed. Default: 3 s.
    #[serde(with = "humantime_serde")]
    pub keep_alive_timeout: Duration,
}

impl Config {
    /// Creates a builder with the default values.
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder::default()
    }
}

/// 2 MiB, the request limit of etcd's own server and client: 1.5 MiB (`--max-request-bytes`) plus
/// 0.5 MiB for the envelope.
const MAX_MESSAGE: usize = 2 * 1024 * 1024;

impl Default for Config {
    fn default() -> Self {
        Config {
            endpoints: vec!["localhost:2379".to_owned()],
            username: None,
            password: None,
            dial_timeout: Duration::from_secs(5),
            auto_sync: false,
            auto_sync_interval: Duration::ZERO,
            max_call_send_msg_size: MAX_MESSAGE,
            max_call_recv_msg_size: MAX_MESSAGE,
            enable_compression: false,
            enable_grpc_debug_log: false,
            enable_tls: false,
            tls_config: None,
            request_timeout: Duration::from_secs(5),
            keep_alive_interval: Duration::from_secs(10),
            keep_alive_timeout: Duration::from_secs(3),
        }
    }
}

/// The `Debug` output in place of a secret.
struct Redacted;

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Replaces a secret that is set.
fn redact<T>(secret: &Option<T>) -> Option<Redacted> {
    secret.as_ref().map(|_| Redacted)
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<_> = self
            .endpoints
            .iter()
            .map(|endpoint| redact_userinfo(endpoint))
            .collect();
        f.debug_struct("Config")
            .field("endpoints", &endpoints)
            .field("username", &self.username)
            .field("password", &redact(&self.password))
            .field("dial_timeout", &self.dial_timeout)
            .field("auto_sync", &self.auto_sync)
            .field("auto_sync_interval", &self.auto_sync_interval)
            .field("max_call_send_msg_size", &self.max_call_send_msg_size)
            .field("max_call_recv_msg_size", &self.max_call_recv_msg_size)
            .field("enable_compression", &self.enable_compression)
            .field("enable_grpc_debug_log", &self.enable_grpc_debug_log)
            .field("enable_tls", &self.enable_tls)
            .field("tls_config", &self.tls_config)
            .field("request_timeout", &self.request_timeout)
            .field("keep_alive_interval", &self.keep_alive_interval)
            .field("keep_alive_timeout", &self.keep_alive_timeout)
            .finish()
    }
}
