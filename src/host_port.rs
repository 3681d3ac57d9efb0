//! The form of addresses: `host:port`, of etcd's endpoints and of instances.

use std::net::Ipv6Addr;

/// A name has at most this many characters, and each of its labels at most [`MAX_LABEL`] (RFC 1035,
/// section 2.3.4).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;

const NO_HOST: &str = "the host is missing; expected host:port";

/// Checks that an address is `host:port`, where the host is a name, an IPv4 address, or an IPv6
/// address in brackets. Every such address is a valid `http::uri::Authority`.
///
/// # Errors
///
/// The reason, without the address.
pub(crate) fn check_host_port(address: &str) -> Result<(), &'static str> {
    if address.is_empty() {
        return Err(NO_HOST);
    }
    check_parts(address)?;
    let (host, port) = address
        .rsplit_once(':')
        // The colon of a bare `[::1]` is inside of the brackets.
        .filter(|_| !address.ends_with(']'))
        .ok_or("the port is missing; expected host:port")?;
    check_host(host)?;
    check_port(port)
}

/// Refuses what may stand before or after `host:port` in a URL.
fn check_parts(address: &str) -> Result<(), &'static str> {
    let is_space = |c: char| c.is_whitespace() || c.is_control();
    if address.contains("://") {
        Err("expected host:port without a scheme, such as 10.0.0.5:50051")
    } else if address.contains('@') {
        Err("expected host:port without a user, such as 10.0.0.5:50051")
    } else if address.contains('/') {
        Err("expected host:port without a path, such as 10.0.0.5:50051")
    } else if address.contains(['?', '#']) {
        Err("expected host:port with nothing after the port, such as 10.0.0.5:50051")
    } else if address.contains(is_space) {
        Err("expected host:port without spaces or control characters")
    } else {
        Ok(())
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    if host.is_empty() {
        return Err(NO_HOST);
    }
    if let Some(inside) = host.strip_prefix('[') {
        return check_brackets(inside);
    }
    if host.contains(':') {
        let of_ipv6 = |byte: u8| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.');
        // Also `dns:host:1`, and other names of resolvers that gRPC writes before a target.
        return Err(match host.split('%').next() {
            Some(host) if host.bytes().all(of_ipv6) => {
                "an IPv6 host must be in brackets: [::1]:50051"
            }
            _ => "expected host:port without a scheme, such as 10.0.0.5:50051",
        });
    }
    check_name(host)
}

fn check_brackets(inside: &str) -> Result<(), &'static str> {
    let inside = inside.strip_suffix(']');
    match inside {
        Some(ip) if ip.parse::<Ipv6Addr>().is_ok() => Ok(()),
        Some(ip) if ip.contains('%') => Err(
            "an IPv6 address with a zone, such as %eth0, is not supported: \
                 a zone is local to a machine",
        ),
        _ => Err("the part in brackets must be an IPv6 address"),
    }
}

fn check_name(host: &str) -> Result<(), &'static str> {
    let of_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if !host.is_ascii() {
        return Err("a name with letters beyond ASCII must be written in its ASCII form (xn--...)");
    }
    if !host.bytes().all(of_name) {
        return Err("the host must be a name or an IP address: letters, digits, '-', '_' and '.'");
    }
    // A name may end with the dot of the root.
    let name = host.strip_suffix('.').unwrap_or(host);
    let mut labels = name.split('.');
    if name.len() > MAX_NAME || labels.clone().any(|label| label.len() > MAX_LABEL) {
        return Err("a name has at most 253 characters, and each part between dots at most 63");
    }
    if labels.any(str::is_empty) {
        return Err("a part of the name between dots is empty");
    }
    Ok(())
}

fn check_port(port: &str) -> Result<(), &'static str> {
    // `parse` also accepts a leading `+`.
    let is_number = port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(0) if is_number => Err("port 0 cannot be called; use the actual port"),
        Ok(_) if is_number => Ok(()),
        _ if port.is_empty() => Err("the port is missing; expected host:port"),
        _ => Err("the port must be a number from 1 to 65535"),
    }
}

