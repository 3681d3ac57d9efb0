//! The members of the cluster as the endpoints of a channel.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::Status;

use crate::balance::{BalancedChannel, PingPolicy, ServedBy, Source};
use crate::config::{Config, MIN_KEEP_ALIVE_INTERVAL, endpoint_address};
use crate::error::Result;
use crate::instance::{Instance, parse_ip};

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
pub(in crate::client) type Addresses = BTreeSet<String>;

/// The addresses of the configured endpoints.
pub(super) fn configured_addresses(config: &Config) -> Result<Addresses> {
    config
        .endpoints
        .iter()
        .map(|endpoint| configured_address(config, endpoint))
        .collect()
}

/// The address of a configured endpoint. An unspecified host is this machine, as for etcdctl and
/// Go: etcd's examples listen on `http://0.0.0.0:2379`, and their users configure that URL.
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

/// The part of an error message that describes a learner.
pub(in crate::client) fn describe_learner(address: &str) -> String {
    format!("{address}: a learner, which takes no calls until it is promoted")
}

/// The error of a call that a learner refused with this message, when there is no other member.
pub(in crate::client) fn refusal_of(learner: Option<&ServedBy>, message: &str) -> Status {
    Status::unavailable(match learner.map(ServedBy::address) {
        Some(address) => format!("{address}: {message}"),
        None => message.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
