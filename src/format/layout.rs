//! A format under a prefix.

use std::sync::Arc;

use super::codec::Format;
use crate::error::Result;
use crate::instance::{Instance, validate_service};

/// Where and how instances are stored in etcd: a format, a prefix, and optionally another name for
/// the service.
///
/// Every [`Format`] converts into a layout with the format's default prefix.
///
/// ```
/// use goo_etcd::format::{GoZero, Kratos, Layout};
///
/// let kratos = Layout::from(Kratos);
/// let staging = Layout::new(Kratos).prefix("/staging");
/// let go_zero = Layout::new(GoZero).service("user.rpc");
/// ```
#[derive(Debug, Clone)]
pub struct Layout {
    pub(crate) format: Arc<dyn Format>,
    pub(crate) prefix: String,
    service: Option<String>,
}

impl Layout {
    /// A format under its default prefix.
    #[must_use]
    pub fn new(format: impl Format) -> Self {
        Self {
            prefix: format.default_prefix().to_owned(),
            format: Arc::new(format),
            service: None,
        }
    }

    /// Replaces the prefix if one is given.
    pub(crate) fn override_prefix(self, prefix: Option<String>) -> Self {
        match prefix {
            Some(prefix) => self.prefix(prefix),
            None => self,
        }
    }

    /// Sets the key prefix, which may be empty. [`format`](crate::format) says how it is joined
    /// with the service.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets the service's name in this layout, if it differs from its name elsewhere. Instances are
    /// read from, and written under, this name.
    #[must_use]
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// The name of `service` in this layout.
    pub(crate) fn service_name<'a>(&'a self, service: &'a str) -> &'a str {
        self.service.as_deref().unwrap_or(service)
    }

    /// The key and the value of an instance.
    pub(crate) fn encode(&self, instance: &Instance) -> Result<(String, Vec<u8>)> {
        let renamed;
        let instance = match &self.service {
            None => instance,
            Some(service) => {
                validate_service(service)?;
                renamed = Instance {
                    service: service.clone(),
                    ..instance.clone()
                };
                &renamed
            }
        };
        let key = self.format.key(&self.prefix, instance);
        Ok((key, self.format.encode(instance)?))
    }
}

impl<F: Format> From<F> for Layout {
    fn from(format: F) -> Self {
        Self::new(format)
    }
}
