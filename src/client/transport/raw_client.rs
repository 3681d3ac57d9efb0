//! etcd-client over a service of ours.

use std::time::Duration;

use futures::FutureExt as _;
use http::{Request, Response};
use tonic::body::Body;
use tower::BoxError;
use tower::util::BoxCloneSyncService;

use crate::error::{Error, Result};

/// A service as etcd-client takes it.
pub(super) type EtcdService = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// An etcd-client without a user.
pub(super) fn unauthenticated(service: EtcdService) -> Result<etcd_client::Client> {
    let channel = etcd_client::Channel::Custom(service);
    // Without a user in its options etcd-client sends nothing, so this future is ready at once.
    etcd_client::Client::from_channel(channel, Some(options()))
        .now_or_never()
        .ok_or_else(|| Error::NotConnected {
            operation: "connect".to_owned(),
            after: Duration::ZERO,
            reason: "etcd-client waits for a response".to_owned(),
        })?
        .map_err(|error| Error::from_etcd("connect", error))
}

pub(super) fn options() -> etcd_client::ConnectOptions {
    etcd_client::ConnectOptions::new().with_auto_token_refresh(true)
}
