//! The address under which others reach what listens here.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::error::{Error, Result};
use crate::instance::Instance;

/// The environment variable with this pod's address, which go-zero's and kitex' servers look at too.
const POD_IP: &str = "POD_IP";

/// Addresses that stand for "the outside": of the ranges for documentation (RFC 5737, RFC 3849), so
/// that they are routed as the Internet is and belong to nobody. Nothing is sent there.
const OUTSIDE: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

impl Instance {
    /// An instance of `service` at the address that others reach it at, made from the one that it
    /// listens on.
    ///
    /// Where `listen` names a host it stays as it is. An empty host, `0.0.0.0` or `[::]` becomes this
    /// machine's address: the environment variable `POD_IP` where it is set, else the address of the
    /// interface that leads outside, else the first address that is not of the loopback interface. An
    /// IPv6 address is put in brackets. For `0.0.0.0` it is IPv4; for the others, which listen on both,
    /// IPv4 where there is one.
    ///
    /// Nothing else in this crate replaces an address: an instance made with [`Instance::new`] is
    /// registered as it is. Nothing is sent over the network.
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
    /// [`Error::Invalid`] for an address that could not be registered, such as one with port 0; for a
    /// `POD_IP` that is no address at which others could reach a machine (loopback, link-local,
    /// multicast, ...), or IPv6 where the server listens on `0.0.0.0`; and
    /// when this machine has no address but loopback ones.
    pub fn advertise(service: impl Into<String>, listen: impl ToString) -> Result<Self> {
        let pod_ip = std::env::var_os(POD_IP);
        let address = advertised(&listen.to_string(), pod_ip.as_deref(), &own_address)?;
        crate::instance::validate_address(&address)?;
        Ok(Self::new(service, address))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

fn advertised(
    listen: &str,
    pod_ip: Option<&OsStr>,
    own: &dyn Fn(Family) -> Option<IpAddr>,
) -> Result<String> {
    let Some((host, port)) = listen.rsplit_once(':') else {
        return Ok(listen.to_owned());
    };
    let families: &[Family] = match host.parse() {
        Ok(Ipv4Addr::UNSPECIFIED) => &[Family::V4],
        _ if host.is_empty() => &[Family::V4, Family::V6],
        _ if is_any_v6(host) => &[Family::V4, Family::V6],
        _ => return Ok(listen.to_owned()),
    };
    let ip = match pod_ip.filter(|ip| !ip.is_empty()) {
        Some(pod_ip) => valid_pod_ip(pod_ip, families)?,
        None => families
            .iter()
            .find_map(|family| own(*family))
            .ok_or_else(|| {
                let reason =
                    "this machine has no address that others could reach; name one, or set POD_IP";
                Error::invalid("address", listen, reason)
            })?,
    };
    Ok(match ip {
        IpAddr::V4(ip) => format!("{ip}:{port}"),
        IpAddr::V6(ip) => format!("[{ip}]:{port}"),
    })
}

fn is_any_v6(host: &str) -> bool {
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .is_some_and(|host| host.parse() == Ok(Ipv6Addr::UNSPECIFIED))
}

fn valid_pod_ip(pod_ip: &OsStr, families: &[Family]) -> Result<IpAddr> {
    let invalid = |reason| Error::invalid(POD_IP, pod_ip.to_string_lossy(), reason);
    let ip: IpAddr = pod_ip
        .to_str()
        .and_then(|ip| ip.parse().ok())
        .ok_or_else(|| invalid("it must be an IP address, without port or brackets"))?;
    // `::ffff:10.0.0.5` is 10.0.0.5.
    let ip = ip.to_canonical();
    if !can_be_reached(&ip) {
        Err(invalid(
            "it must be an address at which others reach this machine",
        ))
    } else if families.contains(&Family::of(ip)) {
        Ok(ip)
    } else {
        Err(invalid("the server listens on IPv4 alone; listen on [::]"))
    }
}

fn own_address(family: Family) -> Option<IpAddr> {
    let is_own = |ip: &IpAddr| Family::of(*ip) == family && can_be_reached(ip);
    toward_outside(family).filter(is_own).or_else(|| {
        let interfaces = if_addrs::get_if_addrs().ok()?;
        interfaces
            .into_iter()
            .map(|interface| interface.ip())
            .find(is_own)
    })
}

/// The source address of what would be sent outside. Connecting a UDP socket looks up the route and
/// sends nothing.
fn toward_outside(family: Family) -> Option<IpAddr> {
    let outside = OUTSIDE.into_iter().find(|ip| Family::of(*ip) == family)?;
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    // The discard service's port; any would do.
    socket.connect(SocketAddr::new(outside, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// One machine's, not loopback, and not link-local, which needs a scope that no address in etcd can
/// carry.
fn can_be_reached(ip: &IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let is_of_many = ip.is_multicast() || *ip == IpAddr::V4(Ipv4Addr::BROADCAST);
    !ip.is_loopback() && !ip.is_unspecified() && !is_link_local && !is_of_many
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
    fn a_named_host_stays_whatever_is_known_of_the_machine() {
        for listen in [
            "127.0.0.1:80",
            "[::1]:80",
            "host:80",
            "unix:/run/a.sock",
            "nonsense",
        ] {
            assert_eq!(
                advertised(listen, Some("10.0.0.9".as_ref()), &both).unwrap(),
                listen
            );
        }
    }

    #[test]
    fn a_host_that_means_every_address_becomes_the_machines_own() {
        let own = |listen, own| advertised(listen, None, own).unwrap();
        for listen in [":80", "0.0.0.0:80", "[::]:80", "[0:0::0]:80"] {
            assert_eq!(own(listen, &both), "10.0.0.5:80", "{listen}");
        }
        assert_eq!(own(":80", &v6), "[2001:db8::5]:80");
        assert_eq!(own("[::]:80", &v6), "[2001:db8::5]:80");
        // One that listens on IPv4 alone cannot be reached over IPv6.
        assert!(advertised("0.0.0.0:80", None, &v6).is_err());
    }

    #[test]
    fn a_machine_without_an_address_is_an_error_that_says_what_to_do() {
        let error = advertised("0.0.0.0:80", None, &none).unwrap_err();
        assert!(
            error.to_string().contains("name one, or set POD_IP"),
            "{error}"
        );
    }

    #[test]
    fn the_pods_address_comes_first_and_must_be_one() {
        let pod = |listen, pod_ip: &str| advertised(listen, Some(pod_ip.as_ref()), &both);
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
    fn a_pods_address_that_is_no_text_is_an_error_and_not_overlooked() {
        use std::os::unix::ffi::OsStrExt;

        let pod_ip = OsStr::from_bytes(b"10.0.0.\xff");
        let error = advertised(":80", Some(pod_ip), &both).unwrap_err();
        assert!(error.to_string().starts_with("invalid POD_IP"), "{error}");
    }

    #[test]
    fn what_is_found_on_this_machine_can_be_reached_and_is_of_the_family_that_was_asked_for() {
        for family in [Family::V4, Family::V6] {
            if let Some(ip) = own_address(family) {
                assert_eq!(Family::of(ip), family);
                assert!(can_be_reached(&ip), "{ip}");
            }
        }
    }

    #[test]
    fn an_address_that_means_something_on_this_machine_alone_is_not_advertised() {
        for ip in [
            "127.0.0.1",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.1.1",
            "fe80::1",
        ] {
            assert!(!can_be_reached(&ip.parse().unwrap()), "{ip}");
        }
        for ip in ["10.0.0.5", "fd00::5", "2001:db8::5", "192.0.2.1"] {
            assert!(can_be_reached(&ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn an_address_that_could_not_be_registered_is_refused() {
        for listen in ["127.0.0.1:0", "nonsense", "::1:80"] {
            assert!(Instance::advertise("a", listen).is_err(), "{listen}");
        }
    }
}
