//! A configuration from environment variables.

use std::ffi::OsString;
use std::str::FromStr;
use std::time::Duration;

use super::{Config, TlsConfig};
use crate::error::{Error, Result};

impl Config {
    /// The configuration in the process's environment; what is not set has its default.
    ///
    /// Every field has a variable, its name in capitals after `GOO_ETCD_`: `GOO_ETCD_ENDPOINTS`
    /// (separated by commas), `GOO_ETCD_USERNAME`, `GOO_ETCD_DIAL_TIMEOUT` (as `5s`),
    /// `GOO_ETCD_ENABLE_TLS` (`true` or `false`) and so on. The fields of `tls_config` are
    /// `GOO_ETCD_TLS_CA_FILE`, `GOO_ETCD_TLS_CERT_FILE`, `GOO_ETCD_TLS_KEY_FILE`,
    /// `GOO_ETCD_TLS_SERVER_NAME`, `GOO_ETCD_TLS_CA_PEM`, `GOO_ETCD_TLS_CERT_PEM` and
    /// `GOO_ETCD_TLS_KEY_PEM`. An empty variable counts as not set, except that empty endpoints
    /// are an error.
    ///
    /// # Errors
    ///
    /// A value that cannot be read names its variable (and shows the value, unless it is a
    /// secret); so does a variable that starts with `GOO_ETCD_` but is none of these, which
    /// is most likely a typing mistake. Contradictions are those of [`Config::validate`].
    pub fn from_env() -> Result<Self> {
        Self::from_vars(std::env::vars_os())
    }

