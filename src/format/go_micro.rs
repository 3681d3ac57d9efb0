//! go-micro's registrations.
//!
//! `/micro/registry/greeter/greeter-1 => {"name":"greeter","version":"latest","metadata":null,
//! "endpoints":null,"nodes":[{"metadata":null,"id":"greeter-1","address":"127.0.0.1:9000"}]}`

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::go_json::{self, Object};
use super::{DecodeError, Format, KeyRange, carried, service_prefix};
use crate::error::{Error, Result};
use crate::instance::Instance;

/// go-micro's registrations (`registry/etcd`): keys are `prefix/service/id` with `-` for every `/` in
/// service and id, prefix `/micro/registry`, time to live 90 s. A service that go-micro calls `a/b` is
/// `a-b` here.
///
/// A value is one node when written, and every node in it is an instance when read. The service's
/// version is the instance's; a node's metadata is the instance's, and has weight, zone, draining and
/// TLS as well, which go-micro's clients do not look at. The service's own metadata and endpoints are
/// neither shown nor written.
///
/// go-micro's servers say `protocol` = `grpc` in their nodes' metadata. Where clients of yours select
/// by that, add it with [`Instance::metadata`].
#[derive(Debug, Clone, Copy, Default)]
pub struct GoMicro;

/// Field order is the order in the value.
#[derive(Serialize)]
struct Service<'a> {
    name: &'a str,
    version: &'a str,
    metadata: Option<()>,
    endpoints: Option<()>,
    nodes: [Node<'a>; 1],
}

#[derive(Serialize)]
struct Node<'a> {
    #[serde(serialize_with = "go_json::null_if_empty")]
    metadata: BTreeMap<String, String>,
    id: &'a str,
    address: &'a str,
}

