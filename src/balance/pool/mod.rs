//! The set of endpoints, and the picker made from the ready ones.
//!
//! One task owns the [`Pool`]. The task applies the source's snapshots, and publishes a new picker
//! through the [`View`] whenever an endpoint becomes ready or is lost. Calls do not wait for this
//! task, because they read the picker that was published last. Calls that find no stream stand in a
//! queue, which a second task serves.
//!
//! - A [`Member`] is an instance with its endpoint. When the instance's address changes, the new
//!   endpoint connects while the old one still serves.
//! - A [`Supervisor`](supervisor::Supervisor) keeps an [`Endpoint`] connected, with a task for each
//!   connection.
//! - The [`Demand`](demand::Demand) gives waiting calls attempts to connect during a backoff.
//! - The [`MassDeletionGuard`] keeps endpoints whose instances disappeared together with most
//!   others.

mod connect_plan;
mod demand;
mod endpoint;
mod mass_deletion;
mod member;
mod reconnect;
mod supervisor;
#[cfg(test)]
mod tests;
mod view;
mod wait_queue;
mod waiting;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::connection::Connect;
use super::pick::{BalancePolicy, Cursor, Picker};
use super::source::Source;
use crate::instance::Instance;
use crate::snapshot::{Change, InstanceKey, Instances, Snapshot, diff};
use crate::telemetry;
use crate::time::sleep_until;

pub(super) use connect_plan::ConnectPlan;
pub(super) use endpoint::{Endpoint, ReadyEndpoint};
pub use endpoint::{EndpointState, EndpointStatus};
pub(super) use mass_deletion::{
    DEFAULT_KEEP_FOR, DEFAULT_WINDOW, MassDeletionGuard, window_for_ttl,
};
use member::{Member, Vanished};
use supervisor::{Spawner, Supervisor};
pub(super) use view::{PoolStatus, View};
pub(super) use waiting::WaitingCall;

/// From how many members on publications are at least [`PAUSE_PER_ENDPOINT`] per member apart.
/// Timers tick in milliseconds, so a shorter pause would take longer than it says.
const LARGE_SET: usize = 1_000;

/// The pause after the publication of a large set, per member. A publication takes less than that,
/// so all of them together take less than half of one core.
const PAUSE_PER_ENDPOINT: Duration = Duration::from_micros(1);

/// Members whose instances a snapshot has removed, by address.
type Removed = BTreeMap<Arc<str>, (InstanceKey, Member)>;

/// Keeps a [`View`] current.
pub(crate) struct Pool<C> {
    view: Arc<View>,
    spawner: Spawner<C>,
    policy: BalancePolicy,
    cursor: Cursor,
    snapshot: Option<Arc<Snapshot>>,
    /// The instances of `snapshot`.
    instances: Arc<Instances>,
    members: BTreeMap<InstanceKey, Member>,
    guard: MassDeletionGuard<InstanceKey, Vanished>,
    /// How many retained members the metrics were last told of.
    reported_retained: usize,
    /// Why instances cannot be called.
    unusable: BTreeMap<InstanceKey, String>,
    /// Why the set does not change any more, after the source has panicked.
    source_error: Option<String>,
    /// Endpoints to close after the next publication.
    closing: Vec<Supervisor>,
}

impl<C: Connect> Pool<C> {
    pub(crate) fn new(
        view: Arc<View>,
        connector: Arc<C>,
        plan: ConnectPlan,
        policy: BalancePolicy,
        guard: MassDeletionGuard<InstanceKey, Vanished>,
    ) -> Self {
        let spawner = Spawner {
            connector,
            plan,
            changed: Arc::new(Notify::new()),
            capacity: view.capacity(),
            demand: Arc::clone(&view.demand),
        };
        Self {
            view,
            spawner,
            policy,
            cursor: Cursor::default(),
            snapshot: None,
            instances: Arc::default(),
            members: BTreeMap::new(),
            guard,
            reported_retained: 0,
            unusable: BTreeMap::new(),
            source_error: None,
            closing: Vec::new(),
        }
    }

