//! The part of an endpoint that a connection depends on.

use std::sync::Arc;

use http::Uri;
use http::uri::{Authority, Scheme};

use super::address_order::AddressOrder;
use super::first_response::LastEnd;
use super::ping_interval::Doublings;
use crate::instance::{Instance, validate_address};

/// Where and how to connect to an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// The instance's address: `host:port` or `unix:/path`.
    pub(crate) address: Arc<str>,
    pub(crate) scheme: Scheme,
    /// The `:authority` of calls, unless the channel has an origin.
    pub(crate) authority: Authority,
    /// The order in which the addresses of the host are tried.
    pub(super) address_order: AddressOrder,
    /// How often the server has asked for fewer pings.
    pub(super) doublings: Doublings,
    /// How the server ended its last connection.
    pub(super) last_end: LastEnd,
}

impl Target {
    /// The target of an instance. `tls` says whether the channel uses TLS.
    pub(crate) fn new(instance: &Instance, tls: bool) -> Result<Self, String> {
        let address = instance.address.as_str();
        // A URI accepts more than can be called: an address without a port would mean port 80.
        validate_address(address).map_err(|error| error.to_string())?;
        if instance.tls == Some(true) && !tls {
            // Plaintext to an instance that asks for TLS would send calls unencrypted.
            return Err(format!(
                "{address} speaks TLS and the channel does not; give it `tls(..)`"
            ));
        }
        let scheme = if tls { Scheme::HTTPS } else { Scheme::HTTP };
        let authority = if address.starts_with("unix:") {
            // gRPC's authority for Unix sockets.
            Authority::from_static("localhost")
        } else {
            address
                .parse()
                .map_err(|error| format!("{address:?} is not an address: {error}"))?
        };
        Ok(Self {
            address: address.into(),
            scheme,
            authority,
            address_order: AddressOrder::default(),
            doublings: Doublings::default(),
            last_end: LastEnd::default(),
        })
    }

    /// Says that the server asked for fewer pings, and which setting helps; `None` if it did not.
    pub(crate) fn ping_advice(&self) -> Option<String> {
        self.doublings.advice()
    }

    pub(crate) fn uri(&self) -> Result<Uri, http::Error> {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query("/")
            .build()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::endpoint_address;
    use crate::instance::uncallable_reason;

    proptest! {
        /// An endpoint that a configuration accepts is tried, unless it is an address that nobody
        /// can call.
        #[test]
        fn accepted_endpoints_can_be_tried(
            scheme in "(http://|HTTP://)?",
            address in prop_oneof![
                "[a-z0-9:.%_!@?# \\[\\]-]{1,12}:[+0-9]{1,6}",
                "[A-Z0-9._-]{1,12}:[0-9]{1,5}",
                "\\[[0-9a-f:.%]{2,8}::[0-9a-f:.]{0,8}\\]:[0-9]{1,5}",
            ],
            slashes in "/{0,2}",
        ) {
            let endpoint = format!("{scheme}{address}{slashes}");
            if let Ok(address) = endpoint_address(&endpoint, false)
                && uncallable_reason(address).is_none()
            {
                let target = Target::new(&Instance::new("etcd", address), false).unwrap();
                prop_assert_eq!(target.authority.as_str(), address);
                prop_assert!(target.uri().is_ok());
            }
        }
    }
}
