//! The set of endpoints, kept as the snapshots say, and the picker that is made from it.
//!
//! One task applies snapshots and makes a new picker when an endpoint becomes ready or is lost. It is
//! on no call's way: calls read the picker that is there.

mod endpoint;
mod mass_deletion;
mod member;
mod supervisor;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::connection::{Connector, Target};
use super::pick::{BalancePolicy, Cursor, Picker};
use super::source::Source;
use crate::instance::Instance;
use crate::snapshot::{Change, InstanceKey, Instances, Snapshot, diff};
use crate::telemetry;
use crate::time::sleep_until;

pub(super) use endpoint::{Endpoint, ReadyEndpoint};
pub use endpoint::{EndpointState, EndpointStatus};
pub(super) use mass_deletion::{DEFAULT_KEEP_FOR, DEFAULT_WINDOW, MassDeletionGuard, window};
use member::{Member, Next};
pub(super) use supervisor::ConnectPlan;
use supervisor::Supervised;
use view::Known;
pub(super) use view::View;

/// Keeps a [`View`] current.
pub(crate) struct Pool {
    view: Arc<View>,
    connector: Arc<Connector>,
    plan: ConnectPlan,
    policy: BalancePolicy,
    cursor: Cursor,
    changed: Arc<Notify>,
    shown: Instances,
    members: BTreeMap<InstanceKey, Member>,
    /// What has vanished with most of the others.
    guard: MassDeletionGuard<InstanceKey, (Member, Arc<Instance>)>,
    /// How many of those are in use, as last told.
    kept: usize,
    unusable: BTreeMap<InstanceKey, String>,
    snapshot: Option<Arc<Snapshot>>,
}

impl Pool {
    pub(crate) fn new(
        view: Arc<View>,
        connector: Arc<Connector>,
        plan: ConnectPlan,
        policy: BalancePolicy,
        guard: MassDeletionGuard<InstanceKey, (Member, Arc<Instance>)>,
    ) -> Self {
        Self {
            view,
            connector,
            plan,
            policy,
            cursor: Cursor::default(),
            changed: Arc::new(Notify::new()),
            shown: Instances::new(),
            members: BTreeMap::new(),
            guard,
            kept: 0,
            unusable: BTreeMap::new(),
            snapshot: None,
        }
    }

    /// Runs until it is dropped; with it go the connections, once the calls on them have ended.
    pub(crate) async fn run(mut self, source: Source) {
        let mut snapshots = source.into_stream().fuse();
        loop {
            let wake_at = [self.switch_at(), self.guard.ends_at()];
            let wake_at = wake_at.into_iter().flatten().min();
            let mut gone = Vec::new();
            tokio::select! {
                // None after its end: the last set stays.
                Some(snapshot) = snapshots.next() => gone = self.apply(snapshot),
                () = self.changed.notified() => {}
                () = sleep_until(wake_at) => {}
            }
            let replaced = self.switch();
            let is_connected = |(member, _): &_| Member::is_connected(member);
            let released = self.guard.release(is_connected, Instant::now());
            self.publish();
            self.tell_kept();
            // Only now: nothing may be picked that is being taken down.
            drop((gone, replaced, released));
        }
    }

    /// Returns what is to be taken down.
    fn apply(&mut self, snapshot: Arc<Snapshot>) -> Vec<Member> {
        let changes = diff(&self.shown, &snapshot.instances);
        // Those that leave, by address: an instance that comes back under another id is the same
        // endpoint, and keeps its connections.
        let mut leaving = BTreeMap::new();
        let mut gone = Vec::new();
        for change in &changes {
            if let Change::Remove(key) = change {
                self.unusable.remove(key);
                if let Some(member) = self.members.remove(key) {
                    let address = Arc::clone(&member.current.endpoint.target.address);
                    let left = leaving.insert(address, (key.clone(), member));
                    gone.extend(left.map(|(_, member)| member));
                }
            }
        }
        for change in changes {
            if let Change::Upsert(key, instance) = change {
                if !self.members.contains_key(&key) {
                    let left = leaving.remove(instance.address.as_str());
                    let member = left.map(|(_, member)| member).or_else(|| {
                        let at = &*instance.address;
                        let held = self.guard.take(|_, (member, _)| member.is_at(at));
                        held.map(|(member, _)| member)
                    });
                    // Where it was before it is not any more, unless that is in use: nothing says so of those
                    // that vanished with most of the others.
                    let moved = self.guard.take(|of, (member, _)| {
                        *of == key && !member.current.endpoint.is_retained()
                    });
                    gone.extend(moved.map(|(member, _)| member));
                    if let Some(member) = member {
                        member.current.endpoint.set_retained(false);
                        self.members.insert(key.clone(), member);
                    }
                }
                gone.extend(self.set(key, &instance));
            }
        }
        let vanished = leaving.into_values();
        gone.extend(vanished.filter_map(|(key, member)| self.vanish(key, member)));
        self.guard_fleet();
        self.shown = Instances::clone(&snapshot.instances);
        self.snapshot = Some(snapshot);
        gone
    }

