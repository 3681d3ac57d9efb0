//! kitex' registrations.
//!
//! `kitex/registry-etcd/echo/127.0.0.1:8888 => {"network":"tcp","address":"127.0.0.1:8888",
//! "weight":66,"tags":{"hello":"world"}}`

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::go_json::{self, Object};
use super::{DecodeError, Format, KeyRange, carried, slashed_prefix};
use crate::error::{Error, Result};
use crate::instance::Instance;

/// The weight of a registration whose weight is 0 or less (`defaultWeight` in `etcd_resolver.go`).
const DEFAULT_WEIGHT: u32 = 10;

/// kitex' registrations (`registry-etcd`): keys are `prefix/service/host:port`, prefix
/// `kitex/registry-etcd`, time to live 60 s. With an empty prefix they are `/service/host:port`.
///
/// Weight and tags have places of their own; the tags are the metadata. Id, zone, version, draining
/// and TLS are tags as well, which kitex' clients do not look at.
///
/// A weight of 0 or less reads as 10, kitex' default, and 10 is written as 0. So kitex' clients call
/// an instance of weight 0 as well, while ours, who find a tag `weight` of `0`, do not. **Our default
/// is 100**: beside servers in Go that leave theirs at 10, say `.weight(10)`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kitex;

/// Field order is the order in the value.
#[derive(Serialize)]
struct InstanceInfo<'a> {
    network: &'a str,
    address: &'a str,
    weight: u32,
    #[serde(serialize_with = "go_json::null_if_empty")]
    tags: BTreeMap<String, String>,
}

/// The network and the address on it.
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

    /// With the slash that kitex' own reader leaves out, so that `echo` does not show `echo2`.
    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(slashed_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        let mut tags = carried::all(instance);
        if instance.weight != 0 {
            tags.remove(carried::WEIGHT);
        }
        let (network, address) = network(&instance.address);
        let weight = match instance.weight {
            DEFAULT_WEIGHT => 0,
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

    fn decode(
        &self,
        _prefix: &str,
        service: &str,
        _key: &[u8],
        value: &[u8],
    ) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        let mut tags = fields.strings_by_name("tags")?;
        let address = match (fields.string("network")?, fields.string("address")?) {
            (_, "") => return Err(DecodeError::new("address is missing or empty")),
            ("unix", path) => format!("unix:{path}"),
            (_, address) => address.to_owned(),
        };
        let mut instance = Instance::new(service, address);
        instance.weight = match fields.signed("weight")? {
            ..=0 if tags.get(carried::WEIGHT).is_some_and(|tag| tag == "0") => {
                tags.remove(carried::WEIGHT);
                0
            }
            ..=0 => DEFAULT_WEIGHT,
            weight => weight.try_into().unwrap_or(u32::MAX),
        };
        carried::take(&mut instance, tags, &[carried::WEIGHT]);
        Ok(vec![instance])
    }
}

#[cfg(test)]
mod tests {
    use super::super::laws::{in_range, read};
    use super::*;

    const PREFIX: &str = "kitex/registry-etcd";

    fn decoded(value: &str) -> Result<Instance, DecodeError> {
        read(&Kitex, PREFIX, "echo", "", value.as_bytes()).map(|mut read| read.remove(0))
    }

    #[test]
    fn every_vector_is_written_byte_for_byte_and_read_field_for_field() {
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
            assert_eq!(decoded(value).unwrap(), instance);
        }
        let instance = Instance::new("echo", "10.0.0.1:8888");
        assert_eq!(Kitex.key("", &instance), "/echo/10.0.0.1:8888");
        assert!(in_range(&Kitex, "", "echo", "/echo/10.0.0.1:8888"));
    }

    #[test]
    fn a_weight_of_0_or_less_reads_as_10_unless_ours_says_that_it_is_meant() {
        let weight = |weight: &str, tags: &str| {
            let value = format!(r#"{{"address":"h:1","weight":{weight},"tags":{tags}}}"#);
            decoded(&value).unwrap().weight
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
    fn a_service_does_not_show_another_with_a_longer_name() {
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
    fn the_network_is_told_apart() {
        assert_eq!(
            decoded(r#"{"Network":"unix","Address":"/run/a.sock"}"#)
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
    fn what_a_go_reader_refuses_is_an_error() {
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
            assert!(decoded(value).is_err(), "{value}");
        }
    }
}
