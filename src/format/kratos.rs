//! kratos' registrations.
//!
//! `/microservices/greeter/i-1 => {"id":"i-1","name":"greeter","version":"v1.0.0",
//! "metadata":{"weight":"10"},"endpoints":["grpc://127.0.0.1:9000"]}`

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::codec::{DecodeError, Format};
use super::go_json::{self, Object};
use super::key::{KeyContext, KeyRange, id_after, slashed_prefix};
use super::reserved_metadata;
use crate::error::{Error, Result};
use crate::instance::Instance;

/// kratos' registrations (`contrib/registry/etcd`): keys are `prefix/service/id`, the default
/// prefix is `/microservices` (which kratos calls the namespace), the default time to live 15 s.
/// With an empty prefix the keys are `/service/id`, and with the prefix `/` they are
/// `//service/id`.
///
/// The first endpoint URL with the scheme `grpc` (plaintext) or `grpcs` (TLS) is the address. An
/// entry without such a URL, or with the name of another service, is not shown. `grpcs`
/// reads as [`Instance::tls`] `Some(true)`, and `grpc` as `None`, so that no entry in etcd can make
/// a client give up TLS. As in kratos' own reader, entries with the same address are one instance,
/// and the one written last counts.
///
/// kratos has fields for version and metadata, and reads the weight from the metadata. Zone and
/// draining are in the metadata too, where kratos ignores them. An address must be `host:port`.
///
/// An entry with other URLs than `grpc://host:port` keeps its whole list in the metadata under
/// [`Kratos::ENDPOINTS`], as JSON without spaces. The list is written back while its first gRPC URL
/// is the instance's address.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kratos;

impl Kratos {
    /// The metadata key of a kratos instance's endpoint URLs, a JSON list.
    pub const ENDPOINTS: &'static str = "kratos.endpoints";
}

/// Fields are written in this order.
#[derive(Serialize)]
struct ServiceInstance<'a> {
    id: &'a str,
    name: &'a str,
    version: &'a str,
    #[serde(serialize_with = "go_json::null_if_empty")]
    metadata: BTreeMap<String, String>,
    endpoints: Option<Vec<String>>,
}

impl Format for Kratos {
    fn name(&self) -> &'static str {
        "kratos"
    }

    fn default_prefix(&self) -> &'static str {
        "/microservices"
    }

    fn default_ttl(&self) -> Duration {
        Duration::from_secs(15)
    }

    /// True: kratos' own reader keeps one of several entries with the same address.
    fn merges_by_address(&self) -> bool {
        true
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        slashed_prefix(prefix, &instance.service) + &instance.id
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(slashed_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        let mut metadata = reserved_metadata::encode(instance);
        metadata.remove(reserved_metadata::ID);
        let version = instance.version.as_deref().unwrap_or_default();
        if !version.is_empty() {
            metadata.remove(reserved_metadata::VERSION);
        }
        if instance.tls == Some(true) {
            metadata.remove(reserved_metadata::TLS);
        }
        let endpoints = take_endpoints(instance, &mut metadata)?;
        go_json::to_vec(&ServiceInstance {
            id: &instance.id,
            name: &instance.service,
            version,
            metadata,
            endpoints,
        })
        .map_err(|error| Error::invalid("instance", &instance.id, error.to_string()))
    }

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let fields = Object::parse(value)?;
        let endpoints = fields.strings("endpoints")?;
        let metadata = fields.strings_by_name("metadata")?;
        let version = fields.string("version")?;
        let id = fields.string("id")?;
        // The range of a service `a` also holds a service named `a/b`.
        if fields.string("name")? != context.service {
            return Ok(Vec::new());
        }
        let Some((address, tls)) = grpc_endpoint(&endpoints) else {
            return Ok(Vec::new());
        };
        let mut instance = Instance::new(context.service, address);
        let prefix = slashed_prefix(context.prefix, context.service);
        let id = match id {
            "" => id_after(&prefix, context.key),
            id => Some(id),
        };
        if let Some(id) = id {
            instance.id = id.to_owned();
        }
        let mut own_fields = vec![reserved_metadata::ID];
        if tls {
            instance.tls = Some(true);
        }
        // The URL's scheme decides. The metadata can only add `tls=false`, which `grpc` does not
        // say.
        if tls
            || metadata
                .get(reserved_metadata::TLS)
                .is_some_and(|tls| tls != "false")
        {
            own_fields.push(reserved_metadata::TLS);
        }
        if !version.is_empty() {
            instance.version = Some(version.to_owned());
            own_fields.push(reserved_metadata::VERSION);
        }
        reserved_metadata::decode(&mut instance, metadata, &own_fields);
        if endpoints != [endpoint_url(&instance)] {
            let list = serde_json::Value::from(endpoints).to_string();
            instance.metadata.insert(Self::ENDPOINTS.to_owned(), list);
        }
        Ok(vec![instance])
    }
}

