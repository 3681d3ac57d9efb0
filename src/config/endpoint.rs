//! Parses the endpoints in a configuration.

use crate::error::{Error, Result};
use crate::host_port::check_host_port;

/// Removes user and password from an endpoint, so that errors and logs can show it.
pub(super) fn redact_userinfo(endpoint: &str) -> String {
    match endpoint.rsplit_once('@') {
        Some((_, host)) => format!("[redacted]@{host}"),
        None => endpoint.to_owned(),
    }
}

/// The address of an endpoint, `host:port`, without its scheme.
///
/// A scheme that contradicts `tls` is an error: `https` or `tls` must never end in plaintext.
pub(crate) fn endpoint_address(endpoint: &str, tls: bool) -> Result<&str> {
    parse(endpoint, tls)
        .map_err(|reason| Error::invalid("endpoints", redact_userinfo(endpoint), reason))
}

fn parse(endpoint: &str, tls: bool) -> std::result::Result<&str, &'static str> {
    if is_unix_socket(endpoint) {
        return Err(
            "Unix sockets are not supported for etcd; expected host:port, \
                    http://host:port or https://host:port",
        );
    }
    let address = match endpoint.split_once("://") {
        Some((scheme, address)) => {
            check_scheme(scheme, tls)?;
            address
        }
        None => endpoint,
    };
    if address.contains('@') {
        return Err("set username and password instead of credentials in the URL");
    }
    let address = address.strip_suffix('/').unwrap_or(address);
    check_host_port(address)?;
    Ok(address)
}

fn check_scheme(scheme: &str, tls: bool) -> std::result::Result<(), &'static str> {
    // Schemes are case-insensitive (RFC 3986, section 3.1).
    match (scheme.to_ascii_lowercase().as_str(), tls) {
        ("http", false) | ("https", true) => Ok(()),
        ("http", true) => Err("http:// is plaintext, but enable_tls is set; use https://"),
        ("https", false) => Err("https:// requires enable_tls"),
        _ => Err("the scheme must be http or https"),
    }
}

/// The forms of etcd and gRPC: `unix:/path`, `unix:///path`, `unixs://...`, `unix-abstract:name`.
fn is_unix_socket(endpoint: &str) -> bool {
    let scheme = endpoint.split(':').next().unwrap_or_default();
    let schemes = ["unix", "unixs", "unix-abstract"];
    let is_scheme = schemes.iter().any(|unix| scheme.eq_ignore_ascii_case(unix));
    // `unix:2379` is a host with a port.
    is_scheme && check_host_port(endpoint).is_err()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_endpoints_have_an_address() {
        for (given, tls, address) in [
            ("localhost:2379", false, "localhost:2379"),
            ("localhost:2379/", true, "localhost:2379"),
            ("http://10.0.0.1:2379", false, "10.0.0.1:2379"),
            ("HTTP://10.0.0.1:2379", false, "10.0.0.1:2379"),
            ("Https://etcd.example:2379/", true, "etcd.example:2379"),
            ("http://0.0.0.0:2379", false, "0.0.0.0:2379"),
            ("[::1]:2379", false, "[::1]:2379"),
            ("unix:2379", false, "unix:2379"),
        ] {
            assert_eq!(endpoint_address(given, tls).unwrap(), address, "{given}");
        }
    }

    #[test]
    fn invalid_endpoints_are_named_in_the_error() {
        for (given, tls, reason) in [
            ("", false, "the host is missing"),
            ("localhost", false, "the port is missing"),
            (":2379", false, "the host is missing"),
            ("localhost:99999", false, "1 to 65535"),
            ("localhost:0", false, "port 0"),
            ("local host:2379", false, "spaces"),
            ("localhost:2379/path", false, "without a path"),
            ("localhost:2379?x=y", false, "after the port"),
            ("http://", false, "the host is missing"),
            ("ftp://localhost:2379", false, "http or https"),
            ("https://localhost:2379", false, "requires enable_tls"),
            ("HTTPS://localhost:2379", false, "requires enable_tls"),
            ("http://localhost:2379", true, "plaintext"),
            ("::1:2379", false, "in brackets"),
            // Endpoints that once were accepted and never tried.
            ("a!b:1", false, "the host must be"),
            ("127.0.0.1:+2379", false, "1 to 65535"),
            ("[fe80::1%lo]:2379", false, "zone"),
            ("http://a:1#f", false, "after the port"),
            ("http://h:2379//", false, "without a path"),
            (
                "unix:/run/etcd.sock",
                false,
                "Unix sockets are not supported",
            ),
            (
                "unix:///run/etcd.sock",
                false,
                "Unix sockets are not supported",
            ),
            (
                "unix://localhost:2379",
                false,
                "Unix sockets are not supported",
            ),
            (
                "unixs://localhost:2379",
                true,
                "Unix sockets are not supported",
            ),
            (
                "unix-abstract:etcd",
                false,
                "Unix sockets are not supported",
            ),
            ("UNIX:etcd.sock", false, "Unix sockets are not supported"),
        ] {
            let text = endpoint_address(given, tls).expect_err(given).to_string();
            assert!(text.contains("endpoints"), "{text}");
            assert!(text.contains(&format!("{given:?}")), "{text}");
            assert!(text.contains(reason), "{text}");
        }
    }

    #[test]
    fn errors_do_not_show_credentials() {
        for given in [
            "http://root:hunter2@localhost:2379",
            "root:hunter2@localhost:2379",
            "HTTP://root:hunter2@localhost:2379/path",
            "ftp://root:hunter2@localhost",
        ] {
            let text = endpoint_address(given, false).unwrap_err().to_string();
            assert!(
                !text.contains("hunter2") && !text.contains("root"),
                "{text}"
            );
        }
        let text = endpoint_address("root:hunter2@localhost:2379", false).unwrap_err();
        assert!(text.to_string().contains("username"), "{text}");
    }
}
