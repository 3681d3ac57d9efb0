//! What a client talks through, and the first answer.

mod call_log;
pub(super) mod members;
mod message;
mod method;
mod response;
mod rpc;

use std::fmt;

use futures::FutureExt;
use tokio::sync::{OnceCell, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use members::Addresses;
use rpc::Wire;
pub(super) use rpc::{Route, is_passing};

use crate::backoff::Backoff;
use crate::config::Config;
use crate::error::{Error, Result};

/// What one client talks through.
pub(super) struct Transport {
    pub(super) raw: etcd_client::Client,
    // Cloned by themselves: one of them costs an eighth of the whole client.
    pub(super) kv: etcd_client::KvClient,
    pub(super) watch: etcd_client::WatchClient,
    pub(super) lease: etcd_client::LeaseClient,
    pub(super) cluster: etcd_client::ClusterClient,
    pub(super) maintenance: etcd_client::MaintenanceClient,
    pub(super) wire: Wire,
    /// Set once the user, if there is one, has a token.
    signed_in: OnceCell<()>,
    _auto_sync: Option<AbortOnDropHandle<()>>,
}

impl Transport {
    /// Connects, authenticates if there is a user, and waits for a first answer, all within
    /// `dial_timeout`.
    pub(super) async fn connect(config: &Config, closed: &CancellationToken) -> Result<Self> {
        let (members, wire) = wire(config, closed)?;
        let raw = first_answer(config, &wire).await?;
        let signed_in = OnceCell::new_with(Some(()));
        Self::begin(config, closed, members, wire, raw, signed_in)
    }

    /// The same without waiting for anybody: the first call authenticates.
    pub(super) fn lazy(config: &Config, closed: &CancellationToken) -> Result<Self> {
        let (members, wire) = wire(config, closed)?;
        // Without a user `from_channel` sends nothing, and is ready at once.
        let raw = etcd_client::Client::from_channel(wire.channel(), Some(options()))
            .now_or_never()
            .unwrap_or_else(|| {
                let reason = "etcd-client waits for a member before the first call".to_owned();
                Err(etcd_client::Error::InvalidArgs(reason))
            })
            .map_err(|error| Error::from_etcd("connect", error))?;
        let signed_in = OnceCell::new_with(config.username.is_none().then_some(()));
        Self::begin(config, closed, members, wire, raw, signed_in)
    }

    fn begin(
        config: &Config,
        closed: &CancellationToken,
        members: watch::Sender<Addresses>,
        wire: Wire,
        raw: etcd_client::Client,
        signed_in: OnceCell<()>,
    ) -> Result<Self> {
        let configured = members::configured(config)?;
        let auto_sync = config.auto_sync.then(|| {
            let cluster = raw.cluster_client();
            let sync = members::keep_up_to_date(config.clone(), configured, cluster, members);
            let closed = closed.clone();
            AbortOnDropHandle::new(tokio::spawn(async move {
                closed.run_until_cancelled(sync).await;
            }))
        });
        Ok(Transport {
            // The limits are seen to on the wire, for every call; tonic's own of 4 MiB would come
            // before a larger one.
            kv: raw.kv_client().max_decoding_message_size(usize::MAX),
            watch: raw.watch_client().max_decoding_message_size(usize::MAX),
            lease: raw.lease_client(),
            cluster: raw.cluster_client(),
            maintenance: raw.maintenance_client(),
            raw,
            wire,
            signed_in,
            _auto_sync: auto_sync,
        })
    }

    /// Sees to it that the user has a token, before a call of a client that did not wait for one. One
    /// call does it for all; each that finds that it failed tries it once.
    pub(super) async fn sign_in(&self, config: &Config) -> Result<()> {
        if self.signed_in.initialized() {
            return Ok(());
        }
        // Boxed: rare, and large.
        Box::pin(self.signed_in.get_or_try_init(|| async {
            let Some((name, password)) = user(config) else {
                return Ok(());
            };
            // Its token and its user are those of all that was made from it.
            let mut raw = self.raw.clone();
            raw.update_user(Some((name.clone(), password.clone())))
                .await
                .map_err(|error| Error::from_etcd(authenticating(name), error))
        }))
        .await
        .map(drop)
    }
}

/// The way to the configured members, and where others are sent to it.
fn wire(config: &Config, closed: &CancellationToken) -> Result<(watch::Sender<Addresses>, Wire)> {
    let (members, current) = watch::channel(members::configured(config)?);
    let wire = Wire::new(members::channel(config, current)?, config, closed);
    Ok((members, wire))
}

fn options() -> etcd_client::ConnectOptions {
    etcd_client::ConnectOptions::new().with_auto_token_refresh(true)
}

fn user(config: &Config) -> Option<(&String, &String)> {
    config.username.as_ref().zip(config.password.as_ref())
}

fn authenticating(name: &str) -> String {
    format!("authenticate as {name:?}")
}

/// Tries until a member answers or `dial_timeout` is over. What no repetition can mend, such as a
/// wrong password, ends it at once.
async fn first_answer(config: &Config, wire: &Wire) -> Result<etcd_client::Client> {
    let deadline = Instant::now() + config.dial_timeout;
    let mut reason = None;
    let mut pauses = Backoff::for_etcd();
    let tries = async {
        loop {
            match authenticated(config, wire).await {
                Ok(client) => return Ok(client),
                Err(error) if error.is_permanent() => return Err(error),
                Err(Error::Rpc { status, .. }) => reason = Some(status.message().to_owned()),
                Err(error) => reason = Some(error.to_string()),
            }
            sleep(pauses.next()).await;
        }
    };
    match timeout_at(deadline, tries).await {
        Ok(result) => result,
        Err(_) => Err(Error::Unreachable {
            endpoints: config.endpoints.clone(),
            after: config.dial_timeout,
            reason: wire
                .unready()
                .or(reason)
                .or_else(|| wire.said())
                .unwrap_or_else(|| "connected, and not answered".to_owned()),
        }),
    }
}

async fn authenticated(config: &Config, wire: &Wire) -> Result<etcd_client::Client> {
    let (mut options, mut operation) = (options(), "connect".to_owned());
    if let Some((name, password)) = user(config) {
        options = options.with_user(name, password);
        operation = authenticating(name);
    }
    let client = etcd_client::Client::from_channel(wire.channel(), Some(options))
        .await
        .map_err(|error| Error::from_etcd(operation, error))?;
    answered(client.maintenance_client().status().await, "connect")?;
    Ok(client)
}

/// Any answer to a status call shows that the member is there, even the refusal to answer it to
/// this user.
pub(super) fn answered(
    answer: Result<etcd_client::StatusResponse, etcd_client::Error>,
    operation: &str,
) -> Result<()> {
    match answer {
        Ok(_) => Ok(()),
        Err(etcd_client::Error::GRpcStatus(status))
            if status.code() == tonic::Code::PermissionDenied =>
        {
            Ok(())
        }
        Err(error) => Err(Error::from_etcd(operation, error)),
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}
