//! dubbo-go's registrations, in its application mode.
//!
//! `/services/svc/127.0.0.1:2233 => {"ID":"testID","ServiceName":"svc","Host":"127.0.0.1",
//! "Port":2233,"Weight":0,"Enable":true,"Healthy":true,"Metadata":{"t1":"test12"},
//! "ServiceMetadata":null,"Address":"","GroupName":"","Tag":""}`, and a newline.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::go_json::{self, Object};
use super::{DecodeError, Format, KeyRange, carried, slashed_prefix};
use crate::error::{Error, Result};
use crate::instance::DEFAULT_WEIGHT;
use crate::instance::Instance;

/// dubbo-go's registrations in application mode (`registry/etcdv3`): keys are `prefix/app/host:port`,
/// prefix `/services`, time to live 10 s. (dubbo-go takes its own from its configuration.) With an
/// empty prefix they are `/app/host:port`. What names another service is not shown.
///
/// Id, weight and metadata have places of their own; zone, version and TLS are in the metadata, where
/// dubbo-go does not look. An instance that drains, or has weight 0, is written with `Enable` false,
/// so that no client calls it, and with its reason in the metadata, so that ours still show it. What
/// anyone else disabled, or marked as not healthy, is not shown at all.
///
/// The default weight, 100 here as there, is written as 0, as dubbo-go does; 0 or less reads as 100.
/// `Tag`, dubbo's routing tag, is in the metadata under [`DubboGo::TAG`]. An address must be
/// `host:port`.
///
/// dubbo-go's consumers want more than a registration to call a service by its interface (a mapping
/// from interface to application, and the service's metadata). Write those yourself if they are to
/// call you; reading needs neither.
#[derive(Debug, Clone, Copy, Default)]
pub struct DubboGo;

impl DubboGo {
    /// The metadata under which an instance's `Tag` is kept.
    pub const TAG: &'static str = "dubbo.tag";
}

/// Field order is the order in the value.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct ServiceInstance<'a> {
    #[serde(rename = "ID")]
    id: &'a str,
    service_name: &'a str,
    host: &'a str,
    port: u16,
    weight: u32,
    enable: bool,
    healthy: bool,
    #[serde(serialize_with = "go_json::null_if_empty")]
    metadata: BTreeMap<String, String>,
    service_metadata: Option<()>,
    address: &'a str,
    group_name: &'a str,
    tag: String,
}

impl Format for DubboGo {
    fn name(&self) -> &'static str {
        "dubbo-go"
    }

    fn default_prefix(&self) -> &'static str {
        "/services"
    }

    fn default_ttl(&self) -> Duration {
        Duration::from_secs(10)
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        slashed_prefix(prefix, &instance.service) + &instance.address
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(slashed_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        let invalid = |reason| Error::invalid("address", &instance.address, reason);
        let (host, port) = instance
            .address
            .rsplit_once(':')
            .ok_or_else(|| invalid("dubbo-go registers a host and a port"))?;
        let port: u16 = port
            .parse()
            .map_err(|_| invalid("dubbo-go registers a host and a port, a number"))?;
        // Host and port would read as another address than the key has: `host:080`.
        let address = match format!("{host}:{port}") == instance.address {
            true => "",
            false => &instance.address,
        };
        let mut metadata = carried::all(instance);
        metadata.remove(carried::ID);
        if instance.weight != 0 {
            metadata.remove(carried::WEIGHT);
        }
        let tag = metadata
            .get(Self::TAG)
            .filter(|tag| !tag.is_empty())
            .cloned();
        if tag.is_some() {
            metadata.remove(Self::TAG);
        }
        let mut value = go_json::to_vec(&ServiceInstance {
            id: &instance.id,
            service_name: &instance.service,
            // An IPv6 host keeps its brackets: dubbo-go joins host and port with a colon.
            host,
            port,
            weight: match instance.weight {
                DEFAULT_WEIGHT => 0,
                weight => weight,
            },
            enable: instance.is_eligible(),
            healthy: true,
            metadata,
            service_metadata: None,
            address,
            group_name: "",
            tag: tag.unwrap_or_default(),
        })
        .map_err(|error| Error::invalid("instance", &instance.id, error.to_string()))?;
        value.push(b'\n');
        Ok(value)
    }

    fn decode(
        &self,
        _prefix: &str,
        service: &str,
        _key: &[u8],
        value: &[u8],
    ) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        let mut metadata = fields.strings_by_name("Metadata")?;
        // Read for their types alone: a Go reader refuses the entry if one is wrong.
        fields.object("ServiceMetadata")?;
        fields.string("GroupName")?;
        let name = fields.string("ServiceName")?;
        let mut instance = Instance::new(service, address(&fields)?);
        let id = fields.string("ID")?;
        if !id.is_empty() {
            instance.id = id.to_owned();
        }
        instance.weight = match fields.signed("Weight")? {
            ..=0 if metadata
                .get(carried::WEIGHT)
                .is_some_and(|weight| weight == "0") =>
            {
                metadata.remove(carried::WEIGHT);
                0
            }
            ..=0 => DEFAULT_WEIGHT,
            weight => weight.try_into().unwrap_or(u32::MAX),
        };
        carried::take(&mut instance, metadata, &[carried::ID, carried::WEIGHT]);
        let tag = fields.string("Tag")?;
        if !tag.is_empty() {
            instance
                .metadata
                .insert(Self::TAG.to_owned(), tag.to_owned());
        }
        let (enable, healthy) = (fields.boolean("Enable")?, fields.boolean("Healthy")?);
        // A service named `a/b` stands in the range of `a`.
        let here = name.is_empty() || name == service;
        // Disabled by us, it says why, and is shown for what it is; it is not called either way.
        let shown = here && healthy && (enable || !instance.is_eligible());
        Ok(if shown { vec![instance] } else { Vec::new() })
    }
}

