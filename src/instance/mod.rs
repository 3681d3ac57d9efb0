//! Instances: what is registered, and what a directory shows.

mod advertise;

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Metadata keys that have a field of their own; [`Instance::validate`] refuses them as free metadata.
pub(crate) const RESERVED_METADATA: [&str; 6] =
    ["id", "status", "tls", "version", "weight", "zone"];

/// One running copy of a service: where it listens, and what is known about it.
///
/// ```
/// use goo_etcd::Instance;
///
/// let instance = Instance::new("greeter", "10.0.0.5:50051")
///     .weight(50)
///     .zone("eu-1a")
///     .version("1.2.0")
///     .metadata("shard", "7");
/// assert_eq!(instance.id, "10.0.0.5:50051");
/// instance.validate()?;
/// # Ok::<(), goo_etcd::Error>(())
/// ```
///
/// The setters take anything; [`validate`](Instance::validate) says what cannot be registered, and
/// registering calls it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Instance {
    /// The service's name: not empty, no `/`.
    pub service: String,
    /// What tells this instance from the others of its service; its address unless set.
    pub id: String,
    /// `host:port` (an IPv6 host in brackets), or `unix:/path/to/socket`.
    pub address: String,
    /// Its share of the calls, relative to the other instances; 0 gets no new ones. Default 100.
    pub weight: u32,
    /// Where it runs, for clients that prefer their own zone.
    pub zone: Option<String>,
    /// The version of the service that it runs.
    pub version: Option<String>,
    /// Whether it is about to leave: it gets no new calls, those in flight on it finish.
    pub draining: bool,
    /// Whether it speaks TLS, for clients that honour it. `None`: it does not say, and the
    /// client's own settings decide, as they do everywhere for plaintext: no client should give up
    /// TLS because of what stands in etcd.
    pub tls: Option<bool>,
    /// Anything else, kept as it is.
    pub metadata: BTreeMap<String, String>,
}

impl Instance {
    /// The weight of an instance unless another one is set.
    ///
    /// kratos and dubbo-go have the same default, so that weights mean the same in their formats.
    pub const DEFAULT_WEIGHT: u32 = 100;

    /// An instance of `service` at `address`, with the address as its id and the default weight.
    pub fn new(service: impl Into<String>, address: impl Into<String>) -> Self {
        let address = address.into();
        Self {
            service: service.into(),
            id: address.clone(),
            address,
            weight: Self::DEFAULT_WEIGHT,
            zone: None,
            version: None,
            draining: false,
            tls: None,
            metadata: BTreeMap::new(),
        }
    }

    /// Sets the id; instances of one service with one id replace each other.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the share of the calls, relative to the other instances; 0 gets no new ones.
    #[must_use]
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Sets where it runs.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Sets the version of the service that it runs.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    /// Adds one piece of metadata, replacing what the key had.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Marks it as about to leave, or not.
    #[must_use]
    pub fn draining(mut self, draining: bool) -> Self {
        self.draining = draining;
        self
    }

    /// Says whether it speaks TLS.
    #[must_use]
    pub fn tls(mut self, tls: bool) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Whether new calls may go to it: not draining, and a weight above 0.
    pub fn is_eligible(&self) -> bool {
        !self.draining && self.weight > 0
    }

    /// Whether it can be registered.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the field and the value: a service name that is empty or has a `/`
    /// or a control character, an empty id or one with a control character, an address without a
    /// host or a port, metadata under a name that has a field of its own.
    pub fn validate(&self) -> Result<()> {
        validate_service(&self.service)?;
        // Before the id, which is the address unless set.
        validate_address(&self.address)?;
        if self.id.is_empty() {
            return Err(Error::invalid("id", "", "an instance needs an id"));
        }
        if self.id.chars().any(char::is_control) {
            return Err(Error::invalid(
                "id",
                &self.id,
                "control characters are not allowed",
            ));
        }
        for reserved in RESERVED_METADATA {
            if self.metadata.contains_key(reserved) {
                return Err(Error::invalid(
                    "metadata",
                    reserved,
                    "this key has a field of its own; set that instead",
                ));
            }
        }
        Ok(())
    }
}

