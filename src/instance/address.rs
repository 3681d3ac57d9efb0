//! Which addresses a client can call.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::error::{Error, Result};
use crate::host_port::check_host_port;

const UNSPECIFIED: &str = "this is every address of a machine and names no server, so each client \
    would call itself; use the server's own address, which `Instance::advertise` finds";
const GROUP: &str = "a multicast or broadcast address names no server; use the server's own \
    address, which `Instance::advertise` finds for a server that listens on 0.0.0.0 or [::]";
const NO_HOST: &str = "the host is missing; expected host:port with the server's own address, \
    which `Instance::advertise` finds";

/// Checks that an address is `host:port` or `unix:/path`, and that a client can call the address.
pub(crate) fn validate_address(address: &str) -> Result<()> {
    check_address(address).map_err(|reason| Error::invalid("address", address, reason))
}

/// [`validate_address`] with the reason alone, which does not quote the address.
pub(crate) fn check_address(address: &str) -> std::result::Result<(), &'static str> {
    if let Some(path) = address.strip_prefix("unix:") {
        return if path.starts_with('/') && path.len() > 1 {
            Ok(())
        } else {
            Err("a Unix socket is written unix:/absolute/path")
        };
    }
    match uncallable_reason(address) {
        Some(reason) => Err(reason),
        None => check_host_port(address),
    }
}

/// Why a client must not call an address: the client would call itself, or nobody; `None` if the
/// address may be a server's.
///
/// Unlike [`check_address`], accepts addresses of an unknown form, because a directory also shows
/// instances of services that are not called through this crate.
pub(crate) fn uncallable_reason(address: &str) -> Option<&'static str> {
    if address.starts_with("unix:") {
        return None;
    }
    let host = match address.rsplit_once(':') {
        // A bare IPv6 address.
        Some(_) if address.parse::<Ipv6Addr>().is_ok() => address,
        Some((host, _)) => host,
        None => address,
    };
    if host.is_empty() {
        Some(NO_HOST)
    } else {
        parse_ip(host).and_then(uncallable_ip_reason)
    }
}

/// Why nobody can call an IP address; `None` if somebody may.
pub(crate) fn uncallable_ip_reason(ip: IpAddr) -> Option<&'static str> {
    // `::ffff:0.0.0.0` is 0.0.0.0.
    let ip = ip.to_canonical();
    if ip.is_unspecified() {
        Some(UNSPECIFIED)
    } else if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        Some(GROUP)
    } else {
        None
    }
}

/// The IP address that a host is, in every form that the system's resolver takes for an address.
pub(crate) fn parse_ip(host: &str) -> Option<IpAddr> {
    let inside = host.trim_start_matches('[').trim_end_matches(']');
    let without_scope = inside.split('%').next().unwrap_or_default();
    let ipv6 = without_scope.parse().map(IpAddr::V6);
    ipv6.ok().or_else(|| parse_ipv4(host).map(IpAddr::V4))
}

/// Parses an IPv4 address as `inet_aton` does: one to four numbers, decimal, octal or hexadecimal,
/// of which the last fills the remaining bytes. `0`, `0x0` and `0.0` are 0.0.0.0 therefore.
fn parse_ipv4(host: &str) -> Option<Ipv4Addr> {
    let numbers: Vec<u32> = host.split('.').map(parse_number).collect::<Option<_>>()?;
    let (last, bytes) = numbers.split_last()?;
    if bytes.len() > 3 || bytes.iter().any(|byte| *byte > 255) {
        return None;
    }
    let free_bits = 32 - 8 * bytes.len();
    if u64::from(*last) >> free_bits != 0 {
        return None;
    }
    let high = bytes
        .iter()
        .fold(0u64, |high, byte| (high << 8) | u64::from(*byte));
    let address = (high << free_bits) | u64::from(*last);
    Some(Ipv4Addr::from_bits(u32::try_from(address).ok()?))
}

