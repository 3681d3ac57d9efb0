//! The lists of the cluster's members that etcd sends.

use std::sync::Arc;

use tokio::time::{MissedTickBehavior, interval, timeout};

use super::channel::Addresses;
use super::membership::Membership;
use crate::client::etcd_error::EtcdError;
use crate::config::{Config, endpoint_address};
use crate::error::{Error, Result};
use crate::instance::uncallable_reason;

/// Lists the cluster's members every `auto_sync_interval`, until the future is dropped.
pub(in crate::client) async fn auto_sync(
    config: Config,
    mut cluster: etcd_client::ClusterClient,
    membership: Arc<Membership>,
) {
    let mut ticks = interval(config.auto_sync_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut has_warned = false;
    loop {
        ticks.tick().await;
        match list(&config, &mut cluster, &mut has_warned).await {
            None => membership.record_list_failure(),
            Some(list) if list.addresses.is_empty() => {
                tracing::debug!("etcd lists no member with a client URL; keeping the known members")
            }
            Some(list) => membership.record_list(list.addresses, list.cluster_id),
        }
    }
}

/// The members as etcd lists them.
struct List {
    /// Those of the members that take calls.
    addresses: Addresses,
    cluster_id: Option<u64>,
}

/// Fetches the list of members. `None` after a failure, which is logged.
async fn list(
    config: &Config,
    cluster: &mut etcd_client::ClusterClient,
    has_warned: &mut bool,
) -> Option<List> {
    match timeout(config.request_timeout, cluster.member_list()).await {
        Ok(Ok(listed)) => {
            let members = listed.members().iter().map(|member| MemberInfo {
                name: member.name(),
                is_learner: member.is_learner(),
                client_urls: member.client_urls(),
            });
            return Some(List {
                addresses: usable(config, members),
                cluster_id: listed.header().map(etcd_client::ResponseHeader::cluster_id),
            });
        }
        Ok(Err(error)) if EtcdError::of_client(&error) == EtcdError::PermissionDenied => {
            // Logged once, because the refusal lasts until an operator grants the permission.
            if !std::mem::replace(has_warned, true) {
                tracing::warn!(
                    user = config.username,
                    "may not list etcd's members, so auto_sync does nothing; etcd allows it only \
                     to root, from 3.5.28 and 3.6.9 on"
                );
            }
        }
        Ok(Err(error)) => tracing::warn!(%error, "cannot list etcd's members"),
        Err(_) => {
            tracing::warn!(after = ?config.request_timeout, "listing etcd's members timed out");
        }
    }
    None
}

/// The part of a listed member that decides whether the member can be called.
struct MemberInfo<'a> {
    name: &'a str,
    is_learner: bool,
    client_urls: &'a [String],
}

/// The addresses of the members that take calls. A learner takes none, and a member without a name
/// has not started yet.
fn usable<'a>(config: &Config, members: impl Iterator<Item = MemberInfo<'a>>) -> Addresses {
    members
        .filter(|member| !member.is_learner && !member.name.is_empty())
        .flat_map(|member| member.client_urls)
        // A URL of the other scheme is left out, so that a member cannot turn TLS on or off.
        .filter_map(|url| match client_address(config, url) {
            Ok(address) => Some(address),
            Err(error) => {
                tracing::warn!(%error, "a member's client URL is left out");
                None
            }
        })
        .collect()
}

/// The address of a member's client URL. A member whose `--advertise-client-urls` has `0.0.0.0` is
/// left out, because each client would call its own machine.
fn client_address(config: &Config, url: &str) -> Result<String> {
    let address = endpoint_address(url, config.enable_tls)?;
    match uncallable_reason(address) {
        Some(reason) => Err(Error::invalid("client URL", address, reason)),
        None => Ok(address.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(config: &Config, listed: &[(&str, bool, &[&str])]) -> Vec<String> {
        let urls: Vec<Vec<String>> = listed
            .iter()
            .map(|(_, _, urls)| urls.iter().map(|url| (*url).to_owned()).collect())
            .collect();
        let listed = listed.iter().zip(&urls).map(|(member, urls)| MemberInfo {
            name: member.0,
            is_learner: member.1,
            client_urls: urls,
        });
        usable(config, listed).into_iter().collect()
    }

    #[test]
    fn usable_members_are_voting_named_and_of_the_scheme() {
        let listed: &[(&str, bool, &[&str])] = &[
            ("a", false, &["http://a:2379", "http://a2:2379/"]),
            ("learner", true, &["http://b:2379"]),
            ("", false, &["http://c:2379"]),
            ("none", false, &[]),
            ("secure", false, &["https://d:2379", "unix://e"]),
            ("any", false, &["http://0.0.0.0:2379", "http://[::]:2379"]),
        ];
        let plain = Config::default();
        assert_eq!(addresses(&plain, listed), ["a2:2379", "a:2379"]);
        let tls = Config {
            enable_tls: true,
            ..Config::default()
        };
        assert_eq!(addresses(&tls, listed), ["d:2379"]);
        assert!(addresses(&plain, &listed[1..]).is_empty());
    }
}
