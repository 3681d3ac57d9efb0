//! Instances: a registrar registers them, and a directory shows them.

mod address;
mod advertise;

use std::collections::BTreeMap;

pub(crate) use address::{
    check_address, parse_ip, uncallable_ip_reason, uncallable_reason, validate_address,
};

use crate::error::{Error, Result};

/// Metadata keys that formats use for fields of an instance; [`Instance::validate`] refuses them.
pub(crate) const RESERVED_METADATA: [&str; 6] =
    ["id", "status", "tls", "version", "weight", "zone"];

/// A running copy of a service: its address and its properties.
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
/// The setters accept any value. Registering calls [`validate`](Instance::validate), which refuses
/// invalid ones.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Instance {
    /// The service's name, not empty and without `/`.
    pub service: String,
    /// The id, unique among the instances of the service. Default: the address.
    pub id: String,
    /// `host:port` (an IPv6 host in brackets), or `unix:/path/to/socket`.
    pub address: String,
    /// The share of calls relative to the other instances. 0 means no new calls. Default: 100.
    pub weight: u32,
    /// The zone in which the instance runs, for clients that prefer their own zone. Default: none.
    pub zone: Option<String>,
    /// The version of the service that the instance runs. Default: none.
    pub version: Option<String>,
    /// Whether the instance drains: it gets no new calls, and finishes those in flight. Default:
    /// false.
    pub draining: bool,
    /// Whether the instance uses TLS, for clients that honour it. Default: `None`, the client's
    /// settings decide. A client with TLS enabled uses TLS even for `Some(false)`, so that no entry
    /// in etcd can make it use plaintext.
    pub tls: Option<bool>,
    /// Further properties, kept unchanged.
    pub metadata: BTreeMap<String, String>,
}

impl Instance {
    /// The weight of an instance unless another one is set.
    ///
    /// kratos and dubbo-go have the same default, so that weights mean the same in their formats.
    pub const DEFAULT_WEIGHT: u32 = 100;

    /// An instance of `service` at `address`, with the address as id and the default weight.
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

    /// Sets the id. Instances of one service with the same id replace each other.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = id.into();
        self
    }

    /// Sets the share of calls relative to the other instances. 0 means no new calls.
    #[must_use]
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Sets the zone in which the instance runs.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.zone = Some(zone.into());
        self
    }

    /// Sets the version of the service that the instance runs.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = Some(version.into());
        self
    }

    /// Adds a metadata entry, or replaces the one with the same key.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }

    /// Sets whether the instance drains.
    #[must_use]
    pub fn draining(mut self, draining: bool) -> Self {
        self.draining = draining;
        self
    }

    /// Sets whether the instance uses TLS.
    #[must_use]
    pub fn tls(mut self, tls: bool) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Whether the instance may get new calls: it does not drain and its weight is above 0.
    pub fn is_eligible(&self) -> bool {
        !self.draining && self.weight > 0
    }

    /// Checks that the instance can be registered.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] with the field and the value if the service name is empty or has a `/` or
    /// a control character, if the id is empty or has a control character, if the address is not
    /// `host:port` or `unix:/path` or is one that no client can call (`0.0.0.0`, `[::]`, multicast,
    /// broadcast; see [`Instance::advertise`]), or if the metadata has a reserved name (see
    /// [`format`](mod@crate::format)).
    pub fn validate(&self) -> Result<()> {
        validate_service(&self.service)?;
        // Comes before the id, which is the address by default.
        validate_address(&self.address)?;
        if self.id.is_empty() {
            return Err(Error::invalid("id", "", "must not be empty"));
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
                    "this name is reserved; set the field of this name instead",
                ));
            }
        }
        Ok(())
    }
}

/// Refuses a `/`, because the service's name is one segment of a key: a range of keys could
/// otherwise hold the instances of another service.
pub(crate) fn validate_service(service: &str) -> Result<()> {
    let reason = if service.is_empty() {
        "must not be empty"
    } else if service.contains('/') {
        "a service name must not contain '/'"
    } else if service.chars().any(char::is_control) {
        "control characters are not allowed"
    } else {
        return Ok(());
    };
    Err(Error::invalid("service", service, reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validation_error(instance: Instance) -> String {
        instance.validate().unwrap_err().to_string()
    }

    #[test]
    fn refuses_invalid_service_id_and_metadata() {
        assert!(validation_error(Instance::new("", "a:1")).contains("invalid service \"\""));
        assert!(validation_error(Instance::new("a/b", "a:1")).contains("invalid service \"a/b\""));
        assert!(validation_error(Instance::new("a\n", "a:1")).contains("invalid service \"a\\n\""));
        assert!(validation_error(Instance::new("a", "a:1").id("")).contains("invalid id \"\""));
        assert!(
            validation_error(Instance::new("a", "a:1").id("\0")).contains("invalid id \"\\0\"")
        );
        assert!(
            validation_error(Instance::new("a", "a:1").metadata("weight", "1"))
                .contains("invalid metadata \"weight\"")
        );
    }

    #[test]
    fn draining_or_weight_0_is_not_eligible() {
        let instance = Instance::new("a", "a:1");
        assert!(instance.is_eligible());
        assert!(!instance.clone().weight(0).is_eligible());
        assert!(!instance.draining(true).is_eligible());
    }
}
