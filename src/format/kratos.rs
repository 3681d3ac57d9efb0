//! kratos' registrations.
//!
//! `/microservices/greeter/i-1 => {"id":"i-1","name":"greeter","version":"v1.0.0",
//! "metadata":{"weight":"10"},"endpoints":["grpc://127.0.0.1:9000"]}`

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::go_json::{self, Object};
use super::{DecodeError, Format, KeyRange, carried, id_after, slashed_prefix};
use crate::error::{Error, Result};
use crate::instance::Instance;

/// kratos' registrations (`contrib/registry/etcd`): keys are `prefix/service/id`, prefix
/// `/microservices` (which kratos calls the namespace), time to live 15 s. With an empty prefix they
/// are `/service/id`.
///
/// The first endpoint with scheme `grpc` (plaintext) or `grpcs` (TLS) is the address; an instance
/// without either is not shown, nor is one that names another service. `grpcs` reads as
/// [`Instance::tls`] `Some(true)`, and `grpc` as `None`, so that what stands in etcd cannot talk a
/// client with TLS into plaintext. As for kratos' own reader, an address is one endpoint however many
/// instances name it; the one written last counts.
///
/// Version and metadata have places of their own. The weight is in the metadata, where kratos looks
/// for it; zone and draining are there as well, where kratos does not look. An address must
/// be `host:port`.
///
/// All endpoints as they were read, where there are more than `grpc://host:port`, are in the
/// metadata under [`Kratos::ENDPOINTS`], as JSON without spaces; they are written as they stand there
/// as long as their first gRPC endpoint is the instance's address.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kratos;

impl Kratos {
    /// The metadata under which a kratos instance's endpoints are kept, as a JSON list of URLs.
    pub const ENDPOINTS: &'static str = "kratos.endpoints";
}

/// Field order is the order in the value.
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

    /// kratos' own reader calls an address once, however many instances name it.
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
        let mut metadata = carried::all(instance);
        metadata.remove(carried::ID);
        let version = instance.version.as_deref().unwrap_or_default();
        if !version.is_empty() {
            metadata.remove(carried::VERSION);
        }
        if instance.tls == Some(true) {
            metadata.remove(carried::TLS);
        }
        let endpoints = endpoints_of(instance, &mut metadata)?;
        go_json::to_vec(&ServiceInstance {
            id: &instance.id,
            name: &instance.service,
            version,
            metadata,
            endpoints,
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
        let endpoints = fields.strings("endpoints")?;
        let metadata = fields.strings_by_name("metadata")?;
        let version = fields.string("version")?;
        let id = fields.string("id")?;
        // A service named `a/b` stands in the range of `a`.
        if fields.string("name")? != service {
            return Ok(Vec::new());
        }
        let Some((address, tls)) = grpc_endpoint(&endpoints) else {
            return Ok(Vec::new());
        };
        let mut instance = Instance::new(service, address);
        let id = match id {
            "" => id_after(&slashed_prefix(prefix, service), key),
            id => Some(id),
        };
        if let Some(id) = id {
            instance.id = id.to_owned();
        }
        let mut placed = vec![carried::ID];
        if tls {
            instance.tls = Some(true);
        }
        // The scheme decides; all that is left to say is that TLS is out of the question.
        if tls || metadata.get(carried::TLS).is_some_and(|tls| tls != "false") {
            placed.push(carried::TLS);
        }
        if !version.is_empty() {
            instance.version = Some(version.to_owned());
            placed.push(carried::VERSION);
        }
        carried::take(&mut instance, metadata, &placed);
        if endpoints != [endpoint(&instance)] {
            let list = serde_json::Value::from(endpoints).to_string();
            instance.metadata.insert(Self::ENDPOINTS.to_owned(), list);
        }
        Ok(vec![instance])
    }
}

/// What is written of an instance that names no endpoints of its own.
fn endpoint(instance: &Instance) -> String {
    let scheme = match instance.tls {
        Some(true) => "grpcs",
        _ => "grpc",
    };
    format!("{scheme}://{}", instance.address)
}

/// The endpoints to write; takes them out of the metadata if they are there.
fn endpoints_of(
    instance: &Instance,
    metadata: &mut BTreeMap<String, String>,
) -> Result<Option<Vec<String>>> {
    if instance.address.is_empty() {
        return Ok(None);
    }
    if instance.address.starts_with("unix:") {
        let reason = "kratos names endpoints as grpc://host:port, which no Unix socket fits in";
        return Err(Error::invalid("address", &instance.address, reason));
    }
    // Spaces and needless escapes would be lost on the way through `endpoints`.
    let own = metadata.get(Kratos::ENDPOINTS).and_then(|list| {
        let own: Vec<String> = serde_json::from_str(list).ok()?;
        (serde_json::to_string(&own).ok()? == *list).then_some(own)
    });
    let plain = vec![endpoint(instance)];
    let here = Some((instance.address.as_str(), instance.tls == Some(true)));
    match own {
        Some(own) if own != plain && grpc_endpoint(&own) == here => {
            metadata.remove(Kratos::ENDPOINTS);
            Ok(Some(own))
        }
        _ => Ok(Some(plain)),
    }
}

