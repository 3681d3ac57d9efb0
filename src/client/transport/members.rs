//! The members of the cluster as the endpoints of a channel, and keeping them up to date.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::WatchStream;

use crate::balance::{BalancedChannel, PingPolicy, Source};
use crate::client::etcd_error::EtcdError;
use crate::config::{Config, MIN_KEEP_ALIVE_INTERVAL, endpoint_address};
use crate::error::{Error, Result};
use crate::instance::{Instance, parse_ip, uncallable_reason};

/// The longest backoff between attempts to connect to a member: 50 ms per member, from 250 ms to
/// 1 s. Everything that depends on etcd has to recover within two seconds of etcd's return. Fewer
/// members are tried more often, because about 20 attempts a second in all, on loopback or in a
/// rack, are negligible for both sides.
fn max_backoff(members: usize) -> Duration {
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    Duration::from_millis(50)
        .saturating_mul(members)
        .clamp(Duration::from_millis(250), Duration::from_secs(1))
}

/// The addresses of members, `host:port`.
pub(super) type Addresses = BTreeSet<String>;

/// The addresses of the configured endpoints.
pub(super) fn configured_addresses(config: &Config) -> Result<Addresses> {
    config
        .endpoints
        .iter()
        .map(|endpoint| configured_address(config, endpoint))
        .collect()
}

/// The address of a configured endpoint. An unspecified host is this machine, as for etcdctl and
/// Go: etcd's examples listen on `http://0.0.0.0:2379`, and that is what their users configure.
fn configured_address(config: &Config, endpoint: &str) -> Result<String> {
    let address = endpoint_address(endpoint, config.enable_tls)?;
    let Some((host, port)) = address.rsplit_once(':') else {
        return Ok(address.to_owned());
    };
    Ok(match parse_ip(host).map(|ip| ip.to_canonical()) {
        Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) => format!("{}:{port}", Ipv4Addr::LOCALHOST),
        Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) => format!("[{}]:{port}", Ipv6Addr::LOCALHOST),
        _ => address.to_owned(),
    })
}

/// A channel to these members, which follows their changes.
pub(super) fn channel(
    config: &Config,
    members: watch::Receiver<Addresses>,
) -> Result<BalancedChannel> {
    let sets = WatchStream::new(members).map(|members| members.iter().map(instance).collect());
    build(config, Source::new("the etcd endpoints", sets))
}

/// A channel to a single member.
pub(in crate::client) fn single_member(config: &Config, endpoint: &str) -> Result<BalancedChannel> {
    let member = instance(&configured_address(config, endpoint)?);
    build(
        config,
        Source::new("the endpoint", futures::stream::iter([vec![member]])),
    )
}

fn instance(address: &String) -> Instance {
    Instance::new("etcd", address)
}

fn build(config: &Config, source: Source) -> Result<BalancedChannel> {
    let mut builder = BalancedChannel::builder(source)
        .connect_timeout(config.dial_timeout)
        .max_connect_backoff(max_backoff(config.endpoints.len()))
        // Enough for a member to restart, and early enough that the caller gets the reason before
        // the call times out.
        .ready_timeout(config.request_timeout / 2)
        .http2_keep_alive_interval(Some(config.keep_alive_interval))
        .keep_alive_timeout(config.keep_alive_timeout)
        .ping_policy(PingPolicy::of_min_time(MIN_KEEP_ALIVE_INTERVAL));
    if config.enable_tls {
        let tls = config.tls_config.clone().unwrap_or_default();
        builder = builder.tls(tls);
    }
    builder.build()
}

/// Keeps `members` up to date: lists the cluster's members every `auto_sync_interval`, until the
/// future is dropped.
pub(super) async fn auto_sync(
    config: Config,
    configured: Addresses,
    mut cluster: etcd_client::ClusterClient,
    members: watch::Sender<Addresses>,
) {
    let mut ticks = interval(config.auto_sync_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut has_warned = false;
    loop {
        ticks.tick().await;
        let Some(listed) = list(&config, &mut cluster, &mut has_warned).await else {
            add_configured(&members, &configured);
            continue;
        };
        if listed.is_empty() {
            tracing::debug!("etcd lists no member with a client URL; keeping the known members");
            continue;
        }
        members.send_if_modified(|members| {
            let has_changed = *members != listed;
            if has_changed {
                tracing::info!(members = ?listed, "etcd's members have changed");
                *members = listed;
            }
            has_changed
        });
    }
}

/// The addresses of the members that etcd lists. `None` after a failure, which is logged.
async fn list(
    config: &Config,
    cluster: &mut etcd_client::ClusterClient,
    has_warned: &mut bool,
) -> Option<Addresses> {
    match timeout(config.request_timeout, cluster.member_list()).await {
        Ok(Ok(listed)) => {
            let members = listed.members().iter().map(|member| MemberInfo {
                name: member.name(),
                is_learner: member.is_learner(),
                client_urls: member.client_urls(),
            });
            return Some(usable(config, members));
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

/// Adds the configured endpoints to the members, in case every listed member is gone.
fn add_configured(members: &watch::Sender<Addresses>, configured: &Addresses) {
    members.send_if_modified(|members| {
        let before = members.len();
        members.extend(configured.iter().cloned());
        members.len() > before
    });
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

    #[test]
    fn configured_unspecified_host_is_this_machine() {
        let endpoints = [
            "0.0.0.0:1",
            "http://[::]:1",
            "[::ffff:0.0.0.0]:2",
            "0:3",
            "10.0.0.5:1",
            "etcd:1",
        ];
        let config = Config {
            endpoints: endpoints.map(str::to_owned).to_vec(),
            ..Config::default()
        };
        let addresses = configured_addresses(&config).unwrap();
        let expected = [
            "127.0.0.1:1",
            "[::1]:1",
            "127.0.0.1:2",
            "127.0.0.1:3",
            "10.0.0.5:1",
            "etcd:1",
        ];
        assert_eq!(addresses, expected.map(str::to_owned).into());
    }

    #[test]
    fn failed_list_adds_the_configured_endpoints() {
        let set = |all: &[&str]| all.iter().map(|a| (*a).to_owned()).collect::<Addresses>();
        let (members, seen) = watch::channel(set(&["listed:1"]));
        add_configured(&members, &set(&["configured:1"]));
        assert_eq!(*seen.borrow(), set(&["configured:1", "listed:1"]));
    }
}
