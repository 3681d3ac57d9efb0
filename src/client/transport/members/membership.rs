//! The members that a client calls, shared by its calls and kept current by a task.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, select_all};
use futures::stream::{BoxStream, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use super::channel::{self, Addresses, configured_addresses, describe_learner};
use super::probe::probe;
use super::set::{List, MemberSet};
use crate::backoff::Backoff;
use crate::balance::{BalancedChannel, EndpointState, EndpointStatus, ServedBy};
use crate::config::Config;
use crate::error::Result;

/// The pauses before a call that a learner refused is sent again.
pub(in crate::client) struct RefusalPauses {
    /// While another member may be called: short, until the learner is left out.
    before_others: Backoff,
    /// While all members are learners, until one is promoted.
    before_learners: Backoff,
}

impl RefusalPauses {
    pub(in crate::client) fn new() -> Self {
        let [min, max] = [1, 250].map(Duration::from_millis);
        Self {
            before_others: Backoff::with_jitter(min, max, 0.5..1.0),
            before_learners: Backoff::for_etcd(),
        }
    }

    pub(in crate::client) fn next(&mut self, membership: &Membership) -> Duration {
        match membership.set.lock().has_only_learners() {
            true => self.before_learners.next(),
            false => self.before_others.next(),
        }
    }
}

/// The members that a client calls.
#[derive(Debug)]
pub(in crate::client) struct Membership {
    set: Mutex<MemberSet>,
    called: watch::Sender<Addresses>,
    /// Notified whenever the addresses to probe may have changed.
    changed: Notify,
}

impl Membership {
    fn new(configured: Addresses) -> Self {
        Self {
            called: watch::Sender::new(configured.clone()),
            set: Mutex::new(MemberSet::new(configured)),
            changed: Notify::new(),
        }
    }

    /// The addresses to call, and their changes.
    fn called(&self) -> watch::Receiver<Addresses> {
        self.called.subscribe()
    }

    /// Records that etcd has listed its voting members.
    pub(super) fn record_list(&self, list: List) {
        self.update(|set| set.on_list(list));
    }

    /// Records that no list could be fetched.
    pub(super) fn record_list_failure(&self) {
        self.update(MemberSet::on_list_failure);
    }

    /// Records that a member refused a call because it is a learner.
    pub(in crate::client) fn record_refusal(&self, member: Option<&ServedBy>) {
        let Some(address) = member.map(ServedBy::address) else {
            return;
        };
        self.update(|set| {
            if set.on_refusal(address) {
                tracing::info!(address, "a learner refused a call; it is left out for now");
            }
        });
    }

    /// Changes the set, and publishes the addresses to call if they have changed.
    fn update(&self, change: impl FnOnce(&mut MemberSet)) {
        let mut set = self.set.lock();
        change(&mut set);
        let now = set.called();
        // Under the lock, so that the latest set is published last.
        self.called.send_if_modified(|called| {
            let has_changed = *called != now;
            if has_changed {
                tracing::info!(members = ?now, "etcd's members have changed");
                *called = now;
            }
            has_changed
        });
        drop(set);
        self.changed.notify_one();
    }

    /// The members that are learners as far as is known.
    pub(in crate::client) fn learners(&self) -> Addresses {
        self.set.lock().learners().clone()
    }

    /// Adds the learners, which get no calls, to the error of a call that found no member.
    pub(in crate::client) fn name_learners(&self, status: Status) -> Status {
        let set = self.set.lock();
        if status.code() != Code::Unavailable || set.learners().is_empty() {
            return status;
        }
        let learners = set.learners().iter();
        let learners: String = learners
            .map(|a| format!("; {}", describe_learner(a)))
            .collect();
        Status::unavailable(format!("{}{learners}", status.message()))
    }

    /// Probes the members that may not be called yet, and follows the states of the connections
    /// (with `auto_sync`), until the future is dropped.
    async fn follow(
        self: &Arc<Self>,
        config: &Config,
        mut statuses: BoxStream<'static, Vec<EndpointStatus>>,
    ) {
        let mut probes = HashMap::new();
        loop {
            self.start_probes(config, &mut probes);
            tokio::select! {
                () = self.changed.notified() => {}
                Some(endpoints) = statuses.next() => {
                    self.update(|set| set.on_connected(connected(endpoints)));
                }
                address = first_success(&mut probes) => {
                    probes.remove(&address);
                    tracing::debug!(address, "a probe found that a member takes calls");
                    self.update(|set| set.on_probe_success(&address));
                }
            }
        }
    }

    fn start_probes(
        self: &Arc<Self>,
        config: &Config,
        probes: &mut HashMap<String, BoxFuture<'static, String>>,
    ) {
        let probed = self.set.lock().probed();
        probes.retain(|address, _| probed.contains(address));
        for address in probed {
            let (config, membership) = (config.clone(), Arc::clone(self));
            probes.entry(address.clone()).or_insert_with(|| {
                Box::pin(async move {
                    // The cluster's id may have changed since the start of the probe.
                    let accepts = |id| membership.set.lock().accepts(&address, id);
                    probe(&config, &address, accepts).await;
                    address
                })
            });
        }
    }
}

/// The channel to the members, and the task that keeps the members current.
pub(in crate::client) struct FollowedMembers {
    pub(in crate::client) channel: BalancedChannel,
    pub(in crate::client) membership: Arc<Membership>,
    pub(in crate::client) task: AbortOnDropHandle<()>,
}

impl FollowedMembers {
    pub(in crate::client) fn start(config: &Config, closed: &CancellationToken) -> Result<Self> {
        let configured = configured_addresses(config)?;
        let membership = Arc::new(Membership::new(configured));
        let channel = channel::channel(config, membership.called())?;
        // The states of the connections matter only for lists. This stream does not keep the
        // channel open.
        let statuses = match config.auto_sync {
            true => channel.endpoint_statuses().boxed(),
            false => futures::stream::pending().boxed(),
        };
        let (config, closed, followed) = (config.clone(), closed.clone(), Arc::clone(&membership));
        let task = tokio::spawn(async move {
            let following = followed.follow(&config, statuses);
            closed.run_until_cancelled(following).await;
        });
        Ok(Self {
            channel,
            membership,
            task: AbortOnDropHandle::new(task),
        })
    }
}

fn connected(endpoints: Vec<EndpointStatus>) -> Addresses {
    let connected = endpoints
        .into_iter()
        .filter(|member| member.state == EndpointState::Ready);
    connected.map(|member| member.address).collect()
}

/// The address of the next probe that succeeds.
async fn first_success(probes: &mut HashMap<String, BoxFuture<'static, String>>) -> String {
    if probes.is_empty() {
        return std::future::pending().await;
    }
    select_all(probes.values_mut()).await.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_long_while_all_members_are_learners() {
        let membership = Membership::new(["a", "b"].map(str::to_owned).into());
        let mut pauses = RefusalPauses::new();
        let refuse = |address| membership.update(|set| assert!(set.on_refusal(address)));
        refuse("a");
        assert!(pauses.next(&membership) <= Duration::from_millis(1));
        refuse("b");
        assert!(pauses.next(&membership) >= Duration::from_millis(25));
    }
}
