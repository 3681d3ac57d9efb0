//! Checks a configuration before it is used.

use std::time::Duration;

use super::{Config, TlsConfig, endpoint_address};
use crate::error::{Error, Result};

/// The shortest keep-alive interval that etcd accepts (`--grpc-keepalive-min-time`, default 5 s).
pub(crate) const MIN_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// The longest duration in a configuration: 100 years. A sum of several such durations can still be
/// added to an `Instant` without overflow.
const MAX_TIME: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl Config {
    /// Checks each field, and that the fields do not contradict each other. Reads no file and opens
    /// no connection.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the field, its value (unless secret) and the reason.
    pub fn validate(&self) -> Result<()> {
        if self.endpoints.is_empty() {
            return Err(Error::invalid(
                "endpoints",
                "[]",
                "at least one endpoint is required, such as localhost:2379",
            ));
        }
        for endpoint in &self.endpoints {
            endpoint_address(endpoint, self.enable_tls)?;
        }
        self.validate_user()?;
        self.validate_times()?;
        for (field, size) in [
            ("max_call_send_msg_size", self.max_call_send_msg_size),
            ("max_call_recv_msg_size", self.max_call_recv_msg_size),
        ] {
            if size == 0 {
                return Err(Error::invalid(field, "0", "must be greater than zero"));
            }
        }
        match &self.tls_config {
            Some(_) if !self.enable_tls => Err(Error::invalid(
                "tls_config",
                "set",
                "requires enable_tls; without it the connection would be plaintext",
            )),
            Some(tls) => tls.validate(),
            None => Ok(()),
        }?;
        if self.enable_tls && !cfg!(feature = "_tls") {
            return Err(Error::invalid(
                "enable_tls",
                "true",
                "this build has no TLS; enable the cargo feature `tls` of goo-etcd",
            ));
        }
        Ok(())
    }

    fn validate_user(&self) -> Result<()> {
        match (&self.username, &self.password) {
            (Some(name), _) if name.is_empty() => {
                Err(Error::invalid("username", "", "must not be empty"))
            }
            (Some(name), None) => Err(Error::invalid("username", name, "requires a password")),
            (None, Some(_)) => Err(Error::invalid(
                "password",
                "[redacted]",
                "requires a username",
            )),
            _ => Ok(()),
        }
    }

    fn validate_times(&self) -> Result<()> {
        for (field, time, may_be_zero) in [
            ("dial_timeout", self.dial_timeout, false),
            ("request_timeout", self.request_timeout, false),
            ("keep_alive_timeout", self.keep_alive_timeout, false),
            ("keep_alive_interval", self.keep_alive_interval, false),
            ("auto_sync_interval", self.auto_sync_interval, true),
        ] {
            let invalid = |reason| {
                let value = humantime::format_duration(time).to_string();
                Err(Error::invalid(field, value, reason))
            };
            if time.is_zero() && !may_be_zero {
                return invalid("must be greater than zero");
            }
            if time > MAX_TIME {
                return invalid("must be at most 100 years");
            }
        }
        if self.keep_alive_interval < MIN_KEEP_ALIVE_INTERVAL {
            return Err(Error::invalid(
                "keep_alive_interval",
                humantime::format_duration(self.keep_alive_interval).to_string(),
                "must be at least 5s: etcd disconnects clients that ping more often",
            ));
        }
        if self.auto_sync && self.auto_sync_interval.is_zero() {
            return Err(Error::invalid(
                "auto_sync_interval",
                "0s",
                "auto_sync requires an interval, such as 30s",
            ));
        }
        Ok(())
    }
}

impl TlsConfig {
    pub(crate) fn validate(&self) -> Result<()> {
        let both_set = |field, value: &std::path::Path, other: &str| {
            let value = value.display().to_string();
            Err(Error::invalid(
                field,
                value,
                format!("{other} is set too; set only one of them"),
            ))
        };
        if let (Some(file), Some(_)) = (&self.ca_file, &self.ca_pem) {
            return both_set("tls_config.ca_file", file, "ca_pem");
        }
        if let (Some(file), Some(_)) = (&self.cert_file, &self.cert_pem) {
            return both_set("tls_config.cert_file", file, "cert_pem");
        }
        if let (Some(file), Some(_)) = (&self.key_file, &self.key_pem) {
            return both_set("tls_config.key_file", file, "key_pem");
        }
        let cert = self.cert_file.is_some() || self.cert_pem.is_some();
        let key = self.key_file.is_some() || self.key_pem.is_some();
        let (field, file, missing) = match (cert, key) {
            (true, false) => match &self.cert_file {
                Some(file) => ("tls_config.cert_file", Some(file), "key_file or key_pem"),
                None => ("tls_config.cert_pem", None, "key_file or key_pem"),
            },
            (false, true) => match &self.key_file {
                Some(file) => ("tls_config.key_file", Some(file), "cert_file or cert_pem"),
                None => ("tls_config.key_pem", None, "cert_file or cert_pem"),
            },
            _ => return self.validate_server_name(),
        };
        let value = file.map_or("[redacted]".to_owned(), |file| file.display().to_string());
        Err(Error::invalid(field, value, format!("requires {missing}")))
    }

    fn validate_server_name(&self) -> Result<()> {
        match self.server_name.as_deref() {
            Some("") => Err(Error::invalid(
                "tls_config.server_name",
                "",
                "must not be empty; leave it out to check the endpoint's host",
            )),
            _ => Ok(()),
        }
    }
}
