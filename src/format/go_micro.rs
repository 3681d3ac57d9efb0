//! go-micro's registrations.
//!
//! `/micro/registry/greeter/greeter-1 => {"name":"greeter","version":"latest","metadata":null,
//! "endpoints":null,"nodes":[{"metadata":null,"id":"greeter-1","address":"127.0.0.1:9000"}]}`

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::codec::{DecodeError, Format};
use super::go_json::{self, Object};
use super::key::{KeyContext, KeyRange, service_prefix};
use super::reserved_metadata;
use crate::error::{Error, Result};
use crate::instance::Instance;

/// go-micro's registrations (`registry/etcd`): keys are `prefix/service/id` with `-` for every `/`
/// in service and id, the default prefix is `/micro/registry`, the default time to live 90 s. A
/// service that go-micro calls `a/b` is `a-b` here.
///
/// A value is written with one node; every node of a value that is read is an instance. The
/// instance's version is the service's, and its metadata is the node's. Weight, zone, draining and
/// TLS are in that metadata too, where go-micro's clients ignore them. The service's own metadata
/// and endpoints are not shown, and not written.
///
/// go-micro's servers set `protocol` to `grpc` in their nodes' metadata. If your clients select by
/// that, add it with [`Instance::metadata`].
#[derive(Debug, Clone, Copy, Default)]
pub struct GoMicro;

/// Fields are written in this order.
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

/// The prefix of all keys of a service. go-micro joins with Go's `path.Join`, which reduces several
/// slashes to one.
fn joined_prefix(prefix: &str, service: &str) -> String {
    let mut joined = String::new();
    if prefix.starts_with('/') {
        joined.push('/');
    }
    let parts: Vec<&str> = prefix.split('/').filter(|part| !part.is_empty()).collect();
    joined.push_str(&parts.join("/"));
    service_prefix(&joined, &service.replace('/', "-"))
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

    fn is_multi_instance(&self) -> bool {
        true
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        joined_prefix(prefix, &instance.service) + &instance.id.replace('/', "-")
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(joined_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        let mut metadata = reserved_metadata::encode(instance);
        metadata.remove(reserved_metadata::ID);
        let version = instance.version.as_deref().unwrap_or_default();
        if !version.is_empty() {
            metadata.remove(reserved_metadata::VERSION);
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

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        // Checked only because a Go reader refuses the entry if one of these has a wrong type.
        fields.string("name")?;
        fields.strings_by_name("metadata")?;
        for endpoint in fields.objects("endpoints")? {
            check_endpoint(endpoint)?;
        }
        let version = fields.string("version")?;
        let nodes = fields.objects("nodes")?;
        nodes
            .into_iter()
            .filter_map(|node| decode_node(context.service, version, node).transpose())
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

/// The recursion is bounded: the parser limits the nesting.
fn check_message(message: &Object) -> Result<(), DecodeError> {
    message.string("name")?;
    message.string("type")?;
    message
        .objects("values")?
        .into_iter()
        .try_for_each(check_message)
}

/// `None` for a node without an address: a Go reader accepts it, but nobody can call it.
fn decode_node(
    service: &str,
    version: &str,
    node: &Object,
) -> Result<Option<Instance>, DecodeError> {
    let address = node.string("address")?;
    let mut instance = Instance::new(service, address);
    let id = node.string("id")?;
    if !id.is_empty() {
        instance.id = id.to_owned();
    }
    let mut own_fields = vec![reserved_metadata::ID];
    if !version.is_empty() {
        instance.version = Some(version.to_owned());
        own_fields.push(reserved_metadata::VERSION);
    }
    let metadata = node.strings_by_name("metadata")?;
    reserved_metadata::decode(&mut instance, metadata, &own_fields);
    Ok((!address.is_empty()).then_some(instance))
}

#[cfg(test)]
mod tests {
    use super::super::properties::{decode, in_range};
    use super::*;

    const PREFIX: &str = "/micro/registry";

    fn decode_value(value: &str) -> Result<Vec<Instance>, DecodeError> {
        decode(&GoMicro, PREFIX, "greeter", "", value.as_bytes())
    }

    #[test]
    fn vectors_encode_and_decode_exactly() {
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
        assert_eq!(decode_value(value).unwrap(), [instance]);
    }

    #[test]
    fn slashes_become_dashes_in_keys_only() {
        let mut instance = Instance::new("a/b", "h:1").id("c/d");
        assert_eq!(GoMicro.key(PREFIX, &instance), "/micro/registry/a-b/c-d");
        assert!(in_range(&GoMicro, PREFIX, "a/b", "/micro/registry/a-b/c-d"));
        assert!(!in_range(&GoMicro, PREFIX, "a", "/micro/registry/a-b/c-d"));
        instance.service = "greeter".to_owned();
        let value = GoMicro.encode(&instance).unwrap();
        let key = "/micro/registry/greeter/c-d";
        let decoded = decode(&GoMicro, PREFIX, "greeter", key, &value);
        assert_eq!(decoded.unwrap(), [instance]);
    }

    #[test]
    fn ignores_nodes_without_an_address() {
        let value = r#"{"nodes":[{"id":"1"},{"id":"2","address":"h:2"},{"id":"3","address":""}]}"#;
        let decoded = decode_value(value).unwrap();
        assert_eq!(decoded, [Instance::new("greeter", "h:2").id("2")]);
        assert_eq!(decode_value(r#"{"nodes":[{"id":"1"}]}"#).unwrap(), []);
    }

    #[test]
    fn every_node_is_an_instance() {
        let decoded = decode_value(
            r#"{"Name":"greeter","VERSION":"2","endpoints":[{"name":"Hello","request":{"name":"R","type":"R","values":[{"name":"n"},null]},"response":null}],"metadata":{"a":"b"},
                "nodes":[{"id":"1","address":"h:1"},null,{"id":"2","address":"h:2","port":5}]}"#,
        );
        let node = |id: &str| {
            Instance::new("greeter", format!("h:{id}"))
                .id(id)
                .version("2")
        };
        assert_eq!(decoded.unwrap(), [node("1"), node("2")]);
        for none in ["{}", r#"{"nodes":null}"#, r#"{"nodes":[]}"#] {
            assert_eq!(decode_value(none).unwrap(), []);
        }
    }

    #[test]
    fn refuses_what_a_go_reader_refuses() {
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
            assert!(decode_value(value).is_err(), "{value}");
        }
    }
}
