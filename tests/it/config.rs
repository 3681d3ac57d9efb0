//! Configurations: defaults, files, contradictions and secrets.

use std::time::Duration;

use goo_etcd::{Config, Error, TlsConfig};

/// The field and value that an error names.
fn refused_field(config: Config) -> (&'static str, String) {
    match config.validate() {
        Err(Error::Invalid { field, value, .. }) => (field, value),
        other => panic!("{other:?}"),
    }
}

fn with(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = Config::default();
    change(&mut config);
    config
}

#[test]
fn defaults_are_as_documented() {
    let config = Config::default();
    assert_eq!(config.endpoints, ["localhost:2379"]);
    assert_eq!((&config.username, &config.password), (&None, &None));
    assert_eq!(config.dial_timeout, Duration::from_secs(5));
    assert_eq!(
        (config.auto_sync, config.auto_sync_interval),
        (false, Duration::ZERO)
    );
    assert_eq!(config.max_call_send_msg_size, 2 * 1024 * 1024);
    assert_eq!(config.max_call_recv_msg_size, 2 * 1024 * 1024);
    assert!(!config.enable_compression && !config.enable_grpc_debug_log);
    assert_eq!((config.enable_tls, &config.tls_config), (false, &None));
    assert_eq!(config.request_timeout, Duration::from_secs(5));
    assert_eq!(config.keep_alive_interval, Duration::from_secs(10));
    assert_eq!(config.keep_alive_timeout, Duration::from_secs(3));
    config.validate().unwrap();
    assert_eq!(Config::builder().build().unwrap(), config);
}

