//! dubbo-go's registrations, in its application mode.
//!
//! `/services/svc/127.0.0.1:2233 => {"ID":"testID","ServiceName":"svc","Host":"127.0.0.1",
//! "Port":2233,"Weight":0,"Enable":true,"Healthy":true,"Metadata":{"t1":"test12"},
//! "ServiceMetadata":null,"Address":"","GroupName":"","Tag":""}`, and a newline.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::codec::{DecodeError, Format};
use super::go_json::{self, Object};
use super::key::{KeyContext, KeyRange, slashed_prefix};
use super::reserved_metadata;
use crate::error::{Error, Result};
use crate::instance::Instance;

/// dubbo-go's registrations in application mode (`registry/etcdv3`): keys are
/// `prefix/app/host:port`, the default prefix is `/services`, the default time to live 10 s
/// (dubbo-go has no default: its configuration decides). With an empty prefix the keys are
/// `/app/host:port`. Entries that name another service are not shown.
///
/// dubbo-go has fields for id, weight and metadata. Zone, version and TLS are in the metadata,
/// where dubbo-go ignores them. An instance that drains or has weight 0 is written with `Enable`
/// false, so that no client calls it, and with the reason in the metadata, so that a `Directory`
/// still shows it. An entry that other software disabled or marked as not healthy is not shown.
///
/// The default weight is 100 here and in dubbo-go. Like dubbo-go we write it as 0, and read 0 or
/// less as 100. `Tag`, dubbo's routing tag, is in the metadata under [`DubboGo::TAG`]. An address
/// must be `host:port`.
///
/// To call a service by its interface, dubbo-go's consumers need more than a registration: a
/// mapping from interface to application, and the service's metadata. This crate does not write
/// them, and does not need them for reading.
#[derive(Debug, Clone, Copy, Default)]
pub struct DubboGo;

impl DubboGo {
    /// The metadata key of an instance's `Tag`.
    pub const TAG: &'static str = "dubbo.tag";
}

/// Fields are written in this order.
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
            .ok_or_else(|| invalid("dubbo-go needs host:port"))?;
        let port: u16 = port
            .parse()
            .map_err(|_| invalid("dubbo-go needs a port number"))?;
        // `Address` is written only if host and port do not say the same, as for `host:080`.
        let address = match format!("{host}:{port}") == instance.address {
            true => "",
            false => &instance.address,
        };
        let mut metadata = reserved_metadata::encode(instance);
        metadata.remove(reserved_metadata::ID);
        if instance.weight != 0 {
            metadata.remove(reserved_metadata::WEIGHT);
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
            // An IPv6 host keeps its brackets, because dubbo-go joins host and port with a colon.
            host,
            port,
            weight: match instance.weight {
                Instance::DEFAULT_WEIGHT => 0,
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

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        let mut metadata = fields.strings_by_name("Metadata")?;
        // Checked only because a Go reader refuses the entry if one of these has a wrong type.
        fields.object("ServiceMetadata")?;
        fields.string("GroupName")?;
        let name = fields.string("ServiceName")?;
        let mut instance = Instance::new(context.service, decode_address(&fields)?);
        let id = fields.string("ID")?;
        if !id.is_empty() {
            instance.id = id.to_owned();
        }
        instance.weight = match fields.signed("Weight")? {
            ..=0 if metadata
                .get(reserved_metadata::WEIGHT)
                .is_some_and(|weight| weight == "0") =>
            {
                metadata.remove(reserved_metadata::WEIGHT);
                0
            }
            ..=0 => Instance::DEFAULT_WEIGHT,
            weight => weight.try_into().unwrap_or(u32::MAX),
        };
        let own_fields = [reserved_metadata::ID, reserved_metadata::WEIGHT];
        reserved_metadata::decode(&mut instance, metadata, &own_fields);
        let tag = fields.string("Tag")?;
        if !tag.is_empty() {
            instance
                .metadata
                .insert(Self::TAG.to_owned(), tag.to_owned());
        }
        let (enable, healthy) = (fields.boolean("Enable")?, fields.boolean("Healthy")?);
        // The range of a service `a` also holds a service named `a/b`.
        let is_own = name.is_empty() || name == context.service;
        // An entry that this crate disabled has the reason in its metadata, so it is not eligible.
        let is_shown = is_own && healthy && (enable || !instance.is_eligible());
        Ok(if is_shown { vec![instance] } else { Vec::new() })
    }
}

