//! The members of the cluster as the endpoints of a channel, and keeping them up to date.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::stream::unfold;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::balance::BalancedChannel;
use crate::balance::Source;
use crate::config::endpoint_uri;
use crate::config::{Config, TlsConfig};
use crate::error::{Error, Result};
use crate::instance::Instance;

/// The longest wait between attempts to connect to a member: what was lost is to be back within two
/// seconds of etcd's return (G8), for all that wait for it. The fewer there are, the sooner: about 20
/// attempts a second in all, on loopback or in a rack, are nothing to either side.
fn max_backoff(members: usize) -> Duration {
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    Duration::from_millis(50)
        .saturating_mul(members)
        .clamp(Duration::from_millis(250), Duration::from_secs(1))
}

/// The addresses of members, `host:port`.
pub(super) type Addresses = BTreeSet<String>;

/// The configured endpoints.
pub(super) fn configured(config: &Config) -> Result<Addresses> {
    config
        .endpoints
        .iter()
        .map(|endpoint| address(config, endpoint))
        .collect()
}

fn address(config: &Config, endpoint: &str) -> Result<String> {
    let uri = endpoint_uri(endpoint, config.enable_tls)?;
    Ok(uri
        .authority()
        .map_or_else(String::new, ToString::to_string))
}

/// A channel to these members, and to others when they are sent.
pub(super) fn channel(
    config: &Config,
    members: watch::Receiver<Addresses>,
) -> Result<BalancedChannel> {
    let sets = unfold((members, true), |(mut members, first)| async move {
        if !first {
            members.changed().await.ok()?;
        }
        let set = members.borrow_and_update().iter().map(instance).collect();
        Some((set, (members, false)))
    });
    build(config, Source::new("the etcd endpoints", sets))
}

/// A channel to this one member.
pub(in crate::client) fn only(config: &Config, endpoint: &str) -> Result<BalancedChannel> {
    let member = instance(&address(config, endpoint)?);
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
        // Long enough for a member to restart; and whoever waits for the call has time left to be told
        // why it failed.
        .ready_timeout(config.request_timeout / 2)
        .http2_keep_alive_interval(Some(config.keep_alive_interval))
        .keep_alive_timeout(config.keep_alive_timeout);
    if config.enable_tls {
        let tls = config.tls_config.clone().unwrap_or_default();
        builder = builder.tls(tls);
    }
    builder
        .build()
        .map_err(|error| in_config(error, config.tls_config.as_ref()))
}

/// The channel's error with the names that the fields have in [`Config`].
fn in_config(error: Error, tls: Option<&TlsConfig>) -> Error {
    let Error::Invalid {
        field,
        value,
        reason,
    } = error
    else {
        return error;
    };
    let file = |file: Option<&std::path::PathBuf>, inline, otherwise: &str| match file {
        Some(file) => (file.display().to_string(), otherwise.to_owned()),
        None => ("[redacted]".to_owned(), String::from(inline)),
    };
    let tls = tls.cloned().unwrap_or_default();
    let (value, field) = match field {
        "tls.ca_file" => file(
            tls.ca_file.as_ref(),
            "tls_config.ca_pem",
            "tls_config.ca_file",
        ),
        "tls.cert_file" => file(
            tls.cert_file.as_ref(),
            "tls_config.cert_pem",
            "tls_config.cert_file",
        ),
        "tls.key_file" => file(
            tls.key_file.as_ref(),
            "tls_config.key_pem",
            "tls_config.key_file",
        ),
        "server_name" => (value, "tls_config.server_name".to_owned()),
        "tls" => (value, "enable_tls".to_owned()),
        other => (value, other.to_owned()),
    };
    Error::invalid(known(&field), value, reason)
}

fn known(field: &str) -> &'static str {
    const FIELDS: [&str; 8] = [
        "tls_config.ca_file",
        "tls_config.ca_pem",
        "tls_config.cert_file",
        "tls_config.cert_pem",
        "tls_config.key_file",
        "tls_config.key_pem",
        "tls_config.server_name",
        "enable_tls",
    ];
    FIELDS
        .into_iter()
        .find(|known| *known == field)
        .unwrap_or("endpoints")
}