    fn from_vars(vars: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self> {
        let mut config = Config::default();
        let mut tls = TlsConfig::default();
        for (name, value) in vars {
            if let Some(name) = name.to_str().filter(|name| name.starts_with("GOO_ETCD_")) {
                set(&mut config, &mut tls, name, value)?;
            }
        }
        if tls != TlsConfig::default() {
            config.tls_config = Some(tls);
        }
        config.validate()?;
        Ok(config)
    }
}

fn set(config: &mut Config, tls: &mut TlsConfig, name: &str, value: OsString) -> Result<()> {
    const ENDPOINTS: &str = "GOO_ETCD_ENDPOINTS";
    if value.is_empty() && name != ENDPOINTS {
        return Ok(());
    }
    match name {
        ENDPOINTS => config.endpoints = endpoints(ENDPOINTS, value)?,
        "GOO_ETCD_USERNAME" => config.username = Some(text("GOO_ETCD_USERNAME", value)?),
        "GOO_ETCD_PASSWORD" => config.password = Some(secret("GOO_ETCD_PASSWORD", value)?),
        "GOO_ETCD_DIAL_TIMEOUT" => {
            config.dial_timeout = duration("GOO_ETCD_DIAL_TIMEOUT", value)?;
        }
        "GOO_ETCD_AUTO_SYNC" => {
            config.auto_sync = parsed("GOO_ETCD_AUTO_SYNC", value, "true or false")?;
        }
        "GOO_ETCD_AUTO_SYNC_INTERVAL" => {
            config.auto_sync_interval = duration("GOO_ETCD_AUTO_SYNC_INTERVAL", value)?;
        }
        "GOO_ETCD_MAX_CALL_SEND_MSG_SIZE" => {
            config.max_call_send_msg_size = parsed(
                "GOO_ETCD_MAX_CALL_SEND_MSG_SIZE",
                value,
                "a number of bytes",
            )?;
        }
        "GOO_ETCD_MAX_CALL_RECV_MSG_SIZE" => {
            config.max_call_recv_msg_size = parsed(
                "GOO_ETCD_MAX_CALL_RECV_MSG_SIZE",
                value,
                "a number of bytes",
            )?;
        }
        "GOO_ETCD_ENABLE_COMPRESSION" => {
            config.enable_compression =
                parsed("GOO_ETCD_ENABLE_COMPRESSION", value, "true or false")?;
        }
        "GOO_ETCD_ENABLE_GRPC_DEBUG_LOG" => {
            config.enable_grpc_debug_log =
                parsed("GOO_ETCD_ENABLE_GRPC_DEBUG_LOG", value, "true or false")?;
        }
        "GOO_ETCD_ENABLE_TLS" => {
            config.enable_tls = parsed("GOO_ETCD_ENABLE_TLS", value, "true or false")?;
        }
        "GOO_ETCD_REQUEST_TIMEOUT" => {
            config.request_timeout = duration("GOO_ETCD_REQUEST_TIMEOUT", value)?;
        }
        "GOO_ETCD_KEEP_ALIVE_INTERVAL" => {
            config.keep_alive_interval = duration("GOO_ETCD_KEEP_ALIVE_INTERVAL", value)?;
        }
        "GOO_ETCD_KEEP_ALIVE_TIMEOUT" => {
            config.keep_alive_timeout = duration("GOO_ETCD_KEEP_ALIVE_TIMEOUT", value)?;
        }
        "GOO_ETCD_TLS_CA_FILE" => tls.ca_file = Some(value.into()),
        "GOO_ETCD_TLS_CERT_FILE" => tls.cert_file = Some(value.into()),
        "GOO_ETCD_TLS_KEY_FILE" => tls.key_file = Some(value.into()),
        "GOO_ETCD_TLS_SERVER_NAME" => {
            tls.server_name = Some(text("GOO_ETCD_TLS_SERVER_NAME", value)?);
        }
        "GOO_ETCD_TLS_CA_PEM" => tls.ca_pem = Some(secret("GOO_ETCD_TLS_CA_PEM", value)?),
        "GOO_ETCD_TLS_CERT_PEM" => tls.cert_pem = Some(secret("GOO_ETCD_TLS_CERT_PEM", value)?),
        "GOO_ETCD_TLS_KEY_PEM" => tls.key_pem = Some(secret("GOO_ETCD_TLS_KEY_PEM", value)?),
        unknown => {
            return Err(Error::invalid(
                "environment variable",
                unknown,
                "no field of the configuration has this name",
            ));
        }
    }
    Ok(())
}

fn text(variable: &'static str, value: OsString) -> Result<String> {
    value
        .into_string()
        .map_err(|value| Error::invalid(variable, value.to_string_lossy(), "not UTF-8"))
}

fn secret(variable: &'static str, value: OsString) -> Result<String> {
    value
        .into_string()
        .map_err(|_| Error::invalid(variable, "[redacted]", "not UTF-8"))
}

fn endpoints(variable: &'static str, value: OsString) -> Result<Vec<String>> {
    Ok(text(variable, value)?
        .split(',')
        .map(|endpoint| endpoint.trim().to_owned())
        .filter(|endpoint| !endpoint.is_empty())
        .collect())
}

fn parsed<T: FromStr>(variable: &'static str, value: OsString, expected: &str) -> Result<T> {
    let value = text(variable, value)?;
    value
        .trim()
        .parse()
        .map_err(|_| Error::invalid(variable, value, format!("expected {expected}")))
}

fn duration(variable: &'static str, value: OsString) -> Result<Duration> {
    let value = text(variable, value)?;
    humantime::parse_duration(value.trim())
        .map_err(|_| Error::invalid(variable, value, "expected a duration such as 5s or 500ms"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(vars: &[(&str, &str)]) -> Result<Config> {
        Config::from_vars(vars.iter().map(|(name, value)| (name.into(), value.into())))
    }

    #[test]
    fn given_no_variables_then_the_defaults_hold() {
        assert_eq!(from(&[("PATH", "/bin")]).unwrap(), Config::default());
        assert_eq!(
            from(&[("GOO_ETCD_USERNAME", "")]).unwrap(),
            Config::default()
        );
    }

    #[test]
    fn given_every_variable_then_every_field_is_set() {
        let config = from(&[
            ("GOO_ETCD_ENDPOINTS", "a:1, b:2,"),
            ("GOO_ETCD_USERNAME", "user"),
            ("GOO_ETCD_PASSWORD", "hunter2"),
            ("GOO_ETCD_DIAL_TIMEOUT", "1s"),
            ("GOO_ETCD_AUTO_SYNC", "true"),
            ("GOO_ETCD_AUTO_SYNC_INTERVAL", "1m"),
            ("GOO_ETCD_MAX_CALL_SEND_MSG_SIZE", "1000"),
            ("GOO_ETCD_MAX_CALL_RECV_MSG_SIZE", "2000"),
            ("GOO_ETCD_ENABLE_COMPRESSION", "true"),
            ("GOO_ETCD_ENABLE_GRPC_DEBUG_LOG", "true"),
            ("GOO_ETCD_REQUEST_TIMEOUT", "250ms"),
            ("GOO_ETCD_KEEP_ALIVE_INTERVAL", "20s"),
            ("GOO_ETCD_KEEP_ALIVE_TIMEOUT", "7s"),
        ])
        .unwrap();
        let expected = Config {
            endpoints: vec!["a:1".into(), "b:2".into()],
            username: Some("user".into()),
            password: Some("hunter2".into()),
            dial_timeout: Duration::from_secs(1),
            auto_sync: true,
            auto_sync_interval: Duration::from_secs(60),
            max_call_send_msg_size: 1000,
            max_call_recv_msg_size: 2000,
            enable_compression: true,
            enable_grpc_debug_log: true,
            request_timeout: Duration::from_millis(250),
            keep_alive_interval: Duration::from_secs(20),
            keep_alive_timeout: Duration::from_secs(7),
            ..Config::default()
        };
        assert_eq!(config, expected);
    }

    #[cfg(feature = "_tls")]
    #[test]
    fn given_tls_variables_then_the_tls_config_is_set() {
        let config = from(&[
            ("GOO_ETCD_ENABLE_TLS", "true"),
            ("GOO_ETCD_TLS_CA_FILE", "/ca"),
            ("GOO_ETCD_TLS_CERT_PEM", "cert"),
            ("GOO_ETCD_TLS_KEY_FILE", "/key"),
            ("GOO_ETCD_TLS_SERVER_NAME", "etcd"),
        ])
        .unwrap();
        let expected = TlsConfig::new()
            .ca_file("/ca")
            .cert_pem("cert")
            .key_file("/key")
            .server_name("etcd");
        assert_eq!(config.tls_config, Some(expected));
        assert!(config.enable_tls);
    }

    #[test]
    fn given_a_bad_value_then_the_error_names_variable_and_value() {
        for (name, value) in [
            ("GOO_ETCD_DIAL_TIMEOUT", "soon"),
            ("GOO_ETCD_AUTO_SYNC", "yes"),
            ("GOO_ETCD_MAX_CALL_SEND_MSG_SIZE", "-1"),
            ("GOO_ETCD_MAX_CALL_RECV_MSG_SIZE", "2MiB"),
            ("GOO_ETCD_ENABLE_TLS", "1"),
        ] {
            let text = from(&[(name, value)]).unwrap_err().to_string();
            assert!(text.contains(name) && text.contains(value), "{text}");
        }
        let text = from(&[("GOO_ETCD_ENDPIONTS", "a:1")])
            .unwrap_err()
            .to_string();
        assert!(text.contains("GOO_ETCD_ENDPIONTS"), "{text}");
        let text = from(&[("GOO_ETCD_ENDPOINTS", "")]).unwrap_err().to_string();
        assert!(text.contains("endpoints"), "{text}");
    }

    #[cfg(unix)]
    #[test]
    fn given_an_unreadable_secret_then_the_error_does_not_show_it() {
        use std::os::unix::ffi::OsStringExt;
        let value = OsString::from_vec(b"hunter2\xff".to_vec());
        let text = Config::from_vars([("GOO_ETCD_PASSWORD".into(), value)])
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("GOO_ETCD_PASSWORD") && !text.contains("hunter2"),
            "{text}"
        );
    }
}