/// The address of the first endpoint that speaks gRPC, and whether with TLS.
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
    use super::super::laws::{in_range, read};
    use super::*;

    const PREFIX: &str = "/microservices";

    fn written(instance: &Instance) -> String {
        String::from_utf8(Kratos.encode(instance).unwrap()).unwrap()
    }

    fn decoded(value: &str) -> Result<Vec<Instance>, DecodeError> {
        read(&Kratos, PREFIX, "a", "/microservices/a/1", value.as_bytes())
    }

    fn with_endpoints(endpoints: &str) -> Vec<Instance> {
        decoded(&format!(
            r#"{{"id":"1","name":"a","endpoints":{endpoints}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn every_vector_is_written_byte_for_byte_and_read_field_for_field() {
        // It has no endpoint, so there is nothing to call and nothing to show.
        let (key, value) = (
            "/microservices/helloworld/0",
            r#"{"id":"0","name":"helloworld","version":"","metadata":null,"endpoints":null}"#,
        );
        let instance = Instance::new("helloworld", "").id("0");
        assert_eq!(Kratos.key(PREFIX, &instance), key);
        assert_eq!(written(&instance), value);
        let none = read(&Kratos, PREFIX, "helloworld", key, value.as_bytes());
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
        assert_eq!(written(&instance), value);
        let one = read(&Kratos, PREFIX, "helloworld", key, value.as_bytes());
        assert_eq!(one.unwrap(), [instance]);
    }

    #[test]
    fn the_scheme_of_the_first_grpc_endpoint_decides() {
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
            let read = with_endpoints(endpoints);
            assert_eq!(read.len(), 1, "{endpoints}");
            assert_eq!(
                (&*read[0].address, read[0].tls),
                (address, tls),
                "{endpoints}"
            );
            // Written again, they are the same.
            assert!(written(&read[0]).contains(endpoints), "{endpoints}");
        }
        for none in [
            "null",
            "[]",
            r#"["http://h:1"]"#,
            r#"["h:1"]"#,
            r#"["grpc://"]"#,
        ] {
            assert_eq!(with_endpoints(none), [], "{none}");
        }
    }

    #[test]
    fn kept_endpoints_are_written_only_while_they_are_this_instances() {
        let read = &with_endpoints(r#"["http://h:1","grpc://h:2"]"#)[0];
        let mut moved = read.clone();
        moved.address = "h:3".to_owned();
        assert!(written(&moved).contains(r#""endpoints":["grpc://h:3"]"#));
        let secure = read.clone().tls(true);
        assert!(written(&secure).contains(r#""endpoints":["grpcs://h:2"]"#));
    }

    #[test]
    fn a_list_that_would_read_otherwise_stays_in_the_metadata() {
        for (list, kept) in [
            (r#"["http://h:1","grpc://h:2"]"#, false),
            (r#"["http://h:1", "grpc://h:2"]"#, true),
            (r#"["http:\/\/h:1","grpc://h:2"]"#, true),
            (r#" ["http://h:1","grpc://h:2"]"#, true),
        ] {
            let instance = Instance::new("a", "h:2")
                .id("1")
                .metadata(Kratos::ENDPOINTS, list);
            let value = written(&instance);
            assert_eq!(value.contains(Kratos::ENDPOINTS), kept, "{value}");
            assert_eq!(decoded(&value).unwrap(), [instance], "{list}");
        }
    }

    #[test]
    fn a_weight_that_is_none_reads_as_100_and_stays_in_the_metadata() {
        let read = |weight: &str| {
            let value = format!(
                r#"{{"id":"1","name":"a","metadata":{{"weight":"{weight}"}},"endpoints":["grpc://h:1"]}}"#
            );
            decoded(&value).unwrap().remove(0)
        };
        assert_eq!(read("7").weight, 7);
        for weight in ["-1", "", "4294967296", "1.5"] {
            assert_eq!(read(weight).weight, 100);
            assert_eq!(read(weight).metadata["weight"], weight);
        }
    }

    #[test]
    fn another_services_instance_in_the_range_is_not_shown() {
        let deeper = "/microservices/a/b/1";
        assert!(in_range(&Kratos, PREFIX, "a", deeper));
        let value = br#"{"id":"1","name":"a/b","endpoints":["grpc://h:1"]}"#;
        assert_eq!(read(&Kratos, PREFIX, "a", deeper, value).unwrap(), []);
        assert!(!in_range(&Kratos, PREFIX, "a", "/microservices/ab/1"));
    }

    #[test]
    fn what_a_go_reader_refuses_is_an_error() {
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
            assert!(decoded(value).is_err(), "{value}");
        }
    }
}
