//! The place of TLS in a build without it.

use crate::balance::connection::target::Target;
use crate::config::TlsConfig;
use crate::error::{Error, Result};

/// Has no values, because this build has no TLS.
pub(crate) enum Tls {}

impl Tls {
    pub(crate) fn new(_: &TlsConfig) -> Result<Self> {
        Err(Error::invalid(
            "tls",
            "enabled",
            "this build has no TLS; enable the cargo feature `tls`, `tls-ring` or \
             `tls-aws-lc` of goo-etcd",
        ))
    }

    pub(crate) async fn secure<T>(&self, _: &Target, io: T) -> Result<T, String> {
        let _ = io;
        match *self {}
    }
}
