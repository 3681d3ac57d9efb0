//! Parses the endpoints in a configuration.

use http::Uri;

use crate::error::{Error, Result};

/// Removes user and password from an endpoint, so that errors and logs can show it.
pub(super) fn redact_userinfo(endpoint: &str) -> String {
    match endpoint.rsplit_once('@') {
        Some((_, host)) => format!("[redacted]@{host}"),
        None => endpoint.to_owned(),
    }
}

/// The URI of an endpoint, `http://host:port` or `https://host:port`.
///
/// A scheme that contradicts `tls` is an error: `https` or `tls` must never end in plaintext.
pub(crate) fn endpoint_uri(endpoint: &str, tls: bool) -> Result<Uri> {
    let refuse = |reason: &str| {
        Err(Error::invalid(
            "endpoints",
            redact_userinfo(endpoint),
            reason,
        ))
    };
    let (scheme, rest) = match endpoint.split_once("://") {
        Some((scheme, rest)) => (scheme, rest),
        None if tls => ("https", endpoint),
        None => ("http", endpoint),
    };
    match (scheme, tls) {
        ("http", false) | ("https", true) => {}
        ("http", true) => {
            return refuse("http:// is plaintext, but enable_tls is set; use https://");
        }
        ("https", false) => return refuse("https:// requires enable_tls"),
        _ => return refuse("the scheme must be http or https"),
    }
    if rest.contains('@') {
        return refuse("set username and password instead of credentials in the URL");
    }
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let Ok(uri) = format!("{scheme}://{authority}").parse::<Uri>() else {
        return refuse("expected host:port or http(s)://host:port");
    };
    if uri.path() != "/" || uri.query().is_some() {
        return refuse("expected host:port or http(s)://host:port, with nothing after the port");
    }
    if uri.host().unwrap_or_default().is_empty() {
        return refuse("the host is missing");
    }
    match uri.port_u16() {
        None => refuse("the port is missing or not a number up to 65535; etcd's default is 2379"),
        Some(0) => refuse("port 0 cannot be connected to"),
        Some(_) => Ok(uri),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_endpoints_become_uris() {
        for (given, tls, uri) in [
            ("localhost:2379", false, "http://localhost:2379/"),
            ("localhost:2379", true, "https://localhost:2379/"),
            ("http://10.0.0.1:2379", false, "http://10.0.0.1:2379/"),
            (
                "https://etcd.example:2379/",
                true,
                "https://etcd.example:2379/",
            ),
            ("[::1]:2379", false, "http://[::1]:2379/"),
        ] {
            assert_eq!(
                endpoint_uri(given, tls).unwrap().to_string(),
                uri,
                "{given}"
            );
        }
    }

    #[test]
    fn invalid_endpoints_are_named_in_the_error() {
        for (given, tls) in [
            ("", false),
            ("localhost", false),
            ("localhost:", false),
            (":2379", false),
            ("localhost:port", false),
            ("localhost:99999", false),
            ("localhost:0", false),
            ("local host:2379", false),
            ("localhost:2379/path", false),
            ("localhost:2379?x=y", false),
            ("http://", false),
            ("ftp://localhost:2379", false),
            ("https://localhost:2379", false),
            ("http://localhost:2379", true),
            ("::1:2379", false),
        ] {
            let error = endpoint_uri(given, tls).expect_err(given);
            let text = error.to_string();
            assert!(text.contains("endpoints"), "{text}");
            assert!(text.contains(&format!("{given:?}")), "{text}");
        }
    }

    #[test]
    fn errors_do_not_show_credentials() {
        let text = endpoint_uri("http://root:hunter2@localhost:2379", false)
            .unwrap_err()
            .to_string();
        assert!(
            !text.contains("hunter2") && !text.contains("root"),
            "{text}"
        );
        assert!(text.contains("username"), "{text}");
    }
}