/// A service's name is one segment of a key: with a `/` in it, one service could show another's
/// instances.
pub(crate) fn validate_service(service: &str) -> Result<()> {
    let reason = if service.is_empty() {
        "a service needs a name"
    } else if service.contains('/') {
        "a service name must not contain '/'"
    } else if service.chars().any(char::is_control) {
        "control characters are not allowed"
    } else {
        return Ok(());
    };
    Err(Error::invalid("service", service, reason))
}

pub(crate) fn validate_address(address: &str) -> Result<()> {
    let invalid = |reason: &str| Err(Error::invalid("address", address, reason));
    if let Some(path) = address.strip_prefix("unix:") {
        return if path.starts_with('/') && path.len() > 1 {
            Ok(())
        } else {
            invalid("a Unix socket is written unix:/absolute/path")
        };
    }
    let Some((host, port)) = address.rsplit_once(':') else {
        return invalid("it has no port; write host:port");
    };
    match port.parse::<u16>() {
        Ok(0) => return invalid("port 0 cannot be called; register the port that is listened on"),
        // `parse` takes a leading `+`.
        Ok(_) if port.bytes().all(|byte| byte.is_ascii_digit()) => {}
        _ => return invalid("the port must be a number from 1 to 65535"),
    }
    if let Some(inside) = host.strip_prefix('[') {
        let ipv6 = inside
            .strip_suffix(']')
            // A scope (`%eth0`) means something on this machine only, and no URI can carry it.
            .and_then(|inside| inside.parse::<std::net::Ipv6Addr>().ok());
        return match ipv6 {
            Some(_) => Ok(()),
            None => invalid("what stands in brackets must be an IPv6 address"),
        };
    }
    if host.is_empty() {
        invalid("it has no host; write host:port")
    } else if host.contains(':') {
        invalid("an IPv6 host must be in brackets: [::1]:50051")
    } else if !host
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
    {
        invalid("the host must be a name or an IP address, without a scheme, path or user")
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(instance: Instance) -> String {
        instance.validate().unwrap_err().to_string()
    }

    #[test]
    fn what_can_be_called_is_accepted() {
        for address in [
            "10.0.0.5:50051",
            "localhost:1",
            "greeter-0.greeter.default.svc.cluster.local:65535",
            "[::1]:50051",
            "[2001:db8::7]:80",
            "unix:/run/greeter.sock",
            "under_score:8080",
        ] {
            Instance::new("greeter", address)
                .validate()
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn a_bad_address_is_an_error_that_names_field_and_value() {
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
            "unix:relative",
            "unix:/",
        ] {
            let message = refused(Instance::new("greeter", address));
            assert!(message.starts_with("invalid address"), "{message}");
            assert!(message.contains(&format!("{address:?}")), "{message}");
        }
    }

    #[test]
    fn a_bad_service_id_or_metadata_is_an_error_that_names_field_and_value() {
        assert!(refused(Instance::new("", "a:1")).contains("invalid service \"\""));
        assert!(refused(Instance::new("a/b", "a:1")).contains("invalid service \"a/b\""));
        assert!(refused(Instance::new("a\n", "a:1")).contains("invalid service \"a\\n\""));
        assert!(refused(Instance::new("a", "a:1").id("")).contains("invalid id \"\""));
        assert!(refused(Instance::new("a", "a:1").id("\0")).contains("invalid id \"\\0\""));
        assert!(
            refused(Instance::new("a", "a:1").metadata("weight", "1"))
                .contains("invalid metadata \"weight\"")
        );
    }

    #[test]
    fn a_draining_or_weightless_instance_gets_no_new_calls() {
        let instance = Instance::new("a", "a:1");
        assert!(instance.is_eligible());
        assert!(!instance.clone().weight(0).is_eligible());
        assert!(!instance.draining(true).is_eligible());
    }
}
