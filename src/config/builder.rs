//! A configuration written in code.

use std::time::Duration;

use super::{Config, TlsConfig};
use crate::error::Result;

/// Builds a [`Config`]; every field that is not set has its default.
#[derive(Debug, Clone, Default)]
#[must_use = "a builder does nothing until `build`"]
pub struct ConfigBuilder(Config);

impl ConfigBuilder {
    /// The members, in place of those set before: `host:port` or URLs.
    pub fn endpoints<E: Into<String>>(mut self, endpoints: impl IntoIterator<Item = E>) -> Self {
        self.0.endpoints = endpoints.into_iter().map(Into::into).collect();
        self
    }

    /// The etcd user.
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.0.username = Some(username.into());
        self
    }

    /// The user's password.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.0.password = Some(password.into());
        self
    }

    /// The time for TCP, TLS and the first answer, together.
    pub fn dial_timeout(mut self, timeout: impl Into<Duration>) -> Self {
        self.0.dial_timeout = timeout.into();
        self
    }

    /// Whether to keep the list of members up to date from the cluster itself.
    pub fn auto_sync(mut self, enabled: bool) -> Self {
        self.0.auto_sync = enabled;
        self
    }

    /// How often the list of members is refreshed.
    pub fn auto_sync_interval(mut self, interval: impl Into<Duration>) -> Self {
        self.0.auto_sync_interval = interval.into();
        self
    }

    /// The largest message that is sent, in bytes.
    pub fn max_call_send_msg_size(mut self, bytes: usize) -> Self {
        self.0.max_call_send_msg_size = bytes;
        self
    }

    /// The largest message that is received, in bytes.
    pub fn max_call_recv_msg_size(mut self, bytes: usize) -> Self {
        self.0.max_call_recv_msg_size = bytes;
        self
    }

    /// Whether requests are compressed with gzip.
    pub fn enable_compression(mut self, enabled: bool) -> Self {
        self.0.enable_compression = enabled;
        self
    }

    /// Whether every call to etcd emits a `tracing` debug event.
    pub fn enable_grpc_debug_log(mut self, enabled: bool) -> Self {
        self.0.enable_grpc_debug_log = enabled;
        self
    }

    /// Whether to connect with TLS.
    pub fn enable_tls(mut self, enabled: bool) -> Self {
        self.0.enable_tls = enabled;
        self
    }

    /// Which servers to trust and which certificate to show; needs [`enable_tls`](Self::enable_tls).
    pub fn tls_config(mut self, tls: impl Into<TlsConfig>) -> Self {
        self.0.tls_config = Some(tls.into());
        self
    }

    /// The time for one operation, from call to answer.
    pub fn request_timeout(mut self, timeout: impl Into<Duration>) -> Self {
        self.0.request_timeout = timeout.into();
        self
    }

    /// How long a connection may be silent before it is tested.
    pub fn keep_alive_interval(mut self, interval: impl Into<Duration>) -> Self {
        self.0.keep_alive_interval = interval.into();
        self
    }

    /// How long the answer to such a test may take.
    pub fn keep_alive_timeout(mut self, timeout: impl Into<Duration>) -> Self {
        self.0.keep_alive_timeout = timeout.into();
        self
    }

    /// The configuration.
    ///
    /// # Errors
    ///
    /// What [`Config::validate`] refuses.
    pub fn build(self) -> Result<Config> {
        self.0.validate()?;
        Ok(self.0)
    }
}
