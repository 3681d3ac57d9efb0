//! Finding out whether a member may be called.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tower::{BoxError, ServiceExt as _};

use super::channel::single_member;
use crate::backoff::Backoff;
use crate::balance::BalancedChannel;
use crate::client::etcd_error::is_refusal_of_user;
use crate::client::transport::raw_client::{EtcdService, unauthenticated};
use crate::config::Config;
use crate::error::Result;

/// The first and the longest pause between two probes of a member. A promoted learner is used
/// within this time.
const PROBE_PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));

/// The pause after a member has refused to say its cluster's id without a user.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);

/// Calls a member repeatedly, until it responds as a voting member of a cluster whose id `accepts`
/// allows. The id is `None` if the member tells it only to users. The user's password and token are
/// never sent, because the address may belong to another server.
pub(super) async fn probe(config: &Config, address: &str, accepts: impl Fn(Option<u64>) -> bool) {
    let mut pauses = Backoff::with_jitter(PROBE_PAUSES.0, PROBE_PAUSES.1, 0.5..1.0);
    let client = match single_member(config, address).and_then(probe_client) {
        Ok(client) => client,
        Err(error) => {
            tracing::warn!(address, %error, "cannot call a member that etcd lists");
            return std::future::pending().await;
        }
    };
    loop {
        // Any other call that a learner refuses would do as well.
        let mut cluster = client.cluster_client();
        match timeout(config.dial_timeout, cluster.member_list()).await {
            Ok(Ok(list)) => {
                let cluster_id = list.header().map(etcd_client::ResponseHeader::cluster_id);
                if accepts(cluster_id) {
                    return;
                }
                tracing::debug!(
                    address,
                    ?cluster_id,
                    "a listed address belongs to another cluster"
                );
            }
            Ok(Err(error)) if is_refusal_of_user(&error) => {
                if accepts(None) {
                    return;
                }
                tracing::debug!(address, "a listed address tells its cluster only to users");
                sleep(REFUSED_PAUSE).await;
            }
            Ok(Err(error)) => tracing::debug!(address, %error, "a probe failed"),
            Err(_) => tracing::debug!(address, "no response to a probe"),
        }
        sleep(pauses.next()).await;
    }
}

/// A client without a user, because members say that they are learners before they ask for one.
fn probe_client(channel: BalancedChannel) -> Result<etcd_client::Client> {
    unauthenticated(EtcdService::new(channel.map_err(BoxError::from)))
}
