//! How an instance is written in etcd.
//!
//! A [`Format`] maps an instance to a key and a value, and back. The registrar writes with one or
//! several, the directory reads with one or several. [`EtcdNaming`] is the default: etcd's own naming
//! convention, which gRPC services in Go resolve as `etcd:///services/greeter`. The others are what
//! Go frameworks write and read, byte for byte.
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
//! What each has a place for (+), what travels in the metadata under a reserved name that the
//! framework's own clients do not look at (m), and what is lost (-):
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
//! and `zone`; [`Instance::validate`] refuses them as free metadata, so that nothing is written twice.
//! Beyond the format's places nothing is written for what is as it is by default.
//!
//! # Reading what Go wrote
//!
//! A value is taken where a Go reader takes it: names match whatever their case, unknown fields are
//! ignored, what is missing or `null` is the zero value, of a field that occurs twice the last counts.
//! A wrong type or an overflow is an error for that entry, which is skipped and counted
//! ([`Snapshot::undecodable`](crate::Snapshot::undecodable)), never for the others.
//!
//! # A format of your own
//!
//! ```
//! use std::time::Duration;
//!
//! use goo_etcd::format::{DecodeError, Format, KeyRange};
//! use goo_etcd::Instance;
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
//!         // With the slash, so that `greeter` does not show `greeter2`.
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
//!         _prefix: &str,
//!         service: &str,
//!         key: &[u8],
//!         value: &[u8],
//!     ) -> Result<Vec<Instance>, DecodeError> {
//!         let text = std::str::from_utf8(value).map_err(|_| DecodeError::new("it is not UTF-8"))?;
//!         let (address, zone) = text
//!             .split_once(' ')
//!             .ok_or_else(|| DecodeError::new("there is no space in it"))?;
//!         let mut instance = Instance::new(service, address);
//!         if let Some(id) = String::from_utf8_lossy(key).rsplit('/').next() {
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
//! let read = Plain.decode("/apps", "greeter", key.as_bytes(), &value).unwrap();
//! assert_eq!(read, [instance]);
//! # Ok::<(), goo_etcd::Error>(())
//! ```

mod carried;
mod dubbo_go;
mod etcd_naming;
mod go_json;
mod go_micro;
mod go_zero;
mod kitex;
mod kratos;
#[cfg(test)]
mod laws;
mod layout;

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

pub use dubbo_go::DubboGo;
pub use etcd_naming::EtcdNaming;
pub use go_micro::GoMicro;
pub use go_zero::GoZero;
pub use kitex::Kitex;
pub use kratos::Kratos;
pub use layout::Layout;

use crate::error::Result;
use crate::instance::Instance;

/// How instances are written in etcd and read from it.
///
/// Implement it to speak with registrations of your own kind; `Registrar` and `Directory` take any,
/// also one that is chosen at run time, as `Arc<dyn Format>` or `Box<dyn Format>`.
pub trait Format: Any + Debug + Send + Sync {
    /// A short name, for logs.
    fn name(&self) -> &'static str;

    /// The prefix under which services stand unless one is configured.
    fn default_prefix(&self) -> &'static str;

    /// The time to live of a registration unless one is configured.
    fn default_ttl(&self) -> Duration;

    /// Whether the address is all that tells instances apart, so that several keys with one address
    /// are one instance until the last of them is gone; of what they say, the one written last
    /// counts. False unless overridden: each key is an instance.
    fn merges_by_address(&self) -> bool {
        false
    }

    /// Whether one value may hold several instances, so that its key alone does not tell them apart:
    /// then their addresses do as well. False unless overridden.
    fn holds_several(&self) -> bool {
        false
    }

    /// The key of an instance.
    fn key(&self, prefix: &str, instance: &Instance) -> String;

    /// The range of keys that holds a service's instances, and no other service's.
    fn range(&self, prefix: &str, service: &str) -> KeyRange;

    /// The value of an instance.
    ///
    /// # Errors
    ///
    /// When this format cannot carry the instance.
    fn encode(&self, instance: &Instance) -> Result<Vec<u8>>;

    /// The instances that a key and its value stand for: usually one; several where the format
    /// puts several into one value; none where it marks an instance as not to be called.
    ///
    /// # Errors
    ///
    /// When the value is not of this format. The entry is skipped; the others stay. So it is where this
    /// panics, unless panics abort the process.
    fn decode(
        &self,
        prefix: &str,
        service: &str,
        key: &[u8],
        value: &[u8],
    ) -> Result<Vec<Instance>, DecodeError>;
}

/// So that a format may be chosen at run time, as `Arc<dyn Format>` or `Box<dyn Format>`.
macro_rules! format_behind {
    ($pointer:ident) => {
        impl<F: Format + ?Sized> Format for $pointer<F> {
            fn name(&self) -> &'static str {
                (**self).name()
            }

            fn default_prefix(&self) -> &'static str {
                (**self).default_prefix()
            }

            fn default_ttl(&self) -> Duration {
                (**self).default_ttl()
            }

            fn merges_by_address(&self) -> bool {
                (**self).merges_by_address()
            }

            fn holds_several(&self) -> bool {
                (**self).holds_several()
            }

            fn key(&self, prefix: &str, instance: &Instance) -> String {
                (**self).key(prefix, instance)
            }

            fn range(&self, prefix: &str, service: &str) -> KeyRange {
                (**self).range(prefix, service)
            }

            fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
                (**self).encode(instance)
            }

            fn decode(
                &self,
                prefix: &str,
                service: &str,
                key: &[u8],
                value: &[u8],
            ) -> Result<Vec<Instance>, DecodeError> {
                (**self).decode(prefix, service, key, value)
            }
        }
    };
}

