//! Environment variables that Kubernetes writes for its services.
//!
//! Kubernetes gives each container the variables of all services of its namespace, unless
//! `enableServiceLinks` is false. A service `goo-etcd`, or `goo-etcd-client`, therefore produces
//! variables that begin as this crate's own do.

use std::net::IpAddr;

/// The protocols of a service's ports, as a variable's value and in a variable's name.
const PROTOCOLS: [(&str, &str); 3] = [("tcp", "TCP"), ("udp", "UDP"), ("sctp", "SCTP")];

/// Whether a variable is one that Kubernetes writes for a service, by its name and its value: a
/// setting that is misspelled has another value.
///
/// The names are those of `pkg/kubelet/envvars/envvars.go` in Kubernetes, where `S` is the
/// service's name in capitals: `S_SERVICE_HOST`, `S_SERVICE_PORT`, `S_SERVICE_PORT_NAME`, and as
/// Docker's links have them `S_PORT`, `S_PORT_2379_TCP` and that with `_PROTO`, `_PORT` or `_ADDR`.
pub(super) fn is_service_variable(name: &str, value: &str) -> bool {
    let of_host_or_port = name.rsplit_once("_SERVICE_").is_some_and(|(_, rest)| {
        match rest.strip_prefix("PORT") {
            // Followed by the port's name, if it has one.
            Some(port_name) => {
                (port_name.is_empty() || port_name.starts_with('_')) && is_port(value)
            }
            None => rest == "HOST" && is_ip(value),
        }
    });
    let mut numbered = name.match_indices("_PORT_");
    of_host_or_port
        || (name.ends_with("_PORT") && is_url(value))
        || numbered.any(|(at, mark)| is_of_numbered_port(&name[at + mark.len()..], value))
}

/// Whether `rest`, the part of a name after `_PORT_`, is `2379_TCP`, or that with `_PROTO`, `_PORT`
/// or `_ADDR`.
fn is_of_numbered_port(rest: &str, value: &str) -> bool {
    let (port, rest) = rest.split_once('_').unwrap_or((rest, ""));
    let (protocol, part) = rest.split_once('_').unwrap_or((rest, ""));
    let is_protocol = PROTOCOLS.iter().any(|(_, named)| *named == protocol);
    is_port(port)
        && is_protocol
        && match part {
            "" => is_url(value),
            "PROTO" => PROTOCOLS.iter().any(|(written, _)| *written == value),
            "PORT" => value == port,
            "ADDR" => is_ip(value),
            _ => false,
        }
}

/// Whether a value is the URL of a port: `tcp://10.0.0.1:2379`.
fn is_url(value: &str) -> bool {
    let Some((protocol, address)) = value.split_once("://") else {
        return false;
    };
    let Some((host, port)) = address.rsplit_once(':') else {
        return false;
    };
    let is_known = PROTOCOLS.iter().any(|(written, _)| *written == protocol);
    let ipv6 = host.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
    is_known && is_ip(ipv6.unwrap_or(host)) && is_port(port)
}

fn is_ip(value: &str) -> bool {
    value.parse::<IpAddr>().is_ok()
}

fn is_port(value: &str) -> bool {
    value.bytes().all(|byte| byte.is_ascii_digit()) && value.parse::<u16>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_services_are_recognised() {
        for service in ["GOO_ETCD", "GOO_ETCD_CLIENT", "GOO_ETCD_PORT_0_SERVICE"] {
            for (suffix, value) in [
                ("_SERVICE_HOST", "10.96.0.7"),
                ("_SERVICE_HOST", "fd00::7"),
                ("_SERVICE_PORT", "2379"),
                ("_SERVICE_PORT_CLIENT", "2379"),
                ("_SERVICE_PORT_HTTP_2", "65535"),
                ("_PORT", "tcp://10.96.0.7:2379"),
                ("_PORT", "tcp://[fd00::7]:2379"),
                ("_PORT_2379_TCP", "tcp://10.96.0.7:2379"),
                ("_PORT_2379_TCP_PROTO", "tcp"),
                ("_PORT_2379_TCP_PORT", "2379"),
                ("_PORT_2379_TCP_ADDR", "10.96.0.7"),
                ("_PORT_53_UDP", "udp://10.96.0.7:53"),
                ("_PORT_53_UDP_PROTO", "udp"),
                ("_PORT_9_SCTP_ADDR", "fd00::7"),
            ] {
                let name = format!("{service}{suffix}");
                assert!(is_service_variable(&name, value), "{name}={value}");
            }
        }
    }

    #[test]
    fn other_names_and_values_are_not() {
        for (name, value) in [
            ("GOO_ETCD_PORT", "2379"),
            ("GOO_ETCD_PORT", "http://10.96.0.7:2379"),
            ("GOO_ETCD_PORT", "tcp://etcd:2379"),
            ("GOO_ETCD_PORT", "tcp://10.96.0.7"),
            ("GOO_ETCD_PORT", "tcp://10.96.0.7:+2379"),
            ("GOO_ETCD_ENDPOINT", "tcp://10.96.0.7:2379"),
            ("GOO_ETCD_HOST", "10.96.0.7"),
            ("GOO_ETCD_SERVICE_HOST", "etcd"),
            ("GOO_ETCD_SERVICE_HOSTS", "10.96.0.7"),
            ("GOO_ETCD_SERVICE_PORT", "client"),
            ("GOO_ETCD_SERVICE_PORT", ""),
            ("GOO_ETCD_SERVICE_PORTS", "2379"),
            ("GOO_ETCD_TLS_SERVICE_NAME", "etcd"),
            ("GOO_ETCD_PORT_TCP", "tcp://10.96.0.7:2379"),
            ("GOO_ETCD_PORT_2379", "tcp://10.96.0.7:2379"),
            ("GOO_ETCD_PORT_2379_HTTP", "tcp://10.96.0.7:2379"),
            ("GOO_ETCD_PORT_2379_TCP", "10.96.0.7"),
            ("GOO_ETCD_PORT_2379_TCP_NAME", "etcd"),
            ("GOO_ETCD_PORT_2379_TCP_PORT", "2380"),
            ("GOO_ETCD_ENDPIONTS", "10.96.0.7:2379"),
        ] {
            assert!(!is_service_variable(name, value), "{name}={value}");
        }
    }
}
