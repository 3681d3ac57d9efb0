//! A format under a prefix.

use std::sync::Arc;

use super::Format;
use crate::instance::Instance;

/// Where instances stand in etcd, and how they are written there: a format, the prefix, and where it
/// is another one there, the service's name.
///
/// Any [`Format`] is one, under its own prefix.
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
    /// A format under its own prefix.
    #[must_use]
    pub fn new(format: impl Format) -> Self {
        Self {
            prefix: format.default_prefix().to_owned(),
            format: Arc::new(format),
            service: None,
        }
    }

    /// Under this prefix, if one is set.
    pub(crate) fn under(self, prefix: Option<String>) -> Self {
        match prefix {
            Some(prefix) => self.prefix(prefix),
            None => self,
        }
    }

    /// Sets the prefix under which services stand.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }

    /// Sets the name that the service has here, where it is another one than elsewhere: what is
    /// read is of that service, and whatever is written is written as that service.
    #[must_use]
    pub fn service(mut self, service: impl Into<String>) -> Self {
        self.service = Some(service.into());
        self
    }

    /// The name that `service` has here.
    pub(crate) fn service_here<'a>(&'a self, service: &'a str) -> &'a str {
        self.service.as_deref().unwrap_or(service)
    }

    /// The key and the value of an instance.
    pub(crate) fn write(&self, instance: &Instance) -> crate::error::Result<(String, Vec<u8>)> {
        let renamed;
        let instance = match &self.service {
            None => instance,
            Some(service) => {
                crate::instance::validate_service(service)?;
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