impl Format for GoMicro {
    fn name(&self) -> &'static str {
        "go-micro"
    }

    fn default_prefix(&self) -> &'static str {
        "/micro/registry"
    }

    fn default_ttl(&self) -> Duration {
        Duration::from_secs(90)
    }

    fn holds_several(&self) -> bool {
        true
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        let service = instance.service.replace('/', "-");
        service_prefix(prefix, &service) + &instance.id.replace('/', "-")
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(service_prefix(prefix, &service.replace('/', "-")))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        let mut metadata = carried::all(instance);
        metadata.remove(carried::ID);
        let version = instance.version.as_deref().unwrap_or_default();
        if !version.is_empty() {
            metadata.remove(carried::VERSION);
        }
        go_json::to_vec(&Service {
            name: &instance.service,
            version,
            metadata: None,
            endpoints: None,
            nodes: [Node {
                metadata,
                id: &instance.id,
                address: &instance.address,
            }],
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
        // Read for their types alone: a Go reader refuses the entry if one is wrong.
        fields.string("name")?;
        fields.strings_by_name("metadata")?;
        for endpoint in fields.objects("endpoints")? {
            check_endpoint(endpoint)?;
        }
        let version = fields.string("version")?;
        let nodes = fields.objects("nodes")?;
        nodes
            .into_iter()
            .filter_map(|node| instance(service, version, node).transpose())
            .collect()
    }
}

fn check_endpoint(endpoint: &Object) -> Result<(), DecodeError> {
    endpoint.string("name")?;
    endpoint.strings_by_name("metadata")?;
    for message in ["request", "response"] {
        if let Some(message) = endpoint.object(message)? {
            check_message(message)?;
        }
    }
    Ok(())
}

/// No deeper than the parser goes.
fn check_message(message: &Object) -> Result<(), DecodeError> {
    message.string("name")?;
    message.string("type")?;
    message
        .objects("values")?
        .into_iter()
        .try_for_each(check_message)
}

/// `None`: it has no address, which a Go reader takes and cannot call. The other nodes can be.
fn instance(service: &str, version: &str, node: &Object) -> Result<Option<Instance>, DecodeError> {
    let address = node.string("address")?;
    let mut instance = Instance::new(service, address);
    let id = node.string("id")?;
    if !id.is_empty() {
        instance.id = id.to_owned();
    }
    let mut placed = vec![carried::ID];
    if !version.is_empty() {
        instance.version = Some(version.to_owned());
        placed.push(carried::VERSION);
    }
    carried::take(&mut instance, node.strings_by_name("metadata")?, &placed);
    Ok((!address.is_empty()).then_some(instance))
}

#[cfg(test)]
mod tests {
    use super::super::laws::{in_range, read};
    use super::*;

    const PREFIX: &str = "/micro/registry";

    fn decoded(value: &str) -> Result<Vec<Instance>, DecodeError> {
        read(&GoMicro, PREFIX, "greeter", "", value.as_bytes())
    }

    #[test]
    fn every_vector_is_written_byte_for_byte_and_read_field_for_field() {
        let value = r#"{"name":"greeter","version":"latest","metadata":null,"endpoints":null,"nodes":[{"metadata":{"protocol":"grpc","registry":"etcd"},"id":"greeter-1","address":"127.0.0.1:9000"}]}"#;
        let instance = Instance::new("greeter", "127.0.0.1:9000")
            .id("greeter-1")
            .version("latest")
            .metadata("protocol", "grpc")
            .metadata("registry", "etcd");
        assert_eq!(
            GoMicro.key(PREFIX, &instance),
            "/micro/registry/greeter/greeter-1"
        );
        assert_eq!(GoMicro.encode(&instance).unwrap(), value.as_bytes());
        assert_eq!(decoded(value).unwrap(), [instance]);
    }

    #[test]
    fn a_slash_in_either_part_of_the_key_becomes_a_dash_and_stays_in_the_value() {
        let mut instance = Instance::new("a/b", "h:1").id("c/d");
        assert_eq!(GoMicro.key(PREFIX, &instance), "/micro/registry/a-b/c-d");
        assert!(in_range(&GoMicro, PREFIX, "a/b", "/micro/registry/a-b/c-d"));
        assert!(!in_range(&GoMicro, PREFIX, "a", "/micro/registry/a-b/c-d"));
        instance.service = "greeter".to_owned();
        let value = GoMicro.encode(&instance).unwrap();
        let read = read(
            &GoMicro,
            PREFIX,
            "greeter",
            "/micro/registry/greeter/c-d",
            &value,
        );
        assert_eq!(read.unwrap(), [instance]);
    }

    #[test]
    fn a_node_without_an_address_takes_no_other_with_it() {
        let value = r#"{"nodes":[{"id":"1"},{"id":"2","address":"h:2"},{"id":"3","address":""}]}"#;
        let read = decoded(value).unwrap();
        assert_eq!(read, [Instance::new("greeter", "h:2").id("2")]);
        assert_eq!(decoded(r#"{"nodes":[{"id":"1"}]}"#).unwrap(), []);
    }

    #[test]
    fn every_node_is_an_instance() {
        let read = decoded(
            r#"{"Name":"greeter","VERSION":"2","endpoints":[{"name":"Hello","request":{"name":"R","type":"R","values":[{"name":"n"},null]},"response":null}],"metadata":{"a":"b"},
                "nodes":[{"id":"1","address":"h:1"},null,{"id":"2","address":"h:2","port":5}]}"#,
        );
        let node = |id: &str| {
            Instance::new("greeter", format!("h:{id}"))
                .id(id)
                .version("2")
        };
        assert_eq!(read.unwrap(), [node("1"), node("2")]);
        for none in ["{}", r#"{"nodes":null}"#, r#"{"nodes":[]}"#] {
            assert_eq!(decoded(none).unwrap(), []);
        }
    }

    #[test]
    fn what_a_go_reader_refuses_is_an_error() {
        for value in [
            "x",
            r#"{"version":1}"#,
            r#"{"name":1}"#,
            r#"{"metadata":"x"}"#,
            r#"{"metadata":{"a":1}}"#,
            r#"{"endpoints":{}}"#,
            r#"{"endpoints":["x"]}"#,
            r#"{"endpoints":[{"name":1}]}"#,
            r#"{"endpoints":[{"metadata":[]}]}"#,
            r#"{"endpoints":[{"request":[]}]}"#,
            r#"{"endpoints":[{"response":"x"}]}"#,
            r#"{"endpoints":[{"request":{"name":1}}]}"#,
            r#"{"endpoints":[{"request":{"type":1}}]}"#,
            r#"{"endpoints":[{"request":{"values":[{"values":{}}]}}]}"#,
            r#"{"nodes":[{"address":"h:1","id":1}]}"#,
            r#"{"nodes":[{"address":"h:1","metadata":{"a":1}}]}"#,
            r#"{"nodes":{}}"#,
            r#"{"nodes":["h:1"]}"#,
            r#"{"nodes":[{"address":1}]}"#,
            r#"{"nodes":[{"address":"h:1","metadata":[]}]}"#,
        ] {
            assert!(decoded(value).is_err(), "{value}");
        }
    }
}
