//! etcd's own naming convention, the default format.
//!
//! `services/greeter/10.0.0.5:50051 => {"Op":0,"Addr":"10.0.0.5:50051","Metadata":{"weight":50}}`
//!
//! `Metadata` is free in the convention. Ours is an object: `weight` (a number), `zone`, `version`,
//! `tls` (a boolean) and `status` (`draining`) where they differ from the default, and the instance's
//! own metadata beside them; `null` when there is nothing to say.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::carried::{self, DRAINING};
use super::go_json::{self, Object};
use super::{DecodeError, Format, KeyRange, service_prefix};
use crate::error::{Error, Result};
use crate::instance::{DEFAULT_WEIGHT, Instance};

/// `Metadata` that is not an object (the convention allows anything) is kept as text under this key,
/// so that nothing is lost. It is written as a string: one that was a string as it was, a number, a
/// boolean or a list as its JSON in a string.
const BARE_METADATA: &str = "";

/// etcd's own naming convention (`go.etcd.io/etcd/client/v3/naming`), the default.
///
/// Keys are `prefix/service/id`, prefix `services`, time to live 10 s. Everything about an instance
/// is carried, beside its own metadata in `Metadata`.
#[derive(Debug, Clone, Copy, Default)]
pub struct EtcdNaming;

/// Field order is the order in the value.
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
            metadata: metadata_of(instance),
        })
        .map_err(|error| Error::invalid("instance", &instance.id, error.to_string()))
    }

    fn decode(
        &self,
        prefix: &str,
        service: &str,
        key: &[u8],
        value: &[u8],
    ) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        // A stored value is an add whatever its Op says, but it must be one.
        fields.unsigned("Op", u8::MAX.into())?;
        let address = fields.string("Addr")?;
        if address.is_empty() {
            return Err(DecodeError::new("Addr is missing or empty"));
        }
        let mut instance = Instance::new(service, address);
        if let Some(id) = super::id_after(&service_prefix(prefix, service), key) {
            instance.id = id.to_owned();
        }
        match fields.any("Metadata") {
            None => {}
            Some(Value::Object(entries)) => {
                for (key, value) in &entries {
                    read_metadata(&mut instance, key, value);
                }
            }
            Some(bare) => {
                instance
                    .metadata
                    .insert(BARE_METADATA.to_owned(), text_of(&bare));
            }
        }
        Ok(vec![instance])
    }
}