format_behind!(Arc);
format_behind!(Box);

/// A half-open range of keys, `start` to before `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key.
    pub start: Vec<u8>,
    /// The first key after the range.
    pub end: Vec<u8>,
}

impl KeyRange {
    /// All keys that begin with `prefix`, which must not be empty nor consist of `0xff` alone.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        let start = prefix.into();
        let mut end = start.clone();
        // The smallest key above every key with this prefix: its last byte that can be
        // incremented is, and what follows is cut off.
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                break;
            }
        }
        Self { start, end }
    }
}

/// A value in etcd that is not of the format it was read as.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct DecodeError {
    reason: String,
}

impl DecodeError {
    /// An error with what is wrong about the value. Leave the value itself out: it may hold
    /// anything.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
        }
    }
}

/// What comes before the instances of a service in a format whose keys are `prefix/service/id`.
fn service_prefix(prefix: &str, service: &str) -> String {
    let prefix = prefix.trim_end_matches('/');
    if prefix.is_empty() {
        format!("{service}/")
    } else {
        format!("{prefix}/{service}/")
    }
}

/// As [`service_prefix`] for writers that join with slashes whatever the parts are, so that an empty
/// prefix leaves one in front.
fn slashed_prefix(prefix: &str, service: &str) -> String {
    format!("{}/{service}/", prefix.trim_end_matches('/'))
}

/// The id in a key: what follows `service_prefix`.
fn id_after<'a>(service_prefix: &str, key: &'a [u8]) -> Option<&'a str> {
    let id = std::str::from_utf8(key)
        .ok()?
        .strip_prefix(service_prefix)?;
    (!id.is_empty()).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_is_chosen_at_run_time_is_the_format_that_it_points_to() {
        let instance = Instance::new("svc", "h:1").id("7");
        for format in laws::all() {
            let shared: Arc<dyn Format> = Arc::from(laws::named(format.name()));
            let pointers: [&dyn Format; 2] = [&shared, &format];
            for pointer in pointers {
                let direct = format.as_ref();
                assert_eq!(pointer.name(), direct.name());
                assert_eq!(pointer.default_prefix(), direct.default_prefix());
                assert_eq!(pointer.default_ttl(), direct.default_ttl());
                assert_eq!(pointer.merges_by_address(), direct.merges_by_address());
                assert_eq!(pointer.holds_several(), direct.holds_several());
                let (key, value) = (
                    direct.key("p", &instance),
                    direct.encode(&instance).unwrap(),
                );
                assert_eq!(pointer.key("p", &instance), key);
                assert_eq!(pointer.encode(&instance).unwrap(), value);
                assert_eq!(pointer.range("p", "svc"), direct.range("p", "svc"));
                assert_eq!(
                    laws::read(pointer, "p", "svc", &key, &value),
                    laws::read(direct, "p", "svc", &key, &value)
                );
            }
            let layout = Layout::from(shared);
            assert_eq!(layout.prefix, format.default_prefix());
        }
    }

    #[test]
    fn a_prefix_range_ends_before_the_next_key_that_lacks_the_prefix() {
        let range = KeyRange::prefix("services/greeter/");
        assert_eq!(range.start, b"services/greeter/");
        assert_eq!(range.end, b"services/greeter0");
        assert_eq!(KeyRange::prefix(b"a\xff\xff".to_vec()).end, b"b");
    }

    #[test]
    fn slashes_at_the_end_of_a_prefix_make_no_difference() {
        assert_eq!(service_prefix("services/", "a"), "services/a/");
        assert_eq!(service_prefix("services", "a"), "services/a/");
        assert_eq!(service_prefix("", "a"), "a/");
        assert_eq!(service_prefix("/", "a"), "a/");
        assert_eq!(service_prefix("/x", "a"), "/x/a/");
        assert_eq!(slashed_prefix("/x/", "a"), "/x/a/");
    }

    #[test]
    fn an_empty_prefix_is_joined_as_the_frameworks_own_writer_does() {
        let instance = Instance::new("svc", "h:1").id("7");
        for (format, key) in [
            // The resolver's target and the key of go-zero are the service itself.
            (&EtcdNaming as &dyn Format, "svc/7"),
            (&GoZero, "svc/7"),
            // `path.Join` leaves out what is empty.
            (&GoMicro, "svc/7"),
            // `"%s/%s/%s"`, or the like.
            (&Kratos, "/svc/7"),
            (&Kitex, "/svc/h:1"),
            (&DubboGo, "/svc/h:1"),
        ] {
            assert_eq!(format.key("", &instance), key, "{}", format.name());
            assert!(laws::in_range(format, "", "svc", key), "{}", format.name());
        }
    }
}
