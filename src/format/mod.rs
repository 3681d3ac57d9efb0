//! How an instance is written in etcd.
//!
//! A [`Format`] maps an instance to a key and a value, and back. A registrar writes one or several
//! formats, and a directory reads one or several. [`EtcdNaming`] is the default: etcd's own naming
//! convention, which gRPC clients in Go resolve as `etcd:///services/greeter`. The other formats
//! match those of Go frameworks byte for byte.
//!
//! | format | prefix | key below it | time to live |
//! |---|---|---|---|
//! | [`EtcdNaming`] | `services` | `service/id` | 10 s |
//! | [`GoZero`] | none | `service/number` | 10 s |
//! | [`Kratos`] | `/microservices` | `service/id` | 15 s |
//! | [`Kitex`] | `kitex/registry-etcd` | `service/host:port` | 60 s |
//! | [`GoMicro`] | `/micro/registry` | `service/id` | 90 s |
//! | [`DubboGo`] | `/services` | `app/host:port` | 10 s |
//!
//! A prefix and a service are joined as the framework joins them. [`Kratos`], [`Kitex`] and
//! [`DubboGo`] put a slash between any prefix and the service: the prefix `""` gives `/service/id`,
//! `/` gives `//service/id`. With [`EtcdNaming`], [`GoZero`] and [`GoMicro`] the prefix `""` gives
//! `service/id`, and `/` gives `/service/id`.
//!
//! The next table shows how each format carries the fields of an [`Instance`](crate::Instance).
//! `+`: the format has a field for it. `m`: it travels in the metadata, under a reserved name that
//! the framework's own clients ignore. `-`: it is lost.
//!
//! | format | id | weight | zone | version | draining | TLS | metadata |
//! |---|---|---|---|---|---|---|---|
//! | [`EtcdNaming`] | + | m | m | m | m | m | + |
//! | [`GoZero`] | - | - | - | - | - | - | - |
//! | [`Kratos`] | + | + | m | + | m | + | + |
//! | [`Kitex`] | m | + | m | m | m | m | + |
//! | [`GoMicro`] | + | m | m | + | m | m | + |
//! | [`DubboGo`] | + | + | m | m | + | m | + |
//!
//! The reserved names are `id`, `status` (`draining`), `tls` (`true`, `false`), `version`, `weight`
//! and `zone`. [`Instance::validate`](crate::Instance::validate) refuses them as metadata of the
//! user, so that no name is written twice. A reserved name is left out while its field has the
//! default value.
//!
//! # Reading what Go wrote
//!
//! The decoders accept the same values as a Go reader: field names match in any case, unknown
//! fields are ignored, a missing field or `null` is the zero value, and the last of several equal
//! fields counts. A wrong type or an overflow is an error of that entry alone. The directory skips
//! the entry and counts it ([`Snapshot::undecodable`](crate::Snapshot::undecodable)); all other
//! entries stay. The directory also skips and counts an address that no client can call: `0.0.0.0`,
//! `[::]`, multicast, broadcast, or an empty host.
//!
//! # A format of your own
//!
//! ```
//! use std::time::Duration;
//!
//! use goo_etcd::Instance;
//! use goo_etcd::format::{DecodeError, Format, KeyContext, KeyRange};
//!
//! /// `/apps/greeter/i-1 => 10.0.0.5:50051 eu-1a`
//! #[derive(Debug)]
//! struct Plain;
//!
//! impl Format for Plain {
//!     fn name(&self) -> &'static str {
//!         "plain"
//!     }
//!
//!     fn default_prefix(&self) -> &'static str {
//!         "/apps"
//!     }
//!
//!     fn default_ttl(&self) -> Duration {
//!         Duration::from_secs(10)
//!     }
//!
//!     fn key(&self, prefix: &str, instance: &Instance) -> String {
//!         format!("{prefix}/{}/{}", instance.service, instance.id)
//!     }
//!
//!     fn range(&self, prefix: &str, service: &str) -> KeyRange {
//!         // The trailing slash keeps `greeter2` out of the range of `greeter`.
//!         KeyRange::prefix(format!("{prefix}/{service}/"))
//!     }
//!
//!     fn encode(&self, instance: &Instance) -> goo_etcd::Result<Vec<u8>> {
//!         let zone = instance.zone.as_deref().unwrap_or_default();
//!         Ok(format!("{} {zone}", instance.address).into_bytes())
//!     }
//!
//!     fn decode(
//!         &self,
//!         context: KeyContext<'_>,
//!         value: &[u8],
//!     ) -> Result<Vec<Instance>, DecodeError> {
//!         let text = std::str::from_utf8(value)
//!             .map_err(|_| DecodeError::new("the value is not UTF-8"))?;
//!         let (address, zone) = text
//!             .split_once(' ')
//!             .ok_or_else(|| DecodeError::new("the value has no space"))?;
//!         let mut instance = Instance::new(context.service, address);
//!         if let Some(id) = String::from_utf8_lossy(context.key).rsplit('/').next() {
//!             instance.id = id.to_owned();
//!         }
//!         instance.zone = (!zone.is_empty()).then(|| zone.to_owned());
//!         Ok(vec![instance])
//!     }
//! }
//!
//! let instance = Instance::new("greeter", "10.0.0.5:50051").id("i-1").zone("eu-1a");
//! let key = Plain.key("/apps", &instance);
//! let value = Plain.encode(&instance)?;
//! assert_eq!(value, b"10.0.0.5:50051 eu-1a");
//! let context = KeyContext::new("/apps", "greeter", key.as_bytes());
//! assert_eq!(Plain.decode(context, &value), Ok(vec![instance]));
//! # Ok::<(), goo_etcd::Error>(())
//! ```

mod codec;
mod dubbo_go;
mod etcd_naming;
mod go_json;
mod go_micro;
mod go_zero;
mod identity;
mod key;
mod kitex;
mod kratos;
mod layout;
#[cfg(test)]
mod properties;
mod reserved_metadata;

pub use codec::{DecodeError, Format};
pub use dubbo_go::DubboGo;
pub use etcd_naming::EtcdNaming;
pub use go_micro::GoMicro;
pub use go_zero::GoZero;
pub use identity::Identity;
pub use key::{KeyContext, KeyRange};
pub use kitex::Kitex;
pub use kratos::Kratos;
pub use layout::Layout;