fn metadata_of(instance: &Instance) -> Option<Value> {
    let mut entries: BTreeMap<&str, Value> = instance
        .metadata
        .iter()
        .map(|(key, value)| (key.as_str(), Value::from(value.as_str())))
        .collect();
    if instance.weight != DEFAULT_WEIGHT {
        entries.insert(carried::WEIGHT, instance.weight.into());
    }
    if let Some(zone) = &instance.zone {
        entries.insert(carried::ZONE, zone.as_str().into());
    }
    if let Some(version) = &instance.version {
        entries.insert(carried::VERSION, version.as_str().into());
    }
    if let Some(tls) = instance.tls {
        entries.insert(carried::TLS, tls.into());
    }
    if instance.draining {
        entries.insert(carried::STATUS, DRAINING.into());
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

/// Takes what a field carries into that field, and everything else as it is: what another writer
/// means by `weight` may not be ours, and then it must not be lost.
fn read_metadata(instance: &mut Instance, key: &str, value: &Value) {
    match (key, value) {
        (carried::WEIGHT, value) if weight_of(value).is_some() => {
            instance.weight = weight_of(value).unwrap_or(DEFAULT_WEIGHT);
        }
        (carried::ZONE, Value::String(zone)) => instance.zone = Some(zone.clone()),
        (carried::VERSION, Value::String(version)) => instance.version = Some(version.clone()),
        (carried::TLS, Value::Bool(tls)) => instance.tls = Some(*tls),
        (carried::TLS, Value::String(tls)) if tls.parse::<bool>().is_ok() => {
            instance.tls = tls.parse().ok();
        }
        (carried::STATUS, Value::String(status)) if status == DRAINING => instance.draining = true,
        _ => {
            instance.metadata.insert(key.to_owned(), text_of(value));
        }
    }
}

fn weight_of(value: &Value) -> Option<u32> {
    match value {
        Value::Number(number) => number.as_u64()?.try_into().ok(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    }
}

/// A string as it is, anything else as its JSON.
fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(instance: &Instance) -> String {
        String::from_utf8(EtcdNaming.encode(instance).unwrap()).unwrap()
    }

    fn read(key: &str, value: &str) -> Result<Instance, DecodeError> {
        let service = key.split('/').next().unwrap();
        EtcdNaming
            .decode("", service, key.as_bytes(), value.as_bytes())
            .map(|instances| instances.into_iter().next().unwrap())
    }

    /// The vectors: key, value, and the instance that both stand for.
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
    fn every_vector_is_written_byte_for_byte_and_read_field_for_field() {
        for (key, value, instance) in vectors() {
            assert_eq!(EtcdNaming.key("", &instance), key);
            assert_eq!(written(&instance), value);
            assert_eq!(read(key, value).unwrap(), instance);
        }
    }

    #[test]
    fn what_a_go_reader_takes_is_taken() {
        for value in [
            r#"{"op":1,"addr":"a:1","METADATA":null}"#,
            r#"{"Addr":"a:1","Extra":[1]}"#,
        ] {
            assert_eq!(
                read("foo/x", value).unwrap(),
                Instance::new("foo", "a:1").id("x")
            );
        }
    }

    #[test]
    fn what_a_go_reader_refuses_is_refused() {
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
            assert!(read("foo/x", value).is_err(), "{value}");
        }
    }

    #[test]
    fn metadata_that_only_looks_like_ours_is_kept_as_it_is() {
        let instance = read(
            "foo/x",
            r#"{"Addr":"a:1","Metadata":{"weight":"heavy","zone":7,"status":"up","list":[1,2]}}"#,
        )
        .unwrap();
        assert_eq!(instance.weight, DEFAULT_WEIGHT);
        assert_eq!(instance.metadata["weight"], "heavy");
        assert_eq!(instance.metadata["zone"], "7");
        assert_eq!(instance.metadata["status"], "up");
        assert_eq!(instance.metadata["list"], "[1,2]");
    }

    #[test]
    fn metadata_that_is_no_object_is_kept_as_text_and_written_as_a_string() {
        for (metadata, text) in [("7", "7"), ("[1,2]", "[1,2]"), ("true", "true")] {
            let value = format!(r#"{{"Addr":"a:1","Metadata":{metadata}}}"#);
            let instance = read("foo/x", &value).unwrap();
            assert_eq!(instance.metadata[BARE_METADATA], text);
            let again = format!(r#"{{"Op":0,"Addr":"a:1","Metadata":"{text}"}}"#);
            assert_eq!(written(&instance), again);
        }
    }

    #[test]
    fn the_range_of_a_service_holds_its_keys_and_not_those_of_a_longer_name() {
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
    fn the_id_is_what_follows_the_service_even_where_the_prefix_repeats_its_name() {
        let instance = Instance::new("greeter", "a:1");
        let key = EtcdNaming.key("greeter/greeter", &instance);
        let value = EtcdNaming.encode(&instance).unwrap();
        let read = EtcdNaming
            .decode("greeter/greeter", "greeter", key.as_bytes(), &value)
            .unwrap();
        assert_eq!(read, [instance]);
    }

    #[test]
    fn whether_it_speaks_tls_is_said_only_if_it_is_known() {
        let instance = Instance::new("foo", "a:1").id("x");
        for (tls, metadata) in [(true, r#"{"tls":true}"#), (false, r#"{"tls":false}"#)] {
            let value = format!(r#"{{"Op":0,"Addr":"a:1","Metadata":{metadata}}}"#);
            let instance = instance.clone().tls(tls);
            assert_eq!(written(&instance), value);
            assert_eq!(read("foo/x", &value).unwrap(), instance);
        }
        let text = r#"{"Addr":"a:1","Metadata":{"tls":"true"}}"#;
        assert_eq!(read("foo/x", text).unwrap(), instance.clone().tls(true));
        let other = r#"{"Addr":"a:1","Metadata":{"tls":"1.3"}}"#;
        let other = read("foo/x", other).unwrap();
        assert_eq!(other.tls, None);
        assert_eq!(other.metadata["tls"], "1.3");
    }
}