#[cfg(test)]
mod tests {
    use http::uri::Authority;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn host_and_port_are_accepted() {
        let label = "a".repeat(MAX_LABEL);
        for address in [
            "10.0.0.5:50051",
            "0.0.0.0:2379",
            "255.255.255.255:1",
            "localhost:1",
            "etcd.example.:2379",
            "under_score:8080",
            "xn--bcher-kva.example:443",
            "-a-:1",
            "h:02379",
            "[::1]:65535",
            "[fe80::1]:1",
            "[::ffff:10.0.0.5]:80",
            &format!("{label}.{label}.example:1"),
        ] {
            assert_eq!(check_host_port(address), Ok(()), "{address}");
        }
    }

    #[test]
    fn reason_says_what_is_wrong() {
        let label = "a".repeat(MAX_LABEL + 1);
        let name = "a.".repeat(130);
        for (address, reason) in [
            ("a!b:1", "the host must be a name or an IP address"),
            ("a%20b:1", "the host must be a name or an IP address"),
            ("127.0.0.1:+2379", "must be a number from 1 to 65535"),
            ("h:-1", "must be a number from 1 to 65535"),
            ("h:65536", "must be a number from 1 to 65535"),
            ("h:000001", "must be a number from 1 to 65535"),
            ("h:http", "must be a number from 1 to 65535"),
            ("h:0", "port 0"),
            ("h:", "the port is missing"),
            ("h", "the port is missing"),
            ("", "the host is missing"),
            ("[::1]", "the port is missing"),
            (":1", "the host is missing"),
            ("[fe80::1%lo]:2379", "zone"),
            ("[fe80::1%25lo]:2379", "zone"),
            ("[nonsense]:1", "must be an IPv6 address"),
            ("[::1:1", "must be an IPv6 address"),
            ("[10.0.0.1]:1", "must be an IPv6 address"),
            ("::1:1", "must be in brackets"),
            ("fe80::1%lo:1", "must be in brackets"),
            ("dns:h:1", "without a scheme"),
            ("http://h:1", "without a scheme"),
            ("u:p@h:1", "without a user"),
            ("h:1/", "without a path"),
            ("h:1?q", "nothing after the port"),
            ("h:1#f", "nothing after the port"),
            (" h:1", "without spaces"),
            ("h:1\n", "without spaces"),
            ("h\u{a0}:1", "without spaces"),
            ("bücher.example:1", "xn--"),
            ("h:１", "must be a number from 1 to 65535"),
            ("a..b:1", "empty"),
            (".a:1", "empty"),
            (".:1", "empty"),
            (&format!("{label}:1"), "at most 63"),
            (&format!("{name}:1"), "at most 253"),
        ] {
            let error = check_host_port(address).expect_err(address);
            assert!(error.contains(reason), "{address}: {error}");
        }
    }

    fn any_address() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-zA-Z0-9:.%_!@/?# ~\\[\\]-]{0,12}:[+0-9]{0,6}",
            "[a-zA-Z0-9._-]{1,12}:[0-9]{1,5}",
            "\\[[0-9a-f:.%]{2,8}::[0-9a-f:.]{0,8}\\]:[0-9]{1,5}",
            "\\PC{0,8}:[0-9]{1,2}",
        ]
    }

    proptest! {
        /// An accepted address is called as it is written, so it must be a valid authority.
        #[test]
        fn accepted_addresses_are_authorities(address in any_address()) {
            if check_host_port(&address).is_ok() {
                let authority: Authority = address.parse().unwrap();
                let (host, _) = address.rsplit_once(':').unwrap();
                prop_assert_eq!(authority.host(), host);
                prop_assert!(authority.port_u16().is_some_and(|port| port > 0));
                prop_assert_eq!(authority.as_str(), address);
            }
        }
    }
}
