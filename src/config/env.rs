//! Reads a configuration from environment variables.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::service_variable::is_service_variable;
use super::{Config, TlsConfig};
use crate::error::{Error, Result};

impl Config {
    /// Reads the configuration from the process's environment. A field whose variable is not set
    /// has its default.
    ///
    /// A field's variable is `GOO_ETCD_` and the field's name in capitals: `GOO_ETCD_ENDPOINTS`
    /// (separated by commas), `GOO_ETCD_USERNAME`, `GOO_ETCD_DIAL_TIMEOUT` (such as `5s`),
    /// `GOO_ETCD_ENABLE_TLS` (`true` or `false`) and so on. The fields of `tls_config` are
    /// `GOO_ETCD_TLS_CA_FILE`, `GOO_ETCD_TLS_CERT_FILE`, `GOO_ETCD_TLS_KEY_FILE`,
    /// `GOO_ETCD_TLS_SERVER_NAME`, `GOO_ETCD_TLS_CA_PEM`, `GOO_ETCD_TLS_CERT_PEM` and
    /// `GOO_ETCD_TLS_KEY_PEM`. An empty variable counts as not set; only empty endpoints are an
    /// error.
    ///
    /// # Errors
    ///
    /// Fails if a value cannot be parsed; the error names the variable, and shows the value unless
    /// it is a secret. Fails for an unknown variable that starts with `GOO_ETCD_`, which is most
    /// likely a typing mistake; only the variables that Kubernetes writes for a service named
    /// `goo-etcd` or `goo-etcd-...`, such as `GOO_ETCD_SERVICE_HOST`, are ignored. Fails if
    /// [`Config::validate`] does.
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

/// A field of [`Config`] or [`TlsConfig`], by its type.
enum Field<'a> {
    /// Separated by commas.
    List(&'a mut Vec<String>),
    Text(&'a mut Option<String>),
    /// A text that errors must not show.
    Secret(&'a mut Option<String>),
    Path(&'a mut Option<PathBuf>),
    Flag(&'a mut bool),
    Bytes(&'a mut usize),
    Time(&'a mut Duration),
}

const ENDPOINTS: &str = "GOO_ETCD_ENDPOINTS";

/// All variables and the fields that they set.
#[rustfmt::skip] // One line per variable.
fn fields<'a>(config: &'a mut Config, tls: &'a mut TlsConfig) -> [(&'static str, Field<'a>); 21] {
    use Field::{Bytes, Flag, List, Path, Secret, Text, Time};
    [
        (ENDPOINTS, List(&mut config.endpoints)),
        ("GOO_ETCD_USERNAME", Text(&mut config.username)),
        ("GOO_ETCD_PASSWORD", Secret(&mut config.password)),
        ("GOO_ETCD_DIAL_TIMEOUT", Time(&mut config.dial_timeout)),
        ("GOO_ETCD_AUTO_SYNC", Flag(&mut config.auto_sync)),
        ("GOO_ETCD_AUTO_SYNC_INTERVAL", Time(&mut config.auto_sync_interval)),
        ("GOO_ETCD_MAX_CALL_SEND_MSG_SIZE", Bytes(&mut config.max_call_send_msg_size)),
        ("GOO_ETCD_MAX_CALL_RECV_MSG_SIZE", Bytes(&mut config.max_call_recv_msg_size)),
        ("GOO_ETCD_ENABLE_COMPRESSION", Flag(&mut config.enable_compression)),
        ("GOO_ETCD_ENABLE_GRPC_DEBUG_LOG", Flag(&mut config.enable_grpc_debug_log)),
        ("GOO_ETCD_ENABLE_TLS", Flag(&mut config.enable_tls)),
        ("GOO_ETCD_REQUEST_TIMEOUT", Time(&mut config.request_timeout)),
        ("GOO_ETCD_KEEP_ALIVE_INTERVAL", Time(&mut config.keep_alive_interval)),
        ("GOO_ETCD_KEEP_ALIVE_TIMEOUT", Time(&mut config.keep_alive_timeout)),
        ("GOO_ETCD_TLS_CA_FILE", Path(&mut tls.ca_file)),
        ("GOO_ETCD_TLS_CERT_FILE", Path(&mut tls.cert_file)),
        ("GOO_ETCD_TLS_KEY_FILE", Path(&mut tls.key_file)),
        ("GOO_ETCD_TLS_SERVER_NAME", Text(&mut tls.server_name)),
        ("GOO_ETCD_TLS_CA_PEM", Secret(&mut tls.ca_pem)),
        ("GOO_ETCD_TLS_CERT_PEM", Secret(&mut tls.cert_pem)),
        ("GOO_ETCD_TLS_KEY_PEM", Secret(&mut tls.key_pem)),
    ]
}

fn set(config: &mut Config, tls: &mut TlsConfig, name: &str, value: OsString) -> Result<()> {
    if value.is_empty() && name != ENDPOINTS {
        return Ok(());
    }
    let mut fields = fields(config, tls).into_iter();
    let Some((name, field)) = fields.find(|(known, _)| *known == name) else {
        return refuse_unless_of_service(name, &value);
    };
    match field {
        Field::List(field) => *field = parse_list(&text(name, value)?),
        Field::Text(field) => *field = Some(text(name, value)?),
        Field::Secret(field) => *field = Some(secret(name, value)?),
        Field::Path(field) => *field = Some(value.into()),
        Field::Flag(field) => *field = parse(name, value, "true or false")?,
        Field::Bytes(field) => *field = parse(name, value, "a number of bytes")?,
        Field::Time(field) => *field = parse_duration(name, value)?,
    }
    Ok(())
}

/// Ignores a variable that Kubernetes writes for a service. Any other variable is a mistake.
fn refuse_unless_of_service(name: &str, value: &OsStr) -> Result<()> {
    if value
        .to_str()
        .is_some_and(|value| is_service_variable(name, value))
    {
        tracing::debug!(name, "ignoring a variable of a Kubernetes service");
        return Ok(());
    }
    Err(Error::invalid(
        "environment variable",
        name,
        "unknown setting",
    ))
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

fn parse_list(value: &str) -> Vec<String> {
    value
        .split(',')
        .map(|item| item.trim().to_owned())
        .filter(|item| !item.is_empty())
        .collect()
}

fn parse<T: FromStr>(variable: &'static str, value: OsString, expected: &str) -> Result<T> {
    let value = text(variable, value)?;
    value
        .trim()
        .parse()
        .map_err(|_| Error::invalid(variable, value, format!("expected {expected}")))
}

fn parse_duration(variable: &'static str, value: OsString) -> Result<Duration> {
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
    fn defaults_without_variables() {
        assert_eq!(from(&[("PATH", "/bin")]).unwrap(), Config::default());
        assert_eq!(
            from(&[("GOO_ETCD_USERNAME", "")]).unwrap(),
            Config::default()
        );
    }

    #[test]
    fn every_variable_sets_its_field() {
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
    fn tls_variables_set_the_tls_config() {
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
    fn variables_of_kubernetes_services_are_ignored() {
        let variables = [
            ("GOO_ETCD_SERVICE_HOST", "10.96.0.7"),
            ("GOO_ETCD_SERVICE_PORT", "2379"),
            ("GOO_ETCD_SERVICE_PORT_CLIENT", "2379"),
            ("GOO_ETCD_PORT", "tcp://10.96.0.7:2379"),
            ("GOO_ETCD_PORT_2379_TCP", "tcp://10.96.0.7:2379"),
            ("GOO_ETCD_PORT_2379_TCP_PROTO", "tcp"),
            ("GOO_ETCD_PORT_2379_TCP_PORT", "2379"),
            ("GOO_ETCD_PORT_2379_TCP_ADDR", "10.96.0.7"),
            ("GOO_ETCD_HEADLESS_SERVICE_HOST", "10.96.0.8"),
        ];
        assert_eq!(from(&variables).unwrap(), Config::default());
        // The user's mistake, because Kubernetes writes a URL.
        let error = from(&[("GOO_ETCD_PORT", "2379")]).unwrap_err().to_string();
        assert!(error.contains("GOO_ETCD_PORT"), "{error}");
    }

    #[test]
    fn errors_name_variable_and_value() {
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
    fn errors_do_not_show_secrets() {
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
