//! How a client's calls reach etcd: connecting, authenticating, and the clients of etcd-client.
//!
//! - `rpc`: the gRPC service beneath etcd-client.
//! - `call_options`: where the calls of the current task go.
//! - `open_stream`: the attempts to open a stream.
//! - `unary`: the attempts of a unary call. `method` says which calls may be repeated.
//! - `message` and `response`: messages, their limits and gzip.
//! - `members`: the members of the cluster that are called, kept current.
//! - `raw_client`: etcd-client over a service of ours.
//! - `awaited_response`: how a member responded, for the record of an operation's attempts.
//! - `no_response`: the reason in the error of an operation whose time is over. `reach` asks for it.
//! - `token`: the user's token and its age.
//! - `call_log`: the debug log.

mod awaited_response;
mod call_log;
mod call_options;
mod members;
mod message;
mod method;
mod no_response;
mod open_stream;
mod raw_client;
mod reach;
mod response;
mod rpc;
mod token;
mod unary;

use std::fmt;
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::backoff::Backoff;
use crate::balance::AttemptRecord;
use crate::client::etcd_error::EtcdError;
use crate::config::Config;
use crate::error::{Error, Result};
use members::FollowedMembers;
use raw_client::{options, unauthenticated};

pub(super) use call_options::CallOptions;
pub(super) use members::single_member;
pub(super) use no_response::timeout_error;
pub(super) use rpc::RpcService;
pub(super) use unary::is_transient;

/// The connections of one client, and the clients of etcd-client that use them.
pub(super) struct Transport {
    pub(super) raw: etcd_client::Client,
    // Kept apart, because a clone of one of them costs an eighth of a clone of `raw`.
    pub(super) kv: etcd_client::KvClient,
    pub(super) watch: etcd_client::WatchClient,
    pub(super) lease: etcd_client::LeaseClient,
    pub(super) cluster: etcd_client::ClusterClient,
    pub(super) maintenance: etcd_client::MaintenanceClient,
    pub(super) rpc: RpcService,
    /// Set once the user has a token, or at once without a user.
    authenticated: OnceCell<()>,
    /// The attempts to authenticate, for which all calls wait.
    authentication: AttemptRecord,
    _auto_sync: Option<AbortOnDropHandle<()>>,
    _following: AbortOnDropHandle<()>,
}

impl Transport {
    /// Connects, authenticates if there is a user, and waits until a member responds, all within
    /// `dial_timeout`.
    pub(super) async fn connect(config: &Config, closed: &CancellationToken) -> Result<Self> {
        let members = FollowedMembers::start(config, closed)?;
        let rpc = RpcService::new(&members, config, closed);
        let raw = wait_until_reachable(config, &rpc).await?;
        let authenticated = OnceCell::new_with(Some(()));
        Ok(Self::new(config, closed, members, rpc, raw, authenticated))
    }

    /// Like [`connect`](Self::connect), but without waiting for a member: the first call
    /// authenticates.
    pub(super) fn connect_lazy(config: &Config, closed: &CancellationToken) -> Result<Self> {
        let members = FollowedMembers::start(config, closed)?;
        let rpc = RpcService::new(&members, config, closed);
        let raw = unauthenticated(rpc.to_etcd_service())?;
        let authenticated = OnceCell::new_with(config.username.is_none().then_some(()));
        Ok(Self::new(config, closed, members, rpc, raw, authenticated))
    }

    fn new(
        config: &Config,
        closed: &CancellationToken,
        members: FollowedMembers,
        rpc: RpcService,
        raw: etcd_client::Client,
        authenticated: OnceCell<()>,
    ) -> Self {
        let auto_sync = config.auto_sync.then(|| {
            let sync = members::auto_sync(config.clone(), raw.cluster_client(), members.membership);
            let closed = closed.clone();
            AbortOnDropHandle::new(tokio::spawn(async move {
                closed.run_until_cancelled(sync).await;
            }))
        });
        Transport {
            // `message` applies the limits to every call. tonic's default of 4 MiB would apply
            // before a larger limit.
            kv: raw.kv_client().max_decoding_message_size(usize::MAX),
            watch: raw.watch_client().max_decoding_message_size(usize::MAX),
            lease: raw.lease_client(),
            cluster: raw.cluster_client(),
            maintenance: raw.maintenance_client(),
            raw,
            rpc,
            authenticated,
            authentication: AttemptRecord::default(),
            _auto_sync: auto_sync,
            _following: members.task,
        }
    }