/// `Address` where it is set, else host and port.
fn address(fields: &Object) -> Result<String, DecodeError> {
    let (host, port) = (fields.string("Host")?, fields.signed("Port")?);
    let address = fields.string("Address")?;
    if !address.is_empty() {
        return Ok(address.to_owned());
    }
    match (host, port) {
        ("", _) => Err(DecodeError::new("Host and Address are missing or empty")),
        (host, ..=0) => Ok(host.to_owned()),
        (host, port) if host.contains(':') && !host.starts_with('[') => {
            Ok(format!("[{host}]:{port}"))
        }
        (host, port) => Ok(format!("{host}:{port}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::laws::{in_range, read};
    use super::*;

    const PREFIX: &str = "/services";

    fn written(instance: &Instance) -> String {
        String::from_utf8(DubboGo.encode(instance).unwrap()).unwrap()
    }

    fn decoded(value: &str) -> Result<Vec<Instance>, DecodeError> {
        read(&DubboGo, PREFIX, "svc", "", value.as_bytes())
    }

    #[test]
    fn every_vector_is_written_byte_for_byte_and_read_field_for_field() {
        let value = concat!(
            r#"{"ID":"testID","ServiceName":"svc","Host":"127.0.0.1","Port":2233,"Weight":0,"Enable":true,"Healthy":true,"Metadata":{"t1":"test12"},"ServiceMetadata":null,"Address":"","GroupName":"","Tag":""}"#,
            "\n"
        );
        let instance = Instance::new("svc", "127.0.0.1:2233")
            .id("testID")
            .metadata("t1", "test12");
        assert_eq!(
            DubboGo.key(PREFIX, &instance),
            "/services/svc/127.0.0.1:2233"
        );
        assert_eq!(written(&instance), value);
        assert_eq!(decoded(value).unwrap(), [instance]);
        assert!(in_range(
            &DubboGo,
            PREFIX,
            "svc",
            "/services/svc/127.0.0.1:2233"
        ));
        assert!(!in_range(
            &DubboGo,
            PREFIX,
            "svc",
            "/services/svc2/127.0.0.1:2233"
        ));
    }

    #[test]
    fn what_is_disabled_or_not_healthy_is_not_used() {
        let shown = |state: &str| {
            let value = format!(r#"{{"Host":"h","Port":1,{state}}}"#);
            decoded(&value).unwrap().len()
        };
        assert_eq!(shown(r#""Enable":true,"Healthy":true"#), 1);
        for state in [
            r#""Enable":false,"Healthy":true"#,
            r#""Enable":true,"Healthy":false"#,
            r#""Enable":true"#,
            r#""Healthy":true"#,
            r#""Healthy":false,"Metadata":{"status":"draining"}"#,
        ] {
            assert_eq!(shown(state), 0, "{state}");
        }
    }

    #[test]
    fn what_drains_or_has_no_weight_is_disabled_for_everyone_and_known_to_us() {
        let instance = Instance::new("svc", "h:1");
        for leaving in [instance.clone().draining(true), instance.weight(0)] {
            assert!(written(&leaving).contains(r#""Enable":false,"Healthy":true"#));
            let read = decoded(&written(&leaving)).unwrap();
            assert_eq!(read, [leaving]);
            assert!(!read[0].is_eligible());
        }
    }

    #[test]
    fn a_weight_of_0_or_less_reads_as_100() {
        let weight = |weight: &str| {
            let value = format!(
                r#"{{"Host":"h","Port":1,"Enable":true,"Healthy":true,"Weight":{weight}}}"#
            );
            decoded(&value).unwrap()[0].weight
        };
        assert_eq!(weight("0"), 100);
        assert_eq!(weight("-7"), 100);
        assert_eq!(weight("7"), 7);
        assert_eq!(weight("4294967296"), u32::MAX);
        let instance = Instance::new("svc", "h:1").weight(7);
        assert!(written(&instance).contains(r#""Weight":7,"#));
    }

    #[test]
    fn the_address_is_the_one_that_is_set_or_host_and_port() {
        let address = |fields: &str| {
            let value = format!(r#"{{"Enable":true,"Healthy":true,{fields}}}"#);
            decoded(&value).map(|read| read[0].address.clone())
        };
        assert_eq!(
            address(r#""Host":"h","Port":1,"Address":"x:2""#).unwrap(),
            "x:2"
        );
        assert_eq!(address(r#""Host":"::1","Port":1"#).unwrap(), "[::1]:1");
        assert_eq!(address(r#""Host":"[::1]","Port":1"#).unwrap(), "[::1]:1");
        assert_eq!(address(r#""Host":"h""#).unwrap(), "h");
        assert!(address(r#""Port":1"#).is_err());
        let instance = Instance::new("svc", "[::1]:50051");
        assert!(written(&instance).contains(r#""Host":"[::1]","Port":50051,"#));
        // One that a number cannot say is said in full.
        let instance = Instance::new("svc", "h:080");
        assert!(written(&instance).contains(r#""Port":80,"#));
        assert!(written(&instance).contains(r#""Address":"h:080","#));
        assert_eq!(decoded(&written(&instance)).unwrap(), [instance]);
    }

    #[test]
    fn the_tag_is_carried() {
        let instance = Instance::new("svc", "h:1").metadata(DubboGo::TAG, "gray");
        assert!(written(&instance).contains(r#""Metadata":null,"#));
        assert!(written(&instance).ends_with("\"Tag\":\"gray\"}\n"));
        assert_eq!(decoded(&written(&instance)).unwrap(), [instance]);
    }

    #[test]
    fn what_names_another_service_is_not_shown() {
        let named = |name: &str| {
            let fields = r#""Host":"h","Port":1,"Enable":true,"Healthy":true"#;
            decoded(&format!(r#"{{"ServiceName":"{name}",{fields}}}"#)).unwrap()
        };
        assert_eq!(named("svc/b"), []);
        assert_eq!(named("svc").len(), 1);
        assert_eq!(named("").len(), 1);
    }

    #[test]
    fn what_a_go_reader_refuses_is_an_error() {
        for field in [
            r#""ID":1"#,
            r#""ServiceName":true"#,
            r#""ServiceMetadata":"x""#,
            r#""GroupName":{}"#,
            r#""Address":1"#,
            r#""Host":1"#,
            r#""Port":"1""#,
            r#""Port":1.5"#,
            r#""Weight":9223372036854775808"#,
            r#""Enable":1"#,
            r#""Healthy":"true""#,
            r#""Metadata":{"a":true}"#,
            r#""Tag":[]"#,
        ] {
            let value = format!(r#"{{"Address":"h:1",{field}}}"#);
            assert!(decoded(&value).is_err(), "{value}");
        }
    }
}