    /// Returns a member that is to go: the guard has no use for it.
    fn vanish(&mut self, key: InstanceKey, member: Member) -> Option<Member> {
        // Still that of the snapshot before.
        let Some(instance) = self.shown.get(&key).filter(|i| i.is_eligible()) else {
            // It has said that it would leave.
            return Some(member);
        };
        let instance = Arc::clone(instance);
        member.current.endpoint.retire();
        let is_connected = member.is_connected();
        let refused = self
            .guard
            .vanished(key, (member, instance), is_connected, Instant::now());
        refused.map(|(member, _)| member)
    }

    /// Has those that vanished with most of the others serve on.
    fn guard_fleet(&mut self) {
        let remaining = self.members.len();
        // Leases that end together do so in several snapshots.
        let is_new = self.guard.kept().next().is_none();
        let (together, kept) = self.guard.judge(remaining, Instant::now());
        if kept.is_empty() {
            return;
        }
        for (member, instance) in &kept {
            member.current.endpoint.update(instance);
            member.current.endpoint.set_retained(true);
        }
        let (service, kept) = (&*self.view.known.load().range, kept.len());
        if is_new {
            telemetry::count_mass_deletion(service);
            tracing::warn!(
                service,
                vanished = together,
                remaining,
                kept,
                "most instances have vanished together: those that are connected still are kept for a while"
            );
        } else {
            tracing::debug!(
                service,
                vanished = together,
                remaining,
                kept,
                "more instances have vanished with most of the others and are kept"
            );
        }
    }

    fn tell_kept(&mut self) {
        let kept = self.guard.kept().count();
        if kept != self.kept {
            telemetry::report_kept_endpoints(&self.view.known.load().range, self.kept, kept);
            self.kept = kept;
        }
    }

    /// Returns a member that cannot be used any more.
    fn set(&mut self, key: InstanceKey, instance: &Instance) -> Option<Member> {
        let target = match Target::new(instance, self.connector.tls()) {
            Ok(target) => target,
            Err(error) => {
                tracing::warn!(%key, %error, "an instance cannot be called and is left out");
                self.unusable.insert(key.clone(), error);
                return self.members.remove(&key);
            }
        };
        self.unusable.remove(&key);
        let (connector, plan) = (&self.connector, self.plan);
        let (changed, freed) = (&self.changed, &self.view.freed);
        let start = |target| Supervised::start(target, instance, connector, plan, changed, freed);
        match self.members.get_mut(&key) {
            Some(member) if member.current.endpoint.target == target => {
                member.current.endpoint.update(instance);
                member.next = None;
            }
            Some(member) => {
                // What it says of itself holds at once, whatever its address.
                member.current.endpoint.update(instance);
                match &member.next {
                    Some(next) if next.supervised.endpoint.target == target => {
                        next.supervised.endpoint.update(instance);
                    }
                    // Connected before the old one is given up.
                    _ => {
                        member.next = Some(Next {
                            supervised: start(target),
                            deadline: Instant::now() + self.connector.connect_timeout(),
                        });
                    }
                }
            }
            None => {
                let current = start(target);
                let next = None;
                self.members.insert(key, Member { current, next });
            }
        }
        None
    }

    fn switch_at(&self) -> Option<Instant> {
        let deadlines = self.members.values().filter_map(|m| m.next.as_ref());
        deadlines.map(|next| next.deadline).min()
    }

    /// Lets replacements take over: those that are connected, those whose predecessor is lost anyway, and
    /// those that could not connect in time, for the set says that the old address is not it any
    /// more. Returns what was replaced.
    fn switch(&mut self) -> Vec<Supervised> {
        let now = Instant::now();
        let mut replaced = Vec::new();
        for member in self.members.values_mut() {
            let due = member.next.take_if(|next| {
                next.supervised.endpoint.is_connected()
                    || !member.current.endpoint.is_connected()
                    || now >= next.deadline
            });
            if let Some(next) = due {
                let old = std::mem::replace(&mut member.current, next.supervised);
                replaced.push(old);
            }
        }
        replaced
    }

    fn publish(&self) {
        let kept = self.guard.kept().map(|(member, _)| member);
        let members = self.members.values().chain(kept);
        let ready: Vec<ReadyEndpoint> = members
            .clone()
            .filter_map(|member| member.current.endpoint.ready())
            .collect();
        let picker = Picker::new(self.policy, ready, &self.cursor);
        let any = !picker.is_empty();
        self.view.picker.store(Arc::new(picker));
        if any {
            self.view.ready.notify_waiters();
        }
        let endpoints = members.flat_map(|member| {
            let next = member.next.as_ref().map(|next| &next.supervised);
            [Some(&member.current), next]
                .into_iter()
                .flatten()
                .map(|supervised| Arc::clone(&supervised.endpoint))
        });
        let known = self.view.known.load();
        self.view.known.store(Arc::new(Known {
            range: match &self.snapshot {
                Some(snapshot) => Arc::clone(&snapshot.range),
                None => Arc::clone(&known.range),
            },
            endpoints: endpoints.collect(),
            unusable: self.unusable.values().cloned().collect(),
            freshness: self.snapshot.as_ref().map(|s| s.freshness.clone()),
        }));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if self.kept > 0 {
            telemetry::report_kept_endpoints(&self.view.known.load().range, self.kept, 0);
        }
    }
}