    /// Authenticates before the first call of a lazily connected client. Concurrent calls share one
    /// attempt; after a failure each caller tries once more.
    pub(super) async fn authenticate_once(&self, config: &Config) -> Result<()> {
        if self.authenticated.initialized() {
            return Ok(());
        }
        // Boxed, because the future is rarely needed, and large.
        let options = CallOptions {
            record: Some(self.authentication.clone()),
            ..CallOptions::default()
        };
        Box::pin(self.authenticated.get_or_try_init(|| {
            options.scope(async {
                let Some((name, password)) = user(config) else {
                    return Ok(());
                };
                // The clients made from `raw` share its user and token.
                let mut raw = self.raw.clone();
                raw.update_user(Some((name.clone(), password.clone())))
                    .await
                    .map_err(|error| Error::from_etcd(authenticate(name), error))
            })
        }))
        .await
        .map(drop)
    }

    /// The error of an operation whose time is over.
    pub(super) fn timeout_error(
        &self,
        operation: String,
        after: Duration,
        record: &AttemptRecord,
    ) -> Error {
        // Before it has a token, an operation waits for the authentication.
        let record = match self.authenticated.initialized() {
            true => record,
            false => &self.authentication,
        };
        self.rpc.timeout_error(operation, after, record)
    }
}

fn user(config: &Config) -> Option<(&String, &String)> {
    config.username.as_ref().zip(config.password.as_ref())
}

/// The operation that errors name.
fn authenticate(name: &str) -> String {
    format!("authenticate as {name:?}")
}

/// Connects, again and again, until a member responds or `dial_timeout` has passed. An error that
/// no repetition can cure, such as a wrong password, is returned at once.
async fn wait_until_reachable(config: &Config, rpc: &RpcService) -> Result<etcd_client::Client> {
    let deadline = Instant::now() + config.dial_timeout;
    let record = AttemptRecord::default();
    let mut backoff = Backoff::for_etcd();
    let attempts = async {
        loop {
            match connect_once(config, rpc).await {
                Ok(client) => return Ok(client),
                Err(error) if error.is_permanent() => return Err(error),
                Err(error) => tracing::debug!(%error, "cannot connect to etcd, retrying"),
            }
            sleep(backoff.next()).await;
        }
    };
    let options = CallOptions {
        record: Some(record.clone()),
        ..CallOptions::default()
    };
    match timeout_at(deadline, options.scope(attempts)).await {
        Ok(result) => result,
        Err(_) => Err(Error::Unreachable {
            endpoints: config.endpoints.clone(),
            after: config.dial_timeout,
            reason: rpc.no_response_reason(&record),
        }),
    }
}

/// Connects, and authenticates if there is a user.
async fn connect_once(config: &Config, rpc: &RpcService) -> Result<etcd_client::Client> {
    let (mut options, mut operation) = (options(), "connect".to_owned());
    if let Some((name, password)) = user(config) {
        options = options.with_user(name, password);
        operation = authenticate(name);
    }
    let client = etcd_client::Client::from_channel(
        etcd_client::Channel::Custom(rpc.to_etcd_service()),
        Some(options),
    )
    .await
    .map_err(|error| Error::from_etcd(operation, error))?;
    check_reachable(client.maintenance_client().status().await, "connect")?;
    Ok(client)
}

/// Succeeds if a member responded to a status call. A member that refuses the call to this user is
/// reachable as well.
pub(super) fn check_reachable(
    response: Result<etcd_client::StatusResponse, etcd_client::Error>,
    operation: &str,
) -> Result<()> {
    match response {
        Ok(_) => Ok(()),
        Err(error) if EtcdError::of_client(&error) == EtcdError::PermissionDenied => Ok(()),
        Err(error) => Err(Error::from_etcd(operation, error)),
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").finish_non_exhaustive()
    }
}
