//! Finds the address at which other machines reach a server on this one.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::instance::address::{parse_ip, uncallable_ip_reason, validate_address};

/// The environment variable with this pod's address. go-zero's and kitex' servers read it too.
const POD_IP: &str = "POD_IP";

/// Addresses to look up the route to the Internet. They are from the ranges for documentation (RFC
/// 5737, RFC 3849), which are routed like the Internet and belong to nobody. No packet is sent.
const INTERNET: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

impl Instance {
    /// An instance of `service` at the address at which other machines reach it, given the address
    /// on which it listens.
    ///
    /// A `listen` address with a host is used unchanged. An empty host, `0.0.0.0` or `[::]` is
    /// replaced by this machine's address: the environment variable `POD_IP` if it is set, else the
    /// address of the interface with the route to the Internet, else the first address that is not
    /// loopback. For `0.0.0.0` this is an IPv4 address. The other two listen on both families; the
    /// result is IPv4 if the machine has such an address, else IPv6 in brackets.
    ///
    /// Sends nothing over the network. [`Instance::new`] never replaces an address.
    ///
    /// ```
    /// use goo_etcd::Instance;
    ///
    /// let instance = Instance::advertise("greeter", "10.0.0.5:50051")?;
    /// assert_eq!(instance.address, "10.0.0.5:50051");
    /// # Ok::<(), goo_etcd::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`]
    ///
    /// - if the address cannot be registered, for example because its port is 0;
    /// - if `POD_IP` is not an address at which other machines can reach this one (loopback,
    ///   link-local, multicast, ...), or if it is IPv6 and the server listens on `0.0.0.0`;
    /// - if this machine has loopback addresses only.
    pub fn advertise(service: impl Into<String>, listen: &str) -> Result<Self> {
        let pod_ip = std::env::var_os(POD_IP);
        let address = advertised_address(listen, pod_ip.as_deref(), &own_address)?;
        validate_address(&address)?;
        Ok(Self::new(service, address))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

const BOTH_FAMILIES: &[Family] = &[Family::V4, Family::V6];

impl Family {
    fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// The address to advertise. `own` finds this machine's address of a family.
fn advertised_address(
    listen: &str,
    pod_ip: Option<&OsStr>,
    own: &dyn Fn(Family) -> Option<IpAddr>,
) -> Result<String> {
    let Some((host, port)) = listen.rsplit_once(':') else {
        return Ok(listen.to_owned());
    };
    let families: &[Family] = match parse_ip(host).map(|ip| ip.to_canonical()) {
        Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) => &[Family::V4],
        Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) if host.starts_with('[') => BOTH_FAMILIES,
        None if host.is_empty() => BOTH_FAMILIES,
        _ => return Ok(listen.to_owned()),
    };
    let ip = match pod_ip.filter(|ip| !ip.is_empty()) {
        Some(pod_ip) => parse_pod_ip(pod_ip, families)?,
        None => families
            .iter()
            .find_map(|family| own(*family))
            .ok_or_else(|| {
                let reason =
                    "no address of this machine is reachable from others; give one, or set POD_IP";
                Error::invalid("address", listen, reason)
            })?,
    };
    Ok(match ip {
        IpAddr::V4(ip) => format!("{ip}:{port}"),
        IpAddr::V6(ip) => format!("[{ip}]:{port}"),
    })
}

fn parse_pod_ip(pod_ip: &OsStr, families: &[Family]) -> Result<IpAddr> {
    let invalid = |reason| Error::invalid(POD_IP, pod_ip.to_string_lossy(), reason);
    let ip: IpAddr = pod_ip
        .to_str()
        .and_then(|ip| ip.parse().ok())
        .ok_or_else(|| invalid("expected an IP address without port or brackets"))?;
    // `::ffff:10.0.0.5` becomes 10.0.0.5.
    let ip = ip.to_canonical();
    if !is_reachable(&ip) {
        Err(invalid(
            "expected an address at which other machines reach this one",
        ))
    } else if families.contains(&Family::of(ip)) {
        Ok(ip)
    } else {
        Err(invalid("the server listens on IPv4 only; listen on [::]"))
    }
}

fn own_address(family: Family) -> Option<IpAddr> {
    let is_own = |ip: &IpAddr| Family::of(*ip) == family && is_reachable(ip);
    source_address(family).filter(is_own).or_else(|| {
        let interfaces = if_addrs::get_if_addrs().ok()?;
        interfaces
            .into_iter()
            .map(|interface| interface.ip())
            .find(is_own)
    })
}

/// The source address of packets to the Internet. Connecting a UDP socket looks up the route and
/// sends nothing.
fn source_address(family: Family) -> Option<IpAddr> {
    let target = INTERNET.into_iter().find(|ip| Family::of(*ip) == family)?;
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    // Any port works; 9 is the discard service's.
    socket.connect(SocketAddr::new(target, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// Whether other machines can reach this address: not loopback, multicast or broadcast, and not
/// link-local, because an address in etcd has no scope.
fn is_reachable(ip: &IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !ip.is_loopback() && !is_link_local && uncallable_ip_reason(*ip).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none(_: Family) -> Option<IpAddr> {
        None
    }

    fn both(family: Family) -> Option<IpAddr> {
        Some(match family {
            Family::V4 => Ipv4Addr::new(10, 0, 0, 5).into(),
            Family::V6 => "2001:db8::5".parse().unwrap(),
        })
    }

    fn v6(family: Family) -> Option<IpAddr> {
        both(family).filter(IpAddr::is_ipv6)
    }

    #[test]
    fn named_host_is_unchanged() {
        for listen in [
            "127.0.0.1:80",
            "[::1]:80",
            "host:80",
            "unix:/run/a.sock",
            "nonsense",
        ] {
            assert_eq!(
                advertised_address(listen, Some("10.0.0.9".as_ref()), &both).unwrap(),
                listen
            );
        }
    }

    #[test]
    fn unspecified_host_becomes_own_address() {
        let own = |listen, own| advertised_address(listen, None, own).unwrap();
        for listen in [
            ":80",
            "0.0.0.0:80",
            "0:80",
            "[::]:80",
            "[0:0::0]:80",
            "[::ffff:0.0.0.0]:80",
        ] {
            assert_eq!(own(listen, &both), "10.0.0.5:80", "{listen}");
        }
        assert_eq!(own(":80", &v6), "[2001:db8::5]:80");
        assert_eq!(own("[::]:80", &v6), "[2001:db8::5]:80");
        // A server that listens on IPv4 only cannot be reached over IPv6.
        for listen in ["0.0.0.0:80", "[::ffff:0.0.0.0]:80"] {
            assert!(advertised_address(listen, None, &v6).is_err(), "{listen}");
        }
    }

    #[test]
    fn no_reachable_address_is_an_error() {
        let error = advertised_address("0.0.0.0:80", None, &none).unwrap_err();
        assert!(
            error.to_string().contains("give one, or set POD_IP"),
            "{error}"
        );
    }

    #[test]
    fn pod_ip_comes_first_and_is_validated() {
        let pod = |listen, pod_ip: &str| advertised_address(listen, Some(pod_ip.as_ref()), &both);
        assert_eq!(pod("0.0.0.0:80", "10.9.9.9").unwrap(), "10.9.9.9:80");
        assert_eq!(pod("[::]:80", "2001:db8::9").unwrap(), "[2001:db8::9]:80");
        assert_eq!(pod("0.0.0.0:80", "::ffff:10.9.9.9").unwrap(), "10.9.9.9:80");
        assert_eq!(pod(":80", "").unwrap(), "10.0.0.5:80");
        for pod_ip in [
            "x",
            "10.0.0.5:80",
            "[::1]",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "127.0.0.1",
            "::1",
            "::ffff:127.0.0.1",
            "169.254.1.1",
            "fe80::1",
            " 10.0.0.5",
        ] {
            let error = pod(":80", pod_ip).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("invalid POD_IP {pod_ip:?}")),
                "{error}"
            );
        }
        assert!(pod("0.0.0.0:80", "2001:db8::9").is_err());
    }

    #[cfg(unix)]
    #[test]
    fn non_utf8_pod_ip_is_an_error() {
        use std::os::unix::ffi::OsStrExt;

        let pod_ip = OsStr::from_bytes(b"10.0.0.\xff");
        let error = advertised_address(":80", Some(pod_ip), &both).unwrap_err();
        assert!(error.to_string().starts_with("invalid POD_IP"), "{error}");
    }

    #[test]
    fn own_address_is_reachable_and_of_the_family() {
        for family in [Family::V4, Family::V6] {
            if let Some(ip) = own_address(family) {
                assert_eq!(Family::of(ip), family);
                assert!(is_reachable(&ip), "{ip}");
            }
        }
    }

    #[test]
    fn local_addresses_are_not_reachable() {
        for ip in [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.1.1",
            "fe80::1",
        ] {
            assert!(!is_reachable(&ip.parse().unwrap()), "{ip}");
        }
        for ip in ["10.0.0.5", "fd00::5", "2001:db8::5", "192.0.2.1"] {
            assert!(is_reachable(&ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn refuses_addresses_that_cannot_be_registered() {
        for listen in [
            "127.0.0.1:0",
            "nonsense",
            "::1:80",
            "224.0.0.1:80",
            "[ff02::1]:80",
        ] {
            assert!(Instance::advertise("a", listen).is_err(), "{listen}");
        }
    }
}