    /// Runs until it is dropped. The connections then close, each after its last call. If the
    /// source's stream ends, the last set stays.
    pub(crate) async fn run(mut self, source: Source) {
        let serving = Arc::clone(&self.view);
        let serving = tokio::spawn(async move { serving.serve_waiting_calls().await });
        let _serving = AbortOnDropHandle::new(serving);
        let mut snapshots = source.into_stream().fuse();
        loop {
            let wake_at = [self.next_replacement_at(), self.guard.next_release_at()];
            let wake_at = wake_at.into_iter().flatten().min();
            tokio::select! {
                Some(next) = snapshots.next() => match next {
                    Ok(snapshot) => self.apply(snapshot),
                    Err(panic) => self.keep_last_set(&panic),
                },
                () = self.spawner.changed.notified() => {}
                () = sleep_until(wake_at) => {}
            }
            self.promote_replacements();
            self.release_retained();
            self.publish();
            self.report_retained();
            // Dropped only after the new picker is published, so that no call can pick a closing
            // endpoint.
            self.closing.clear();
            self.pause().await;
        }
    }

    /// Lets other tasks run after a publication, and merges the changes until the next one.
    ///
    /// A publication looks at every endpoint. Without a pause, endpoints whose state changes all
    /// the time would keep this task running for ever, so that it could not be dropped, and a large
    /// set whose endpoints connect one after the other would cost quadratic time.
    async fn pause(&self) {
        if self.members.len() < LARGE_SET {
            tokio::task::yield_now().await;
        } else {
            let members = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
            tokio::time::sleep(PAUSE_PER_ENDPOINT.saturating_mul(members)).await;
        }
    }

    /// Continues with the last set after a panic of the source.
    fn keep_last_set(&mut self, panic: &str) {
        let service = &*self.view.status().range;
        tracing::error!(
            service,
            panic,
            "the source of a channel panicked; the channel keeps the last set"
        );
        self.source_error = Some(format!(
            "the source panicked: {panic}; its last set is kept"
        ));
    }

    /// Adds, changes and removes members until they match a snapshot.
    fn apply(&mut self, snapshot: Arc<Snapshot>) {
        let changes = diff(&self.instances, &snapshot.instances);
        let mut removed = self.take_removed(&changes);
        for change in changes {
            if let Change::Upsert(key, instance) = change {
                self.readopt(&key, &instance, &mut removed);
                self.set(key, &instance);
            }
        }
        for (key, member) in removed.into_values() {
            self.remove(key, member);
        }
        self.apply_guard();
        self.instances = Arc::clone(&snapshot.instances);
        self.snapshot = Some(snapshot);
    }

    /// Takes the members out whose instances are gone. Sorted by address, because an instance that
    /// comes back under another id is the same endpoint and keeps its connections.
    fn take_removed(&mut self, changes: &[Change]) -> Removed {
        let mut removed = Removed::new();
        for change in changes {
            let Change::Remove(key) = change else {
                continue;
            };
            self.unusable.remove(key);
            if let Some(member) = self.members.remove(key) {
                let address = Arc::clone(&member.current().endpoint.target.address);
                if let Some((_, other)) = removed.insert(address, (key.clone(), member)) {
                    self.close(other);
                }
            }
        }
        removed
    }

    /// If an instance is new, gives it the endpoint that already has its address, from the members
    /// that this snapshot removed or from the guard.
    fn readopt(&mut self, key: &InstanceKey, instance: &Instance, removed: &mut Removed) {
        if self.members.contains_key(key) {
            return;
        }
        let address = instance.address.as_str();
        let member = removed.remove(address).map(|(_, member)| member);
        let member = member.or_else(|| {
            let vanished = self
                .guard
                .reclaim(|_, vanished| vanished.member.has_address(address));
            vanished.map(|vanished| vanished.member)
        });
        // The instance has moved, so its old endpoint is closed. A retained endpoint stays, because
        // its server may still run.
        let old = self
            .guard
            .reclaim(|of, vanished| of == key && !vanished.member.current().endpoint.is_retained());
        if let Some(old) = old {
            self.close(old.member);
        }
        if let Some(member) = member {
            member.current().endpoint.set_retained(false);
            self.members.insert(key.clone(), member);
        }
    }

    /// Adds an instance, or applies its changes.
    fn set(&mut self, key: InstanceKey, instance: &Instance) {
        let target = match self.spawner.target(instance) {
            Ok(target) => target,
            Err(error) => {
                tracing::warn!(%key, %error, "an instance cannot be called and is left out");
                if let Some(member) = self.members.remove(&key) {
                    self.close(member);
                }
                self.unusable.insert(key, error);
                return;
            }
        };
        self.unusable.remove(&key);
        match self.members.get_mut(&key) {
            Some(member) => member.update(target, instance, &self.spawner),
            None => {
                let supervisor = self.spawner.spawn(target, instance);
                self.members.insert(key, Member::new(supervisor));
            }
        }
    }