/// The endpoint URL of an instance whose metadata has no list.
fn endpoint_url(instance: &Instance) -> String {
    let scheme = match instance.tls {
        Some(true) => "grpcs",
        _ => "grpc",
    };
    format!("{scheme}://{}", instance.address)
}

/// The endpoint URLs to write. If these are the list in the metadata, removes it from there.
fn take_endpoints(
    instance: &Instance,
    metadata: &mut BTreeMap<String, String>,
) -> Result<Option<Vec<String>>> {
    if instance.address.is_empty() {
        return Ok(None);
    }
    if instance.address.starts_with("unix:") {
        let reason =
            "kratos endpoints are grpc://host:port URLs; a Unix socket cannot be expressed";
        return Err(Error::invalid("address", &instance.address, reason));
    }
    // A list with spaces or needless escapes stays in the metadata: `endpoints` cannot carry them.
    let own = metadata.get(Kratos::ENDPOINTS).and_then(|list| {
        let own: Vec<String> = serde_json::from_str(list).ok()?;
        (serde_json::to_string(&own).ok()? == *list).then_some(own)
    });
    let plain = vec![endpoint_url(instance)];
    let here = Some((instance.address.as_str(), instance.tls == Some(true)));
    match own {
        Some(own) if own != plain && grpc_endpoint(&own) == here => {
            metadata.remove(Kratos::ENDPOINTS);
            Ok(Some(own))
        }
        _ => Ok(Some(plain)),
    }
}