#[test]
fn json_file_is_read_and_unknown_fields_refused() {
    let config: Config = serde_json::from_str(
        r#"{
            "endpoints": ["a:1", "b:2"], "username": "user", "password": "hunter2",
            "dial_timeout": "1m 30s", "auto_sync": true, "auto_sync_interval": "500ms",
            "max_call_send_msg_size": 1000, "max_call_recv_msg_size": 2000,
            "enable_compression": true, "enable_grpc_debug_log": true, "request_timeout": "2s",
            "keep_alive_interval": "20s", "keep_alive_timeout": "5s"
        }"#,
    )
    .unwrap();
    let built = Config::builder()
        .endpoints(["a:1", "b:2"])
        .username("user")
        .password("hunter2")
        .dial_timeout(Duration::from_secs(90))
        .auto_sync(true)
        .auto_sync_interval(Duration::from_millis(500))
        .max_call_send_msg_size(1000)
        .max_call_recv_msg_size(2000)
        .enable_compression(true)
        .enable_grpc_debug_log(true)
        .request_timeout(Duration::from_secs(2))
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(5))
        .build()
        .unwrap();
    assert_eq!(config, built);
    assert_eq!(
        serde_json::from_str::<Config>("{}").unwrap(),
        Config::default()
    );

    for (file, names) in [
        (r#"{"endpoint": ["a:1"]}"#, "endpoint"),
        (r#"{"tls_config": {"ca": "x"}}"#, "ca"),
        (r#"{"dial_timeout": "soon"}"#, "soon"),
        (r#"{"dial_timeout": 5}"#, "5"),
    ] {
        let text = serde_json::from_str::<Config>(file)
            .unwrap_err()
            .to_string();
        assert!(text.contains(names), "{text}");
    }
}

/// The same configuration in each format.
const YAML: &str = "
endpoints:
  - a:1
  - b:2
username: user
password: '0042'
dial_timeout: 1m 30s
auto_sync: true
auto_sync_interval: 500ms
max_call_send_msg_size: 1000
max_call_recv_msg_size: 2000
enable_compression: true
enable_grpc_debug_log: true
request_timeout: 2s
keep_alive_interval: 20s
keep_alive_timeout: 5s
enable_tls: true
tls_config:
  ca_file: /ca.pem
  server_name: etcd
  cert_pem: |
    CERT
    CHAIN
  key_file: /key.pem
";

const TOML: &str = r#"
endpoints = ["a:1", "b:2"]
username = "user"
password = "0042"
dial_timeout = "1m 30s"
auto_sync = true
auto_sync_interval = "500ms"
max_call_send_msg_size = 1000
max_call_recv_msg_size = 2000
enable_compression = true
enable_grpc_debug_log = true
request_timeout = "2s"
keep_alive_interval = "20s"
keep_alive_timeout = "5s"
enable_tls = true

[tls_config]
ca_file = "/ca.pem"
server_name = "etcd"
cert_pem = """
CERT
CHAIN
"""
key_file = "/key.pem"
"#;

const JSON: &str = r#"{
    "endpoints": ["a:1", "b:2"], "username": "user", "password": "0042",
    "dial_timeout": "1m 30s", "auto_sync": true, "auto_sync_interval": "500ms",
    "max_call_send_msg_size": 1000, "max_call_recv_msg_size": 2000,
    "enable_compression": true, "enable_grpc_debug_log": true, "request_timeout": "2s",
    "keep_alive_interval": "20s", "keep_alive_timeout": "5s", "enable_tls": true,
    "tls_config": {
        "ca_file": "/ca.pem", "server_name": "etcd", "cert_pem": "CERT\nCHAIN\n",
        "key_file": "/key.pem"
    }
}"#;

#[test]
fn yaml_toml_and_json_are_equivalent() {
    let mut built = Config::default();
    built.endpoints = vec!["a:1".into(), "b:2".into()];
    (built.username, built.password) = (Some("user".into()), Some("0042".into()));
    built.dial_timeout = Duration::from_secs(90);
    (built.auto_sync, built.auto_sync_interval) = (true, Duration::from_millis(500));
    (built.max_call_send_msg_size, built.max_call_recv_msg_size) = (1000, 2000);
    (built.enable_compression, built.enable_grpc_debug_log) = (true, true);
    built.request_timeout = Duration::from_secs(2);
    built.keep_alive_interval = Duration::from_secs(20);
    built.keep_alive_timeout = Duration::from_secs(5);
    built.enable_tls = true;
    let tls = TlsConfig::new().ca_file("/ca.pem").server_name("etcd");
    built.tls_config = Some(tls.cert_pem("CERT\nCHAIN\n").key_file("/key.pem"));
    assert_eq!(serde_norway::from_str::<Config>(YAML).unwrap(), built);
    assert_eq!(toml::from_str::<Config>(TOML).unwrap(), built);
    assert_eq!(serde_json::from_str::<Config>(JSON).unwrap(), built);

    assert_eq!(toml::from_str::<Config>("").unwrap(), Config::default());
    assert_eq!(
        serde_norway::from_str::<Config>("password:").unwrap(),
        Config::default()
    );
}

#[test]
fn yaml_and_toml_name_unknown_fields() {
    let yaml = YAML.replace("ca_file", "ca_flie");
    let text = serde_norway::from_str::<Config>(&yaml)
        .unwrap_err()
        .to_string();
    assert!(text.contains("ca_flie"), "{text}");
    let toml = TOML.replace("dial_timeout", "dail_timeout");
    let text = toml::from_str::<Config>(&toml).unwrap_err().to_string();
    assert!(text.contains("dail_timeout"), "{text}");
}

/// The errors about a field in JSON, YAML and TOML.
fn errors<T: serde::de::DeserializeOwned + std::fmt::Debug>(
    field: &str,
    value: &str,
) -> [String; 3] {
    let json = format!("{{\"{field}\": {value}}}");
    let toml = format!("{field} = {value}");
    // Parsed in two steps, because in one step YAML takes a plain number for a string.
    let yaml: serde_norway::Value = serde_norway::from_str(&format!("{field}: {value}")).unwrap();
    [
        serde_json::from_str::<T>(&json).unwrap_err().to_string(),
        serde_norway::from_value::<T>(yaml).unwrap_err().to_string(),
        toml::from_str::<T>(&toml).unwrap_err().message().to_owned(),
    ]
}

#[test]
fn error_about_a_secret_does_not_show_it() {
    for secret in ["81726354", "-81726354", "81726.354", "[81726354]"] {
        let mut texts = Vec::from(errors::<Config>("password", secret).map(|e| ("password", e)));
        for field in ["ca_pem", "cert_pem", "key_pem"] {
            texts.extend(errors::<TlsConfig>(field, secret).map(|error| (field, error)));
        }
        for (field, text) in texts {
            assert!(text.contains(field) && text.contains("quotes"), "{text}");
            assert!(!text.contains("81726"), "{text}");
        }
    }
    let config: Config = serde_norway::from_str("password: 0042").unwrap();
    assert_eq!(config.password.as_deref(), Some("0042"));
}

#[test]
fn contradiction_names_field_and_value() {
    let zero = Duration::ZERO;
    for (config, field, value) in [
        (with(|c| c.endpoints = vec![]), "endpoints", "[]"),
        (
            with(|c| c.endpoints.push("etcd".into())),
            "endpoints",
            "etcd",
        ),
        (
            with(|c| c.endpoints = vec!["https://a:1".into()]),
            "endpoints",
            "https://a:1",
        ),
        (with(|c| c.auto_sync = true), "auto_sync_interval", "0s"),
        (
            with(|c| c.tls_config = Some(TlsConfig::new())),
            "tls_config",
            "set",
        ),
        (
            with(|c| {
                c.endpoints = vec!["http://a:1".into()];
                c.enable_tls = true;
            }),
            "endpoints",
            "http://a:1",
        ),
        (
            with(|c| c.username = Some("user".into())),
            "username",
            "user",
        ),
        (
            with(|c| c.password = Some("hunter2".into())),
            "password",
            "[redacted]",
        ),
        (with(|c| c.dial_timeout = zero), "dial_timeout", "0s"),
        (with(|c| c.request_timeout = zero), "request_timeout", "0s"),
        (
            with(|c| c.keep_alive_timeout = zero),
            "keep_alive_timeout",
            "0s",
        ),
        (
            with(|c| c.keep_alive_interval = Duration::from_secs(4)),
            "keep_alive_interval",
            "4s",
        ),
        (
            with(|c| c.max_call_send_msg_size = 0),
            "max_call_send_msg_size",
            "0",
        ),
        (
            with(|c| c.max_call_recv_msg_size = 0),
            "max_call_recv_msg_size",
            "0",
        ),
    ] {
        assert_eq!(refused_field(config), (field, value.to_owned()));
    }
}

#[test]
fn tls_contradiction_names_field_and_value() {
    let tls = |tls: TlsConfig| {
        with(|c| {
            c.enable_tls = true;
            c.tls_config = Some(tls);
        })
    };
    for (config, field, value) in [
        (
            tls(TlsConfig::new().cert_file("/c")),
            "tls_config.cert_file",
            "/c",
        ),
        (
            tls(TlsConfig::new().key_file("/k")),
            "tls_config.key_file",
            "/k",
        ),
        (
            tls(TlsConfig::new().key_pem("KEY")),
            "tls_config.key_pem",
            "[redacted]",
        ),
        (
            tls(TlsConfig::new().ca_file("/a").ca_pem("CA")),
            "tls_config.ca_file",
            "/a",
        ),
        (
            tls(TlsConfig::new().server_name("")),
            "tls_config.server_name",
            "",
        ),
    ] {
        assert_eq!(refused_field(config), (field, value.to_owned()));
    }
}

#[tokio::test]
async fn contradiction_prevents_connecting() {
    let config = with(|c| c.endpoints = vec![]);
    let error = goo_etcd::Client::new("main", config).await.unwrap_err();
    assert!(
        matches!(
            error,
            Error::Invalid {
                field: "endpoints",
                ..
            }
        ),
        "{error}"
    );
}

#[cfg(not(any(feature = "tls-ring", feature = "tls-aws-lc")))]
#[test]
fn enable_tls_without_the_feature_names_it() {
    let text = with(|c| c.enable_tls = true)
        .validate()
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("enable_tls") && text.contains("`tls`"),
        "{text}"
    );
}

#[cfg(any(feature = "tls-ring", feature = "tls-aws-lc"))]
#[tokio::test]
async fn unusable_certificates_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("ca.pem");
    std::fs::write(&empty, "no certificate").unwrap();
    for file in [empty, dir.path().join("missing.pem")] {
        let config = with(|c| {
            c.enable_tls = true;
            c.tls_config = Some(TlsConfig::new().ca_file(&file));
        });
        let text = goo_etcd::Client::new("main", config)
            .await
            .unwrap_err()
            .to_string();
        assert!(text.contains("tls_config.ca_file"), "{text}");
        assert!(text.contains(file.to_str().unwrap()), "{text}");
    }
}

