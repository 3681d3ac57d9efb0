//! How to reach an etcd cluster: from code, from a file through serde, from the environment.

mod builder;
mod endpoint;
mod env;
mod secret;
mod tls;
mod validate;

use std::fmt;
use std::time::Duration;

use serde::Deserialize;

pub use builder::ConfigBuilder;
pub(crate) use endpoint::endpoint_uri;
pub use tls::TlsConfig;

/// How a [`Client`](crate::Client) reaches an etcd cluster.
///
/// Made by [`Config::default`] and changed field by field, by [`Config::builder`], by
/// [`Config::from_env`], or by serde from YAML, TOML or JSON, where durations are written as
/// `"5s"` or `"1m 30s"`, missing fields have their default and unknown ones are errors.
/// [`Config::validate`] refuses what contradicts itself; [`Client::connect`](crate::Client::connect)
/// calls it.
///
/// `Debug` shows neither the password nor key material. Nor do errors: of a password that is a number and
/// no string only the field is named. (The `toml` crate adds the line of the file to what it prints, but not
/// to its error's `message()`.)
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
    /// The members: `host:port`, or URLs `http://host:port`, `https://host:port`.
    /// Default: `["localhost:2379"]`. Empty is an error.
    pub endpoints: Vec<String>,

    /// The etcd user. Default: none. Needs `password`.
    pub username: Option<String>,

    /// The user's password. Default: none. Needs `username`.
    #[serde(deserialize_with = "secret::password")]
    pub password: Option<String>,

    /// The time for TCP, TLS and the first answer, together. Default: 5 s.
    #[serde(with = "humantime_serde")]
    pub dial_timeout: Duration,

    /// Keep the list of members up to date from the cluster itself. Default: false.
    /// Needs `auto_sync_interval`. Learners, members that have not started, and URLs of the other scheme
    /// (`http` with TLS, `https` without) are left out. An answer without any usable member changes
    /// nothing, and while none can be had the configured endpoints are tried as well. From 3.5.28 and 3.6.9 on
    /// etcd lists its members only to root where it asks for users; another is warned once.
    pub auto_sync: bool,

    /// How often the list of members is refreshed. Default: 0, never.
    #[serde(with = "humantime_serde")]
    pub auto_sync_interval: Duration,

    /// The largest message that is sent, in bytes, before compression. Default: 2 MiB. One that is larger
    /// is an error, and nothing is sent.
    pub max_call_send_msg_size: usize,

    /// The largest message that is received, in bytes, after decompression, watches included.
    /// Default: 2 MiB. Less than that may end a watch that has much to catch up with: etcd sends it in
    /// pieces of up to 2 MiB. Above 4 MiB it counts for keys and watches only; other answers, as those on
    /// leases and members, are at most 4 MiB.
    pub max_call_recv_msg_size: usize,

    /// Compress requests with gzip, and have the answers compressed. Default: false. etcd can do it from
    /// 3.5 on.
    pub enable_compression: bool,

    /// Emit a `tracing` debug event for every call to etcd, when it is over: method, member, status,
    /// time; never keys or values. Default: false.
    pub enable_grpc_debug_log: bool,

    /// Connect with TLS. Default: false. With no `tls_config` the system's roots are trusted.
    pub enable_tls: bool,

    /// Which servers to trust, and which certificate to show. Default: none. Needs `enable_tls`.
    pub tls_config: Option<TlsConfig>,

    /// The time for one operation, from call to answer. Default: 5 s. Streams are bound by it
    /// only until they are open.
    #[serde(with = "humantime_serde")]
    pub request_timeout: Duration,

    /// How long a connection may be silent before it is tested with an HTTP/2 ping.
    /// Default: 10 s. etcd refuses pings that come more often than every 5 s.
    #[serde(with = "humantime_serde")]
    pub keep_alive_interval: Duration,

    /// How long the answer to that ping may take before the connection is given up.
    /// Default: 3 s.
    #[serde(with = "humantime_serde")]
    pub keep_alive_timeout: Duration,
}

impl Config {
    /// A builder that starts from the defaults.
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder::default()
    }
}

/// Two mebibytes, the limit that etcd's own server and client use for a request
/// (`--max-request-bytes` 1.5 MiB, and half a MiB for the envelope).
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

/// What is shown in place of a secret.
struct Redacted;

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Whether a secret is there, without the secret.
fn redacted<T>(secret: &Option<T>) -> Option<Redacted> {
    secret.as_ref().map(|_| Redacted)
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints: Vec<_> = self.endpoints.iter().map(|e| endpoint::shown(e)).collect();
        f.debug_struct("Config")
            .field("endpoints", &endpoints)
            .field("username", &self.username)
            .field("password", &redacted(&self.password))
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