/// The address of the first gRPC endpoint, and whether it uses TLS.
fn grpc_endpoint(endpoints: &[impl AsRef<str>]) -> Option<(&str, bool)> {
    let (host, tls) = endpoints.iter().find_map(|endpoint| {
        let (scheme, rest) = endpoint.as_ref().split_once("://")?;
        let tls = match () {
            () if scheme.eq_ignore_ascii_case("grpc") => false,
            () if scheme.eq_ignore_ascii_case("grpcs") => true,
            () => return None,
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        Some((host, tls))
    })?;
    (!host.is_empty()).then_some((host, tls))
}

#[cfg(test)]
mod tests {
    use super::super::properties::{decode, in_range};
    use super::*;

    const PREFIX: &str = "/microservices";

    fn encode(instance: &Instance) -> String {
        String::from_utf8(Kratos.encode(instance).unwrap()).unwrap()
    }

    fn decode_value(value: &str) -> Result<Vec<Instance>, DecodeError> {
        decode(&Kratos, PREFIX, "a", "/microservices/a/1", value.as_bytes())
    }

    fn decode_endpoints(endpoints: &str) -> Vec<Instance> {
        decode_value(&format!(
            r#"{{"id":"1","name":"a","endpoints":{endpoints}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn vectors_encode_and_decode_exactly() {
        // An entry without an endpoint is not shown.
        let (key, value) = (
            "/microservices/helloworld/0",
            r#"{"id":"0","name":"helloworld","version":"","metadata":null,"endpoints":null}"#,
        );
        let instance = Instance::new("helloworld", "").id("0");
        assert_eq!(Kratos.key(PREFIX, &instance), key);
        assert_eq!(encode(&instance), value);
        let none = decode(&Kratos, PREFIX, "helloworld", key, value.as_bytes());
        assert_eq!(none.unwrap(), []);

        let (key, value) = (
            "/microservices/helloworld/i-1",
            r#"{"id":"i-1","name":"helloworld","version":"v1.0.0","metadata":{"b":"\u003cx\u003e","weight":"10"},"endpoints":["http://127.0.0.1:8000?isSecure=false","grpc://127.0.0.1:9000?isSecure=false\u0026w=1"]}"#,
        );
        let endpoints = r#"["http://127.0.0.1:8000?isSecure=false","grpc://127.0.0.1:9000?isSecure=false&w=1"]"#;
        let instance = Instance::new("helloworld", "127.0.0.1:9000")
            .id("i-1")
            .version("v1.0.0")
            .weight(10)
            .metadata("b", "<x>")
            .metadata(Kratos::ENDPOINTS, endpoints);
        assert_eq!(Kratos.key(PREFIX, &instance), key);
        assert_eq!(encode(&instance), value);
        let one = decode(&Kratos, PREFIX, "helloworld", key, value.as_bytes());
        assert_eq!(one.unwrap(), [instance]);
    }

    #[test]
    fn first_grpc_url_gives_address_and_tls() {
        for (endpoints, address, tls) in [
            (r#"["grpc://h:1"]"#, "h:1", None),
            (r#"["grpcs://h:1"]"#, "h:1", Some(true)),
            (r#"["GRPCS://h:1/path"]"#, "h:1", Some(true)),
            (
                r#"["http://h:1","grpcs://h:2","grpc://h:3"]"#,
                "h:2",
                Some(true),
            ),
            (r#"["grpc://h:3?isSecure=true","grpcs://h:2"]"#, "h:3", None),
            (r#"["grpc://user@[::1]:1#f"]"#, "[::1]:1", None),
        ] {
            let read = decode_endpoints(endpoints);
            assert_eq!(read.len(), 1, "{endpoints}");
            assert_eq!(
                (&*read[0].address, read[0].tls),
                (address, tls),
                "{endpoints}"
            );
            // The list is written back unchanged.
            assert!(encode(&read[0]).contains(endpoints), "{endpoints}");
        }
        for none in [
            "null",
            "[]",
            r#"["http://h:1"]"#,
            r#"["h:1"]"#,
            r#"["grpc://"]"#,
        ] {
            assert_eq!(decode_endpoints(none), [], "{none}");
        }
    }

    #[test]
    fn endpoint_list_is_dropped_when_the_address_changes() {
        let read = &decode_endpoints(r#"["http://h:1","grpc://h:2"]"#)[0];
        let mut moved = read.clone();
        moved.address = "h:3".to_owned();
        assert!(encode(&moved).contains(r#""endpoints":["grpc://h:3"]"#));
        let secure = read.clone().tls(true);
        assert!(encode(&secure).contains(r#""endpoints":["grpcs://h:2"]"#));
    }

    #[test]
    fn endpoint_list_with_spaces_stays_in_the_metadata() {
        for (list, kept) in [
            (r#"["http://h:1","grpc://h:2"]"#, false),
            (r#"["http://h:1", "grpc://h:2"]"#, true),
            (r#"["http:\/\/h:1","grpc://h:2"]"#, true),
            (r#" ["http://h:1","grpc://h:2"]"#, true),
        ] {
            let instance = Instance::new("a", "h:2")
                .id("1")
                .metadata(Kratos::ENDPOINTS, list);
            let value = encode(&instance);
            assert_eq!(value.contains(Kratos::ENDPOINTS), kept, "{value}");
            assert_eq!(decode_value(&value).unwrap(), [instance], "{list}");
        }
    }

    #[test]
    fn unreadable_weight_is_100_and_stays_in_the_metadata() {
        let read = |weight: &str| {
            let value = format!(
                r#"{{"id":"1","name":"a","metadata":{{"weight":"{weight}"}},"endpoints":["grpc://h:1"]}}"#
            );
            decode_value(&value).unwrap().remove(0)
        };
        assert_eq!(read("7").weight, 7);
        for weight in ["-1", "", "4294967296", "1.5"] {
            assert_eq!(read(weight).weight, 100);
            assert_eq!(read(weight).metadata["weight"], weight);
        }
    }

    #[test]
    fn ignores_entries_of_other_services() {
        let deeper = "/microservices/a/b/1";
        assert!(in_range(&Kratos, PREFIX, "a", deeper));
        let value = br#"{"id":"1","name":"a/b","endpoints":["grpc://h:1"]}"#;
        assert_eq!(decode(&Kratos, PREFIX, "a", deeper, value).unwrap(), []);
        assert!(!in_range(&Kratos, PREFIX, "a", "/microservices/ab/1"));
    }

    #[test]
    fn refuses_what_a_go_reader_refuses() {
        for value in [
            "",
            "[]",
            r#"{"name":"a","endpoints":"grpc://h:1"}"#,
            r#"{"name":"a","endpoints":[1]}"#,
            r#"{"name":"a","metadata":{"weight":10}}"#,
            r#"{"name":1}"#,
            r#"{"name":"a","id":1}"#,
            r#"{"name":"a","version":1}"#,
            r#"{"name":"a","metadata":[]}"#,
        ] {
            assert!(decode_value(value).is_err(), "{value}");
        }
    }
}
