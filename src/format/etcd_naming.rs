//! etcd's own naming convention, the default format.
//!
//! `services/greeter/10.0.0.5:50051 => {"Op":0,"Addr":"10.0.0.5:50051","Metadata":{"weight":50}}`
//!
//! The convention allows any JSON as `Metadata`. We write an object with the instance's own
//! metadata and, where they differ from the default, `weight` (a number), `zone`, `version`, `tls`
//! (a boolean) and `status` (`draining`). An empty object is written as `null`.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::codec::{DecodeError, Format};
use super::go_json::{self, Object};
use super::key::{KeyContext, KeyRange, id_after, service_prefix};
use super::reserved_metadata::{self, DRAINING};
use crate::error::{Error, Result};
use crate::instance::Instance;

/// The metadata key for a `Metadata` that is not an object, so that its value is not lost. A string
/// is kept as it is, any other JSON as its text. The value is written back as a string.
const BARE_METADATA: &str = "";

/// etcd's own naming convention (`go.etcd.io/etcd/client/v3/naming`), the default.
///
/// Keys are `prefix/service/id`, the default prefix is `services`, the default time to live 10 s.
/// The target in Go is `prefix/service`: `etcd:///greeter` has the prefix `""`, and
/// `etcd:////greeter`, whose keys begin with a slash, the prefix `/`.
/// `Metadata` carries all fields of an instance, beside its own metadata.
#[derive(Debug, Clone, Copy, Default)]
pub struct EtcdNaming;

/// Fields are written in this order.
#[derive(Serialize)]
struct Endpoint<'a> {
    #[serde(rename = "Op")]
    op: u8,
    #[serde(rename = "Addr")]
    addr: &'a str,
    #[serde(rename = "Metadata")]
    metadata: Option<Value>,
}

impl Format for EtcdNaming {
    fn name(&self) -> &'static str {
        "etcd"
    }

    fn default_prefix(&self) -> &'static str {
        "services"
    }

    fn default_ttl(&self) -> Duration {
        Duration::from_secs(10)
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        service_prefix(prefix, &instance.service) + &instance.id
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(service_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        go_json::to_vec(&Endpoint {
            op: 0,
            addr: &instance.address,
            metadata: encode_metadata(instance),
        })
        .map_err(|error| Error::invalid("instance", &instance.id, error.to_string()))
    }

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        // `Op` has no meaning in a stored value, but a Go reader refuses all types but `uint8`.
        fields.unsigned("Op", u8::MAX.into())?;
        let address = fields.string("Addr")?;
        if address.is_empty() {
            return Err(DecodeError::new("Addr is missing or empty"));
        }
        let mut instance = Instance::new(context.service, address);
        let prefix = service_prefix(context.prefix, context.service);
        if let Some(id) = id_after(&prefix, context.key) {
            instance.id = id.to_owned();
        }
        match fields.any("Metadata") {
            None => {}
            Some(Value::Object(entries)) => {
                for (key, value) in &entries {
                    decode_metadata(&mut instance, key, value);
                }
            }
            Some(bare) => {
                instance
                    .metadata
                    .insert(BARE_METADATA.to_owned(), to_text(&bare));
            }
        }
        Ok(vec![instance])
    }
}

fn encode_metadata(instance: &Instance) -> Option<Value> {
    let mut entries: BTreeMap<&str, Value> = instance
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), Value::from(value.as_str())))
        .collect();
    if instance.weight != Instance::DEFAULT_WEIGHT {
        entries.insert(reserved_metadata::WEIGHT, instance.weight.into());
    }
    if let Some(zone) = &instance.zone {
        entries.insert(reserved_metadata::ZONE, zone.as_str().into());
    }
    if let Some(version) = &instance.version {
        entries.insert(reserved_metadata::VERSION, version.as_str().into());
    }
    if let Some(tls) = instance.tls {
        entries.insert(reserved_metadata::TLS, tls.into());
    }
    if instance.draining {
        entries.insert(reserved_metadata::STATUS, DRAINING.into());
    }
    match entries.len() {
        0 => None,
        1 if entries.contains_key(BARE_METADATA) => entries.remove(BARE_METADATA),
        _ => Some(
            entries
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
        ),
    }
}