/// The address in `Address`, or else in `Host` and `Port`.
fn decode_address(fields: &Object) -> Result<String, DecodeError> {
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
    use super::super::properties::{self, in_range};
    use super::*;

    const PREFIX: &str = "/services";

    fn encode(instance: &Instance) -> String {
        String::from_utf8(DubboGo.encode(instance).unwrap()).unwrap()
    }

    fn decode(value: &str) -> Result<Vec<Instance>, DecodeError> {
        properties::decode(&DubboGo, PREFIX, "svc", "", value.as_bytes())
    }

    #[test]
    fn vectors_encode_and_decode_exactly() {
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
        assert_eq!(encode(&instance), value);
        assert_eq!(decode(value).unwrap(), [instance]);
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
    fn ignores_disabled_and_unhealthy_entries() {
        let shown = |state: &str| {
            let value = format!(r#"{{"Host":"h","Port":1,{state}}}"#);
            decode(&value).unwrap().len()
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
    fn draining_or_weight_0_is_disabled_but_shown() {
        let instance = Instance::new("svc", "h:1");
        for leaving in [instance.clone().draining(true), instance.weight(0)] {
            assert!(encode(&leaving).contains(r#""Enable":false,"Healthy":true"#));
            let read = decode(&encode(&leaving)).unwrap();
            assert_eq!(read, [leaving]);
            assert!(!read[0].is_eligible());
        }
    }

    #[test]
    fn weight_0_or_less_reads_as_100() {
        let weight = |weight: &str| {
            let value = format!(
                r#"{{"Host":"h","Port":1,"Enable":true,"Healthy":true,"Weight":{weight}}}"#
            );
            decode(&value).unwrap()[0].weight
        };
        assert_eq!(weight("0"), 100);
        assert_eq!(weight("-7"), 100);
        assert_eq!(weight("7"), 7);
        assert_eq!(weight("4294967296"), u32::MAX);
        let instance = Instance::new("svc", "h:1").weight(7);
        assert!(encode(&instance).contains(r#""Weight":7,"#));
    }

    #[test]
    fn address_overrides_host_and_port() {
        let address = |fields: &str| {
            let value = format!(r#"{{"Enable":true,"Healthy":true,{fields}}}"#);
            decode(&value).map(|read| read[0].address.clone())
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
        assert!(encode(&instance).contains(r#""Host":"[::1]","Port":50051,"#));
        // A port that a number cannot express is written in `Address`.
        let instance = Instance::new("svc", "h:080");
        assert!(encode(&instance).contains(r#""Port":80,"#));
        assert!(encode(&instance).contains(r#""Address":"h:080","#));
        assert_eq!(decode(&encode(&instance)).unwrap(), [instance]);
    }

    #[test]
    fn tag_is_carried_in_the_metadata() {
        let instance = Instance::new("svc", "h:1").metadata(DubboGo::TAG, "gray");
        assert!(encode(&instance).contains(r#""Metadata":null,"#));
        assert!(encode(&instance).ends_with("\"Tag\":\"gray\"}\n"));
        assert_eq!(decode(&encode(&instance)).unwrap(), [instance]);
    }

    #[test]
    fn ignores_entries_of_other_services() {
        let decode_named = |name: &str| {
            let fields = r#""Host":"h","Port":1,"Enable":true,"Healthy":true"#;
            decode(&format!(r#"{{"ServiceName":"{name}",{fields}}}"#)).unwrap()
        };
        assert_eq!(decode_named("svc/b"), []);
        assert_eq!(decode_named("svc").len(), 1);
        assert_eq!(decode_named("").len(), 1);
    }

    #[test]
    fn refuses_what_a_go_reader_refuses() {
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
            assert!(decode(&value).is_err(), "{value}");
        }
    }
}
