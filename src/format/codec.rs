//! The [`Format`] trait.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use super::identity::Identity;
use super::key::{KeyContext, KeyRange};
use crate::error::Result;
use crate::instance::Instance;

/// How instances are written in etcd and read from it.
///
/// Implement this trait to share registrations with other software; the
/// [module page](crate::format) has an example. `Registrar` and `Directory` accept every
/// implementation, and also an `Arc<dyn Format>` or a `Box<dyn Format>` chosen at run time.
pub trait Format: Debug + Send + Sync + 'static {
    /// A short name for logs.
    fn name(&self) -> &'static str;

    /// The key prefix to use unless the user configures another one.
    fn default_prefix(&self) -> &'static str;

    /// The time to live of a registration unless the user configures another one.
    fn default_ttl(&self) -> Duration;

    /// Whether two formats are the same: they are if their identities are equal.
    ///
    /// Directories of one client with the same service and the same formats share one watch.
    /// The default is [`Identity::of`]. A format with fields can override it with
    /// [`Identity::with_settings`], so that directories with equal settings share a watch too.
    fn identity(&self) -> Identity {
        Identity::of(self)
    }

    /// Whether instances are distinguished by address alone. Several keys with one address are
    /// then one instance until the last of these keys is deleted; the key written last supplies the
    /// other fields. Default: false, each key is an instance.
    fn merges_by_address(&self) -> bool {
        false
    }

    /// Whether one value may hold several instances. Such instances are distinguished by key and
    /// address, otherwise the key suffices. Default: false.
    fn is_multi_instance(&self) -> bool {
        false
    }

    /// The key of an instance.
    fn key(&self, prefix: &str, instance: &Instance) -> String;

    /// The range of keys that holds all instances of a service, and of no other service.
    fn range(&self, prefix: &str, service: &str) -> KeyRange;

    /// The value of an instance.
    ///
    /// # Errors
    ///
    /// Fails if this format cannot carry the instance.
    fn encode(&self, instance: &Instance) -> Result<Vec<u8>>;

    /// The instances that an entry of etcd stands for. Usually one; several where the format puts
    /// several into one value; none where the entry says that its instance must not be called.
    ///
    /// # Errors
    ///
    /// Fails if the value is not of this format. The directory then skips the entry and keeps all
    /// others. A panic in this method counts as such a failure, unless panics abort the process.
    fn decode(
        &self,
        context: KeyContext<'_>,
        value: &[u8],
    ) -> std::result::Result<Vec<Instance>, DecodeError>;
}

/// Implements [`Format`] for a smart pointer by calling the format behind it.
macro_rules! delegate_format {
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

            fn identity(&self) -> Identity {
                (**self).identity()
            }

            fn merges_by_address(&self) -> bool {
                (**self).merges_by_address()
            }

            fn is_multi_instance(&self) -> bool {
                (**self).is_multi_instance()
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
                context: KeyContext<'_>,
                value: &[u8],
            ) -> std::result::Result<Vec<Instance>, DecodeError> {
                (**self).decode(context, value)
            }
        }
    };
}

delegate_format!(Arc);
delegate_format!(Box);

/// The reason why [`Format::decode`] refused a value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct DecodeError {
    reason: String,
}

impl DecodeError {
    /// Makes an error from a reason. Do not quote the value: it may hold a secret.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
        }
    }
}