/// Moves one entry of `Metadata` into its field. An entry that is not ours, or that we cannot read,
/// goes into `instance.metadata`: another writer may mean something else by `weight`, and its value
/// must not be lost.
fn decode_metadata(instance: &mut Instance, key: &str, value: &Value) {
    match (key, value) {
        (reserved_metadata::WEIGHT, value) if parse_weight(value).is_some() => {
            instance.weight = parse_weight(value).unwrap_or(Instance::DEFAULT_WEIGHT);
        }
        (reserved_metadata::ZONE, Value::String(zone)) => instance.zone = Some(zone.clone()),
        (reserved_metadata::VERSION, Value::String(version)) => {
            instance.version = Some(version.clone())
        }
        (reserved_metadata::TLS, Value::Bool(tls)) => instance.tls = Some(*tls),
        (reserved_metadata::TLS, Value::String(tls)) if tls.parse::<bool>().is_ok() => {
            instance.tls = tls.parse().ok();
        }
        (reserved_metadata::STATUS, Value::String(status)) if status == DRAINING => {
            instance.draining = true
        }
        _ => {
            instance.metadata.insert(key.to_owned(), to_text(value));
        }
    }
}

fn parse_weight(value: &Value) -> Option<u32> {
    match value {
        Value::Number(number) => number.as_u64()?.try_into().ok(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// The text of a string, and the JSON of any other value.
fn to_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::properties;
    use super::*;

    fn encode(instance: &Instance) -> String {
        String::from_utf8(EtcdNaming.encode(instance).unwrap()).unwrap()
    }

    fn decode(key: &str, value: &str) -> Result<Instance, DecodeError> {
        let service = key.split('/').next().unwrap();
        properties::decode(&EtcdNaming, "", service, key, value.as_bytes())
            .map(|instances| instances.into_iter().next().unwrap())
    }

    /// Test vectors: a key, a value, and the instance that they stand for.
    fn vectors() -> Vec<(&'static str, &'static str, Instance)> {
        vec![
            (
                "foo/127.0.0.1:2000",
                r#"{"Op":0,"Addr":"127.0.0.1:2000","Metadata":null}"#,
                Instance::new("foo", "127.0.0.1:2000"),
            ),
            (
                "foo/a1",
                r#"{"Op":0,"Addr":"127.0.0.1","Metadata":"metadata"}"#,
                Instance::new("foo", "127.0.0.1")
                    .id("a1")
                    .metadata(BARE_METADATA, "metadata"),
            ),
            (
                "svc/10.0.0.1:50051",
                r#"{"Op":0,"Addr":"10.0.0.1:50051","Metadata":{"weight":10,"zone":"a\u0026b"}}"#,
                Instance::new("svc", "10.0.0.1:50051")
                    .weight(10)
                    .zone("a&b"),
            ),
            (
                "grpc-proxy/127.0.0.1:23790",
                r#"{"Op":0,"Addr":"127.0.0.1:23790","Metadata":"{\"name\":\"host-1\"}"}"#,
                Instance::new("grpc-proxy", "127.0.0.1:23790")
                    .metadata(BARE_METADATA, r#"{"name":"host-1"}"#),
            ),
        ]
    }

    #[test]
    fn vectors_encode_and_decode_exactly() {
        for (key, value, instance) in vectors() {
            assert_eq!(EtcdNaming.key("", &instance), key);
            assert_eq!(encode(&instance), value);
            assert_eq!(decode(key, value).unwrap(), instance);
        }
    }

    #[test]
    fn accepts_what_a_go_reader_accepts() {
        for value in [
            r#"{"op":1,"addr":"a:1","METADATA":null}"#,
            r#"{"Addr":"a:1","Extra":[1]}"#,
        ] {
            assert_eq!(
                decode("foo/x", value).unwrap(),
                Instance::new("foo", "a:1").id("x")
            );
        }
    }

    #[test]
    fn refuses_what_a_go_reader_refuses() {
        for value in [
            "a:1",
            r#"{"Op":"0","Addr":"a:1"}"#,
            r#"{"Op":256,"Addr":"a:1"}"#,
            r#"{"Op":-1,"Addr":"a:1"}"#,
            r#"{"Addr":7}"#,
            "{}",
            r#"{"Addr":null}"#,
            "[]",
            "",
        ] {
            assert!(decode("foo/x", value).is_err(), "{value}");
        }
    }

    #[test]
    fn unreadable_reserved_names_stay_in_the_metadata() {
        let instance = decode(
            "foo/x",
            r#"{"Addr":"a:1","Metadata":{"weight":"heavy","zone":7,"status":"up","list":[1,2]}}"#,
        )
        .unwrap();
        assert_eq!(instance.weight, Instance::DEFAULT_WEIGHT);
        assert_eq!(instance.metadata["weight"], "heavy");
        assert_eq!(instance.metadata["zone"], "7");
        assert_eq!(instance.metadata["status"], "up");
        assert_eq!(instance.metadata["list"], "[1,2]");
    }

    #[test]
    fn non_object_metadata_is_kept_as_text() {
        for (metadata, text) in [("7", "7"), ("[1,2]", "[1,2]"), ("true", "true")] {
            let value = format!(r#"{{"Addr":"a:1","Metadata":{metadata}}}"#);
            let instance = decode("foo/x", &value).unwrap();
            assert_eq!(instance.metadata[BARE_METADATA], text);
            let again = format!(r#"{{"Op":0,"Addr":"a:1","Metadata":"{text}"}}"#);
            assert_eq!(encode(&instance), again);
        }
    }

    #[test]
    fn range_excludes_services_with_a_longer_name() {
        let range = EtcdNaming.range("services", "greeter");
        let holds =
            |key: String| range.start <= key.clone().into_bytes() && key.into_bytes() < range.end;
        assert!(holds(
            EtcdNaming.key("services", &Instance::new("greeter", "a:1"))
        ));
        assert!(!holds(
            EtcdNaming.key("services", &Instance::new("greeter2", "a:1"))
        ));
    }

    #[test]
    fn prefix_may_repeat_the_service_name() {
        let instance = Instance::new("greeter", "a:1");
        let key = EtcdNaming.key("greeter/greeter", &instance);
        let value = EtcdNaming.encode(&instance).unwrap();
        let decoded =
            properties::decode(&EtcdNaming, "greeter/greeter", "greeter", &key, &value).unwrap();
        assert_eq!(decoded, [instance]);
    }

    #[test]
    fn tls_is_written_only_if_set() {
        let instance = Instance::new("foo", "a:1").id("x");
        for (tls, metadata) in [(true, r#"{"tls":true}"#), (false, r#"{"tls":false}"#)] {
            let value = format!(r#"{{"Op":0,"Addr":"a:1","Metadata":{metadata}}}"#);
            let instance = instance.clone().tls(tls);
            assert_eq!(encode(&instance), value);
            assert_eq!(decode("foo/x", &value).unwrap(), instance);
        }
        let text = r#"{"Addr":"a:1","Metadata":{"tls":"true"}}"#;
        assert_eq!(decode("foo/x", text).unwrap(), instance.clone().tls(true));
        let other = r#"{"Addr":"a:1","Metadata":{"tls":"1.3"}}"#;
        let other = decode("foo/x", other).unwrap();
        assert_eq!(other.tls, None);
        assert_eq!(other.metadata["tls"], "1.3");
    }
}
