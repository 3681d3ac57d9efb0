//! Configurations: defaults, files, contradictions, secrets.

use std::time::Duration;

use goo_etcd::{Config, Error, TlsConfig};

/// The field and value that an error names.
fn refused(config: Config) -> (&'static str, String) {
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
fn given_nothing_then_the_defaults_are_the_documented_ones_and_hold() {
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
fn given_a_file_then_its_fields_are_read_and_unknown_ones_refused() {
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

#[test]
fn given_a_contradiction_then_the_error_names_field_and_value() {
    let zero = Duration::ZERO;
    let tls = |tls: TlsConfig| {
        with(|c| {
            c.enable_tls = true;
            c.tls_config = Some(tls);
        })
    };
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
        assert_eq!(refused(config), (field, value.to_owned()));
    }
}

#[tokio::test]
async fn given_a_contradiction_then_no_client_is_made() {
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
fn given_a_build_without_tls_then_enable_tls_names_the_feature() {
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
async fn given_unusable_certificates_then_new_names_the_field_and_file() {
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
fn given_secrets_then_debug_shows_none_of_them() {
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