fn parse_number(text: &str) -> Option<u32> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (text, 8),
        None => (text, 10),
    };
    let is_number = digits.chars().all(|digit| digit.is_digit(radix));
    // `from_str_radix` also accepts a sign.
    is_number.then(|| u32::from_str_radix(digits, radix).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_valid_addresses() {
        for address in [
            "10.0.0.5:50051",
            "127.0.0.1:1",
            "localhost:1",
            "greeter-0.greeter.default.svc.cluster.local:65535",
            "[::1]:50051",
            "[2001:db8::7]:80",
            "[::ffff:10.0.0.5]:80",
            "unix:/run/greeter.sock",
            "unix:///run/greeter.sock",
            "under_score:8080",
            // Names and addresses that look alike to uncallable ones.
            "0a:80",
            "0.example:80",
            "0.0.0.1:80",
            "255.255.255.254:80",
            "223.255.255.255:80",
            "240.0.0.1:80",
            "[fd00::]:80",
            "[::ffff:127.0.0.1]:80",
        ] {
            validate_address(address).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn refuses_invalid_addresses() {
        for address in [
            "10.0.0.5",
            "10.0.0.5:",
            "10.0.0.5:0",
            "10.0.0.5:65536",
            "10.0.0.5:+80",
            "10.0.0.5:http",
            ":50051",
            "::1:50051",
            "[::1]",
            "[::1%eth0]:80",
            "[nonsense]:80",
            "http://10.0.0.5:80",
            "user@host:80",
            "a b:80",
            "",
            "a!b:80",
            "a..b:80",
            "unix:relative",
            "unix:/",
        ] {
            let message = validate_address(address).unwrap_err().to_string();
            assert!(message.starts_with("invalid address"), "{message}");
            assert!(message.contains(&format!("{address:?}")), "{message}");
        }
    }

    /// Issues 26 and 27 of kitex-contrib/registry-etcd: a server that listens on all addresses
    /// registered that address, and its clients called themselves.
    #[test]
    fn address_to_listen_on_leads_to_advertise() {
        for host in [
            "0.0.0.0",
            "[::]",
            "[0:0::0]",
            "[::0.0.0.0]",
            "[::ffff:0.0.0.0]",
            "[::ffff:0:0]",
            "",
            // Forms that the system's resolver takes for 0.0.0.0.
            "0",
            "00",
            "0x0",
            "0.0",
            "0.0.0",
            "000.0.0.0",
            "0.0x0.00.0",
            "255.255.255.255",
            "0xffffffff",
            "4294967295",
            "255.16777215",
            "[::ffff:255.255.255.255]",
            "224.0.0.1",
            "239.255.255.255",
            "224.1",
            "[ff02::1]",
            "[::ffff:224.0.0.1]",
        ] {
            for port in ["1", "0", "65535"] {
                let address = format!("{host}:{port}");
                let message = validate_address(&address).unwrap_err().to_string();
                assert!(message.contains("`Instance::advertise`"), "{message}");
                assert!(uncallable_reason(&address).is_some(), "{address}");
            }
        }
    }

    #[test]
    fn uncallable_addresses_are_found_in_any_form() {
        for address in [
            "0.0.0.0",
            "::",
            ":::80",
            "[ff02::1%eth0]:80",
            "0.0.0.0:http",
        ] {
            assert!(uncallable_reason(address).is_some(), "{address}");
        }
        for address in [
            "h",
            "h:",
            "h:http",
            "grpc://h:1",
            "::1",
            "unix:/run/a:0",
            "[::1]:80",
        ] {
            assert_eq!(uncallable_reason(address), None, "{address}");
        }
    }

    #[test]
    fn scheme_or_path_is_named() {
        for address in [
            "http://host:1",
            "https://host:1",
            "https://[::1]:1",
            "http://host",
            "http://host:1/",
            "dns:///host:1",
            "dns:host:1",
            "etcd:///services/greeter",
            "passthrough:///host:1",
            "ipv4:10.0.0.5:80",
            "ipv6:[::1]:80",
            "://host:1",
        ] {
            let message = validate_address(address).unwrap_err().to_string();
            assert!(message.contains("host:port without a scheme"), "{message}");
        }
        for address in ["host:1/", "host:1/path", "//host:1", "host/a:1"] {
            let message = validate_address(address).unwrap_err().to_string();
            assert!(message.contains("host:port without a path"), "{message}");
        }
        for address in [
            "::1:80",
            "fe80::1:80",
            "::ffff:10.0.0.5:80",
            "fe80::1%eth0:80",
        ] {
            let message = validate_address(address).unwrap_err().to_string();
            assert!(message.contains("must be in brackets"), "{message}");
        }
    }
}
