//! Builds a configuration in code.

use std::time::Duration;

use super::{Config, TlsConfig};
use crate::error::Result;

/// Builds a [`Config`]. A field that is not set has its default.
#[derive(Debug, Clone, Default)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct ConfigBuilder(Config);

impl ConfigBuilder {
    /// Sets the addresses of the members, `host:port` or URLs. Replaces earlier ones.
    pub fn endpoints<E: Into<String>>(mut self, endpoints: impl IntoIterator<Item = E>) -> Self {
        self.0.endpoints = endpoints.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the etcd user. Requires [`password`](Self::password).
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.0.username = Some(username.into());
        self
    }

    /// Sets the user's password.
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.0.password = Some(password.into());
        self
    }

    /// Sets the time limit for connecting: TCP, TLS and the first response together. Default: 5 s.
    pub fn dial_timeout(mut self, timeout: Duration) -> Self {
        self.0.dial_timeout = timeout;
        self
    }

    /// Sets whether to fetch the list of members from the cluster. Default: false. Requires
    /// [`auto_sync_interval`](Self::auto_sync_interval).
    pub fn auto_sync(mut self, enabled: bool) -> Self {
        self.0.auto_sync = enabled;
        self
    }

    /// Sets the interval at which the list of members is fetched. Default: 0, never.
    pub fn auto_sync_interval(mut self, interval: Duration) -> Self {
        self.0.auto_sync_interval = interval;
        self
    }

    /// Sets the maximum size of a message to send, in bytes. Default: 2 MiB.
    pub fn max_call_send_msg_size(mut self, bytes: usize) -> Self {
        self.0.max_call_send_msg_size = bytes;
        self
    }

    /// Sets the maximum size of a received message, in bytes. Default: 2 MiB.
    pub fn max_call_recv_msg_size(mut self, bytes: usize) -> Self {
        self.0.max_call_recv_msg_size = bytes;
        self
    }

    /// Sets whether to use gzip compression. Default: false.
    pub fn enable_compression(mut self, enabled: bool) -> Self {
        self.0.enable_compression = enabled;
        self
    }

    /// Sets whether every call to etcd emits a `tracing` debug event. Default: false.
    pub fn enable_grpc_debug_log(mut self, enabled: bool) -> Self {
        self.0.enable_grpc_debug_log = enabled;
        self
    }

    /// Sets whether to connect with TLS. Default: false.
    pub fn enable_tls(mut self, enabled: bool) -> Self {
        self.0.enable_tls = enabled;
        self
    }

    /// Sets the certificates to trust and the client certificate. Requires
    /// [`enable_tls`](Self::enable_tls).
    pub fn tls_config(mut self, tls: TlsConfig) -> Self {
        self.0.tls_config = Some(tls);
        self
    }

    /// Sets the time limit for one operation, from call to response. Default: 5 s.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.0.request_timeout = timeout;
        self
    }

    /// Sets the time without traffic after which a connection is tested with an HTTP/2 ping.
    /// Default: 10 s.
    pub fn keep_alive_interval(mut self, interval: Duration) -> Self {
        self.0.keep_alive_interval = interval;
        self
    }

    /// Sets the time limit for the response to that ping. Default: 3 s.
    pub fn keep_alive_timeout(mut self, timeout: Duration) -> Self {
        self.0.keep_alive_timeout = timeout;
        self
    }

    /// Validates and returns the configuration.
    ///
    /// # Errors
    ///
    /// Fails if [`Config::validate`] does.
    pub fn build(self) -> Result<Config> {
        self.0.validate()?;
        Ok(self.0)
    }
}