    /// Hands the member of an instance that is gone to the guard, or closes it: the instance was
    /// draining, or the guard does not want it.
    fn remove(&mut self, key: InstanceKey, member: Member) {
        // `self.instances` is still the set before.
        let Some(instance) = self.instances.get(&key).filter(|i| i.is_eligible()) else {
            return self.close(member);
        };
        let instance = Arc::clone(instance);
        member.current().endpoint.stop_new_calls();
        let is_connected = !member.is_lost();
        let vanished = Vanished { member, instance };
        let refused = self
            .guard
            .on_vanished(key, vanished, is_connected, Instant::now());
        if let Some(vanished) = refused {
            self.close(vanished.member);
        }
    }

    /// Puts the members that vanished in a mass deletion back into service.
    fn apply_guard(&mut self) {
        let remaining = self.members.len();
        // Leases that expire together are deleted in several transactions, and seen in as many
        // snapshots.
        let is_first = self.guard.retained_members().next().is_none();
        let (vanished, retained) = self.guard.evaluate(remaining, Instant::now());
        if retained.is_empty() {
            return;
        }
        for Vanished { member, instance } in &retained {
            member.current().endpoint.update(instance);
            member.current().endpoint.set_retained(true);
        }
        let service = &*self.view.status().range;
        let retained_count = retained.len();
        if is_first {
            telemetry::count_mass_deletion(service);
            tracing::warn!(
                service,
                vanished,
                remaining,
                retained = retained_count,
                "more than half of the instances disappeared at once; keeping those still connected"
            );
        } else {
            tracing::debug!(
                service,
                vanished,
                remaining,
                retained = retained_count,
                "more instances of a mass deletion disappeared; keeping those still connected"
            );
        }
    }

    fn next_replacement_at(&self) -> Option<Instant> {
        let members = self.members.values();
        members.filter_map(Member::replacement_deadline).min()
    }

    fn promote_replacements(&mut self) {
        let now = Instant::now();
        let members = self.members.values_mut();
        self.closing
            .extend(members.filter_map(|member| member.promote_replacement(now)));
    }

    /// Gives up retained members that lost their connection or whose time is over.
    fn release_retained(&mut self) {
        let is_connected = |vanished: &Vanished| !vanished.member.is_lost();
        for vanished in self.guard.release(is_connected, Instant::now()) {
            self.close(vanished.member);
        }
    }

    fn close(&mut self, member: Member) {
        self.closing.extend(member.into_supervisors());
    }

    fn publish(&self) {
        let retained = self
            .guard
            .retained_members()
            .map(|vanished| &vanished.member);
        let members = self.members.values().chain(retained);
        let candidates: Vec<ReadyEndpoint> = members
            .clone()
            .filter_map(|member| member.current().endpoint.as_ready())
            .collect();
        let endpoints: Vec<Arc<Endpoint>> = members
            .flat_map(Member::supervisors)
            .map(|supervisor| Arc::clone(&supervisor.endpoint))
            .collect();
        let is_failing = candidates.is_empty()
            && (self.snapshot.is_some() || self.source_error.is_some())
            && endpoints.iter().all(|endpoint| endpoint.is_failing());
        let status = PoolStatus {
            range: match &self.snapshot {
                Some(snapshot) => Arc::clone(&snapshot.range),
                None => Arc::clone(&self.view.status().range),
            },
            endpoints,
            ready: candidates.len(),
            is_failing,
            unusable: self.unusable.values().cloned().collect(),
            freshness: self.snapshot.as_ref().map(|s| s.freshness.clone()),
            source_error: self.source_error.clone(),
            ended: None,
        };
        let picker = Picker::new(self.policy, candidates, &self.cursor);
        self.view.publish(picker, status);
    }

    fn report_retained(&mut self) {
        let retained = self.guard.retained_members().count();
        if retained != self.reported_retained {
            let service = &self.view.status().range;
            telemetry::report_retained_endpoints(service, self.reported_retained, retained);
            self.reported_retained = retained;
        }
    }
}

impl<C> Drop for Pool<C> {
    fn drop(&mut self) {
        self.view.end();
        if self.reported_retained > 0 {
            let service = &self.view.status().range;
            telemetry::report_retained_endpoints(service, self.reported_retained, 0);
        }
    }
}
