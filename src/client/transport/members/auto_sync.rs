//! The lists of the cluster's members that etcd sends.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::{MissedTickBehavior, interval, timeout};

use super::channel::{Addresses, configured_addresses};
use super::membership::Membership;
use super::set::List;
use crate::client::etcd_error::EtcdError;
use crate::config::{Config, endpoint_address};
use crate::error::{Error, Result};
use crate::instance::{parse_ip, uncallable_reason};

/// Lists the cluster's members every `auto_sync_interval`, until the future is dropped.
pub(in crate::client) async fn auto_sync(
    config: Config,
    mut cluster: etcd_client::ClusterClient,
    membership: Arc<Membership>,
) {
    let mut ticks = interval(config.auto_sync_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut warned = Warned::default();
    loop {
        ticks.tick().await;
        match list(&config, &mut cluster, &mut warned).await {
            None => membership.record_list_failure(),
            Some(list) if list.addresses.is_empty() => {
                tracing::debug!("etcd lists no member with a client URL; keeping the known members")
            }
            Some(list) => membership.record_list(list),
        }
    }
}

/// The warnings that are not repeated with each list.
#[derive(Default)]
struct Warned {
    of_refusal: bool,
    /// The client URLs of the latest list that are left out.
    of_urls: BTreeSet<String>,
}

/// Fetches the list of members. `None` after a failure, which is logged.
async fn list(
    config: &Config,
    cluster: &mut etcd_client::ClusterClient,
    warned: &mut Warned,
) -> Option<List> {
    match timeout(config.request_timeout, cluster.member_list()).await {
        Ok(Ok(listed)) => {
            let members = listed.members().iter().map(|member| MemberInfo {
                name: member.name(),
                is_learner: member.is_learner(),
                client_urls: member.client_urls(),
            });
            let usable = usable(config, members);
            usable.warn(&mut warned.of_urls);
            return Some(List {
                addresses: usable.addresses,
                has_all: usable.has_all,
                cluster_id: listed.header().map(etcd_client::ResponseHeader::cluster_id),
            });
        }
        Ok(Err(error)) if EtcdError::of_client(&error) == EtcdError::PermissionDenied => {
            // Logged once, because the refusal lasts until an operator grants the permission.
            if !std::mem::replace(&mut warned.of_refusal, true) {
                tracing::warn!(
                    user = config.username,
                    "may not list etcd's members, so auto_sync does nothing; some releases of etcd \
                     (3.6.9 is one) list them only to root"
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

/// The listed members that take calls.
struct Usable {
    addresses: Addresses,
    /// Whether each of these members has an address here.
    has_all: bool,
    /// The client URLs that are left out, with the reasons.
    left_out: Vec<(String, Error)>,
}

impl Usable {
    /// Warns of the URLs that are left out, unless the list before had them too.
    fn warn(&self, warned: &mut BTreeSet<String>) {
        for (url, error) in &self.left_out {
            if !warned.contains(url) {
                tracing::warn!(%error, "a member's client URL is left out");
            }
        }
        *warned = self.left_out.iter().map(|(url, _)| url.clone()).collect();
    }
}

/// The members that take calls. A learner takes none, and a member without a name has not started
/// yet.
fn usable<'a>(config: &Config, members: impl Iterator<Item = MemberInfo<'a>>) -> Usable {
    let configured = configured_addresses(config).unwrap_or_default();
    let is_on_loopback = configured.iter().any(|address| is_loopback(address));
    let mut usable = Usable {
        addresses: Addresses::new(),
        has_all: true,
        left_out: Vec::new(),
    };
    for member in members.filter(|member| !member.is_learner && !member.name.is_empty()) {
        let mut has_address = false;
        for url in member.client_urls {
            match client_address(config, url, is_on_loopback) {
                Ok(address) => {
                    has_address = true;
                    usable.addresses.insert(address);
                }
                Err(error) => usable.left_out.push((url.clone(), error)),
            }
        }
        usable.has_all &= has_address;
    }
    usable
}

/// The address of a member's client URL.
///
/// A URL of the other scheme is refused, so that a member cannot turn TLS on or off. `0.0.0.0` and
/// loopback addresses are refused, because each client would call its own machine. Loopback is
/// allowed if the client is configured with it, because the members then run on that machine.
fn client_address(config: &Config, url: &str, is_on_loopback: bool) -> Result<String> {
    let address = endpoint_address(url, config.enable_tls)?;
    let reason = match uncallable_reason(address) {
        None if !is_on_loopback && is_loopback(address) => {
            Some("a loopback address is another machine here; correct --advertise-client-urls")
        }
        reason => reason,
    };
    match reason {
        Some(reason) => Err(Error::invalid("client URL", address, reason)),
        None => Ok(address.to_owned()),
    }
}

fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    match parse_ip(host) {
        Some(ip) => ip.to_canonical().is_loopback(),
        None => {
            let host = host.trim_end_matches('.').to_ascii_lowercase();
            host == "localhost" || host.ends_with(".localhost")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable_of(config: &Config, listed: &[(&str, bool, &[&str])]) -> Usable {
        let urls: Vec<Vec<String>> = listed
            .iter()
            .map(|(_, _, urls)| urls.iter().map(|url| (*url).to_owned()).collect())
            .collect();
        let listed = listed.iter().zip(&urls).map(|(member, urls)| MemberInfo {
            name: member.0,
            is_learner: member.1,
            client_urls: urls,
        });
        usable(config, listed)
    }

    fn addresses(config: &Config, listed: &[(&str, bool, &[&str])]) -> Vec<String> {
        usable_of(config, listed).addresses.into_iter().collect()
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
    fn voting_member_without_usable_url_is_missed() {
        let config = Config::default();
        let has_all = |url: &str, name: &str, is_learner: bool| {
            let a: (&str, bool, &[&str]) = ("a", false, &["http://a:2379"]);
            usable_of(&config, &[a, (name, is_learner, &[url])]).has_all
        };
        for url in [
            "http://0.0.0.0:2379",
            "http://[::]:2379",
            "https://b:2379",
            "unix://b",
            "http://b:0",
        ] {
            assert!(!has_all(url, "b", false), "{url}");
            assert!(has_all(url, "b", true), "{url}");
            assert!(has_all(url, "", false), "{url}");
        }
        assert!(has_all("http://b:2379", "b", false));
        let urls: &[&str] = &["http://0.0.0.0:2379", "http://b:2379"];
        assert!(usable_of(&config, &[("b", false, urls)]).has_all);
        assert!(!usable_of(&config, &[("b", false, &[])]).has_all);
    }

    /// etcd's default `--advertise-client-urls` is `http://localhost:2379`.
    #[test]
    fn loopback_is_used_only_if_configured() {
        let loopback: &[&str] = &[
            "http://localhost:2379",
            "http://LocalHost.:1",
            "http://a.localhost:1",
            "http://127.0.0.1:2379",
            "http://127.9.9.9:1",
            "http://[::1]:2379",
            "http://[::ffff:127.0.0.1]:1",
        ];
        let usable_from = |endpoint: &str, url: &str| {
            let config = Config {
                endpoints: vec!["10.0.0.5:2379".to_owned(), endpoint.to_owned()],
                ..Config::default()
            };
            let usable = usable_of(&config, &[("a", false, &[url])]);
            (usable.addresses.len(), usable.has_all)
        };
        for &url in loopback {
            assert_eq!(usable_from("etcd:2379", url), (0, false), "{url}");
            assert_eq!(usable_from("localhost:1", url), (1, true), "{url}");
            assert_eq!(usable_from(url, url), (1, true), "{url}");
            assert_eq!(usable_from("0.0.0.0:1", url), (1, true), "{url}");
        }
        assert_eq!(usable_from("etcd:2379", "http://10.0.0.6:1"), (1, true));
        assert_eq!(
            usable_from("etcd:2379", "http://localhost.org:1"),
            (1, true)
        );
    }

    #[test]
    fn url_is_warned_of_once_while_it_is_listed() {
        let config = Config::default();
        let bad = usable_of(&config, &[("a", false, &["http://0.0.0.0:1"])]);
        let mut warned = BTreeSet::new();
        bad.warn(&mut warned);
        assert_eq!(warned, ["http://0.0.0.0:1".to_owned()].into());
        usable_of(&config, &[("a", false, &["http://a:1"])]).warn(&mut warned);
        assert!(warned.is_empty());
    }
}