/// Asks the cluster for its members, over and over, and sends them on. Runs until it is dropped.
pub(super) async fn keep_up_to_date(
    config: Config,
    configured: Addresses,
    mut cluster: etcd_client::ClusterClient,
    members: watch::Sender<Addresses>,
) {
    let mut ticks = interval(config.auto_sync_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut refused = false;
    loop {
        ticks.tick().await;
        let listed = match timeout(config.request_timeout, cluster.member_list()).await {
            Ok(Ok(listed)) => listed,
            Ok(Err(error)) if is_refusal(&error) => {
                // Said once: it stays so until somebody grants it.
                if !std::mem::replace(&mut refused, true) {
                    tracing::warn!(
                        user = config.username,
                        "may not list etcd's members, so auto_sync does nothing; etcd allows it only \
                         to root, from 3.5.28 and 3.6.9 on"
                    );
                }
                also(&members, &configured);
                continue;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot list etcd's members");
                also(&members, &configured);
                continue;
            }
            Err(_) => {
                tracing::warn!(after = ?config.request_timeout, "etcd does not list its members");
                also(&members, &configured);
                continue;
            }
        };
        let listed = listed.members().iter().map(|member| Listed {
            name: member.name(),
            is_learner: member.is_learner(),
            client_urls: member.client_urls(),
        });
        let usable = usable(&config, listed);
        if usable.is_empty() {
            tracing::debug!("etcd lists no member with a client URL; its members stay as they are");
            continue;
        }
        members.send_if_modified(|members| {
            let changed = *members != usable;
            if changed {
                tracing::info!(members = ?usable, "etcd's members have changed");
                *members = usable;
            }
            changed
        });
    }
}

fn is_refusal(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if status.code() == tonic::Code::PermissionDenied)
}

/// What was listed may all be gone; the configured endpoints are where to begin anew.
fn also(members: &watch::Sender<Addresses>, configured: &Addresses) {
    members.send_if_modified(|members| {
        let before = members.len();
        members.extend(configured.iter().cloned());
        members.len() > before
    });
}

/// A member as the cluster lists it.
struct Listed<'a> {
    name: &'a str,
    is_learner: bool,
    client_urls: &'a [String],
}

/// The members that take calls. A learner does not; one without a name has not started yet.
fn usable<'a>(config: &Config, listed: impl Iterator<Item = Listed<'a>>) -> Addresses {
    listed
        .filter(|member| !member.is_learner && !member.name.is_empty())
        .flat_map(|member| member.client_urls)
        // One whose scheme is not the configured one is never connected to the other way.
        .filter_map(|url| match address(config, url) {
            Ok(address) => Some(address),
            Err(error) => {
                tracing::warn!(%error, "a member's client URL is left out");
                None
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(config: &Config, listed: &[(&str, bool, &[&str])]) -> Vec<String> {
        let urls: Vec<Vec<String>> = listed
            .iter()
            .map(|(_, _, urls)| urls.iter().map(|url| (*url).to_owned()).collect())
            .collect();
        let listed = listed.iter().zip(&urls).map(|(member, urls)| Listed {
            name: member.0,
            is_learner: member.1,
            client_urls: urls,
        });
        usable(config, listed).into_iter().collect()
    }

    #[test]
    fn learners_members_without_a_name_and_foreign_schemes_are_left_out() {
        let listed: &[(&str, bool, &[&str])] = &[
            ("a", false, &["http://a:2379", "http://a2:2379/"]),
            ("learner", true, &["http://b:2379"]),
            ("", false, &["http://c:2379"]),
            ("none", false, &[]),
            ("secure", false, &["https://d:2379", "unix://e"]),
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
    fn when_the_list_cannot_be_had_the_configured_endpoints_are_tried_as_well() {
        let set = |all: &[&str]| all.iter().map(|a| (*a).to_owned()).collect::<Addresses>();
        let (members, seen) = watch::channel(set(&["listed:1"]));
        also(&members, &set(&["configured:1"]));
        assert_eq!(*seen.borrow(), set(&["configured:1", "listed:1"]));
    }
}
