//! kitex' registrations.
//!
//! `kitex/registry-etcd/echo/127.0.0.1:8888 => {"network":"tcp","address":"127.0.0.1:8888",
//! "weight":66,"tags":{"hello":"world"}}`

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::codec::{DecodeError, Format};
use super::go_json::{self, Object};
use super::key::{KeyContext, KeyRange, slashed_prefix};
use super::reserved_metadata;
use crate::error::{Error, Result};
use crate::instance::Instance;

/// The weight that kitex assumes for a weight of 0 or less (`defaultWeight` in `etcd_resolver.go`).
const KITEX_DEFAULT_WEIGHT: u32 = 10;

/// kitex' registrations (`registry-etcd`): keys are `prefix/service/host:port`, the default prefix
/// is `kitex/registry-etcd`, the default time to live 60 s. With an empty prefix the keys are
/// `/service/host:port`, and with the prefix `/` they are `//service/host:port`.
///
/// kitex has fields for weight and tags; the tags are the metadata. Id, zone, version, draining and
/// TLS are tags too, which kitex' clients ignore.
///
/// A weight of 0 or less reads as 10, kitex' default, and 10 is written as 0. An instance of weight
/// 0 is written with a tag `weight` of `0`: clients of this crate do not call it, kitex' clients
/// do. **Our default weight is 100**: use `.weight(10)` beside Go servers with kitex' default.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kitex;

/// Fields are written in this order.
#[derive(Serialize)]
struct InstanceInfo<'a> {
    network: &'a str,
    address: &'a str,
    weight: u32,
    #[serde(serialize_with = "go_json::null_if_empty")]
    tags: BTreeMap<String, String>,
}

/// The network (`unix` or `tcp`) and the address in it.
fn network(address: &str) -> (&'static str, &str) {
    match address.strip_prefix("unix:") {
        Some(path) => ("unix", path),
        None => ("tcp", address),
    }
}

impl Format for Kitex {
    fn name(&self) -> &'static str {
        "kitex"
    }

    fn default_prefix(&self) -> &'static str {
        "kitex/registry-etcd"
    }

    fn default_ttl(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        slashed_prefix(prefix, &instance.service) + network(&instance.address).1
    }

    /// kitex' own reader leaves out the trailing slash, so that its `echo` also shows `echo2`.
    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(slashed_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        let mut tags = reserved_metadata::encode(instance);
        if instance.weight != 0 {
            tags.remove(reserved_metadata::WEIGHT);
        }
        let (network, address) = network(&instance.address);
        let weight = match instance.weight {
            KITEX_DEFAULT_WEIGHT => 0,
            weight => weight,
        };
        go_json::to_vec(&InstanceInfo {
            network,
            address,
            weight,
            tags,
        })
        .map_err(|error| Error::invalid("instance", &instance.id, error.to_string()))
    }

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        let mut tags = fields.strings_by_name("tags")?;
        let address = match (fields.string("network")?, fields.string("address")?) {
            (_, "") => return Err(DecodeError::new("address is missing or empty")),
            ("unix", path) => format!("unix:{path}"),
            (_, address) => address.to_owned(),
        };
        let mut instance = Instance::new(context.service, address);
        instance.weight = match fields.signed("weight")? {
            ..=0 if tags
                .get(reserved_metadata::WEIGHT)
                .is_some_and(|tag| tag == "0") =>
            {
                tags.remove(reserved_metadata::WEIGHT);
                0
            }
            ..=0 => KITEX_DEFAULT_WEIGHT,
            weight => weight.try_into().unwrap_or(u32::MAX),
        };
        reserved_metadata::decode(&mut instance, tags, &[reserved_metadata::WEIGHT]);
        Ok(vec![instance])
    }
}

#[cfg(test)]
mod tests {
    use super::super::properties::{self, in_range};
    use super::*;

    const PREFIX: &str = "kitex/registry-etcd";

    fn decode(value: &str) -> Result<Instance, DecodeError> {
        let decoded = properties::decode(&Kitex, PREFIX, "echo", "", value.as_bytes());
        decoded.map(|mut instances| instances.remove(0))
    }

    #[test]
    fn vectors_encode_and_decode_exactly() {
        for (key, value, instance) in [
            (
                "kitex/registry-etcd/echo/127.0.0.1:8888",
                r#"{"network":"tcp","address":"127.0.0.1:8888","weight":66,"tags":{"hello":"world"}}"#,
                Instance::new("echo", "127.0.0.1:8888")
                    .weight(66)
                    .metadata("hello", "world"),
            ),
            (
                "kitex/registry-etcd/echo/10.0.0.1:8888",
                r#"{"network":"tcp","address":"10.0.0.1:8888","weight":0,"tags":null}"#,
                Instance::new("echo", "10.0.0.1:8888").weight(10),
            ),
        ] {
            assert_eq!(Kitex.key(PREFIX, &instance), key);
            assert_eq!(Kitex.encode(&instance).unwrap(), value.as_bytes());
            assert_eq!(decode(value).unwrap(), instance);
        }
        let instance = Instance::new("echo", "10.0.0.1:8888");
        assert_eq!(Kitex.key("", &instance), "/echo/10.0.0.1:8888");
        assert!(in_range(&Kitex, "", "echo", "/echo/10.0.0.1:8888"));
    }

    #[test]
    fn weight_0_reads_as_10_without_our_tag() {
        let weight = |weight: &str, tags: &str| {
            let value = format!(r#"{{"address":"h:1","weight":{weight},"tags":{tags}}}"#);
            decode(&value).unwrap().weight
        };
        for none in ["0", "-0", "-1", "null", "-9223372036854775808"] {
            assert_eq!(weight(none, "null"), 10);
            assert_eq!(weight(none, r#"{"weight":"5"}"#), 10);
            assert_eq!(weight(none, r#"{"weight":"0"}"#), 0);
        }
        assert_eq!(weight("66", r#"{"weight":"0"}"#), 66);
        assert_eq!(weight("9223372036854775807", "null"), u32::MAX);
    }

    #[test]
    fn range_excludes_services_with_a_longer_name() {
        assert!(in_range(
            &Kitex,
            PREFIX,
            "echo",
            "kitex/registry-etcd/echo/a:1"
        ));
        assert!(!in_range(
            &Kitex,
            PREFIX,
            "echo",
            "kitex/registry-etcd/echo2/a:1"
        ));
    }

    #[test]
    fn unix_sockets_have_their_own_network() {
        assert_eq!(
            decode(r#"{"Network":"unix","Address":"/run/a.sock"}"#)
                .unwrap()
                .address,
            "unix:/run/a.sock"
        );
        let socket = Instance::new("echo", "unix:/run/a.sock");
        let value = String::from_utf8(Kitex.encode(&socket).unwrap()).unwrap();
        assert!(
            value.starts_with(r#"{"network":"unix","address":"/run/a.sock""#),
            "{value}"
        );
    }

    #[test]
    fn refuses_what_a_go_reader_refuses() {
        for value in [
            "{}",
            r#"{"address":1}"#,
            r#"{"address":"a:1","tags":[]}"#,
            r#"{"address":"a:1","weight":"10"}"#,
            r#"{"address":"a:1","weight":1.5}"#,
            r#"{"address":"a:1","weight":9223372036854775808}"#,
            r#"{"address":"a:1","tags":{"a":1}}"#,
            r#"{"address":"a:1","network":4}"#,
        ] {
            assert!(decode(value).is_err(), "{value}");
        }
    }
}