#[test]
fn debug_shows_no_secrets() {
    let config = with(|c| {
        c.endpoints.push("http://root:hunter1@etcd:2379".into());
        c.username = Some("user".into());
        c.password = Some("hunter2".into());
        c.tls_config = Some(
            TlsConfig::new()
                .ca_pem("hunter3")
                .cert_pem("hunter4")
                .key_pem("hunter5"),
        );
    });
    for text in [format!("{config:?}"), format!("{config:#?}")] {
        assert!(!text.contains("hunter"), "{text}");
        assert!(
            text.contains("user") && text.contains("[redacted]"),
            "{text}"
        );
    }
    let builder = Config::builder().password("hunter2");
    assert!(!format!("{builder:?}").contains("hunter"));
}

#[test]
fn longest_duration_is_refused() {
    let year = std::time::Duration::from_secs(365 * 24 * 3600);
    type Set = fn(&mut Config, std::time::Duration);
    let fields: [(&str, Set); 5] = [
        ("dial_timeout", |config, time| config.dial_timeout = time),
        ("request_timeout", |config, time| {
            config.request_timeout = time
        }),
        ("keep_alive_timeout", |config, time| {
            config.keep_alive_timeout = time
        }),
        ("keep_alive_interval", |config, time| {
            config.keep_alive_interval = time
        }),
        ("auto_sync_interval", |config, time| {
            config.auto_sync_interval = time
        }),
    ];
    for (field, set) in fields {
        let mut config = Config::default();
        set(&mut config, std::time::Duration::MAX);
        let error = config.validate().unwrap_err().to_string();
        assert!(error.starts_with(&format!("invalid {field}")), "{error}");
        set(&mut config, year);
        config.validate().unwrap();
    }
}
