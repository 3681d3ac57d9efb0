//! What a connection needs to know of an endpoint.

use std::sync::Arc;

use http::Uri;
use http::uri::{Authority, Scheme};

use crate::instance::{Instance, validate_address};

/// Where an endpoint is, as far as a connection is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// As the instance has it: `host:port` or `unix:/path`.
    pub(crate) address: Arc<str>,
    pub(crate) scheme: Scheme,
    /// What calls to it name as their authority, unless an origin is set.
    pub(crate) authority: Authority,
}

impl Target {
    /// Where an instance is. `tls` is the channel's setting.
    pub(crate) fn new(instance: &Instance, tls: bool) -> Result<Self, String> {
        let address = instance.address.as_str();
        // A URI would take more than can be called, an address without a port for port 80.
        validate_address(address).map_err(|error| error.to_string())?;
        if instance.tls == Some(true) && !tls {
            // Never plaintext to one that says it speaks TLS.
            return Err(format!(
                "{address} speaks TLS and the channel does not; give it `tls(..)`"
            ));
        }
        let scheme = if tls { Scheme::HTTPS } else { Scheme::HTTP };
        let authority = if address.starts_with("unix:") {
            // gRPC's name for the authority of a Unix socket.
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
        })
    }

    pub(crate) fn uri(&self) -> Result<Uri, http::Error> {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query("/")
            .build()
    }
}
