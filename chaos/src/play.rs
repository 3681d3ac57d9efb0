//! Runs a schedule: causes the faults and undoes them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use goo_etcd::etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp};
use goo_etcd::testing::{Etcd, EtcdCluster};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::fleet::{Fleet, Paths};
use crate::observer::{Observer, PATIENCE, leadership};
use crate::record::{Clock, Disturbance, ExitKind, Extension, Scope, last_key_of};
use crate::schedule::{Damage, Fault, Name, Path, Planned, Schedule};

/// Limit for the members to agree on a leader before all of them are wiped.
const AGREE: Duration = Duration::from_secs(20);

/// A key outside of the service's prefix.
const OTHERS: &str = "others";

/// The leader has received everything from a killed follower after this time.
const LAST_WORDS: Duration = Duration::from_millis(100);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The cluster, servers, paths and observer that faults act on.
pub struct Testbed {
    pub clock: Clock,
    pub cluster: EtcdCluster,
    pub paths: Paths,
    pub fleet: Fleet,
    pub observer: Observer,
    played: AtomicUsize,
    problems: Mutex<Vec<String>>,
    disturbances: Mutex<Vec<Disturbance>>,
}

impl Testbed {
    pub fn new(
        clock: Clock,
        cluster: EtcdCluster,
        paths: Paths,
        fleet: Fleet,
        observer: Observer,
    ) -> Self {
        Self {
            clock,
            cluster,
            paths,
            fleet,
            observer,
            played: AtomicUsize::new(0),
            problems: Mutex::default(),
            disturbances: Mutex::default(),
        }
    }

    /// The number of faults carried out.
    pub fn played_count(&self) -> usize {
        self.played.load(Ordering::Relaxed)
    }

    /// Unexpected outcomes, such as a server that did not leave when asked to.
    pub fn problems(&self) -> Vec<String> {
        self.problems.lock().clone()
    }

    /// The time span and scope of each fault.
    pub fn disturbances(&self) -> Vec<Disturbance> {
        self.disturbances.lock().clone()
    }

    /// Prints a line with the time.
    pub fn say(&self, what: &str) {
        println!("{:9.3} s  {what}", self.clock.now().as_secs_f64());
    }

    /// Starts a server, which reaches etcd over its path.
    pub async fn start(&self, name: Name) -> Result<()> {
        let endpoints = self.paths.endpoints(name.path(), &self.cluster);
        self.fleet.start(name, &endpoints).await
    }

    /// Runs the schedule. Returns once all faults are undone.
    pub async fn play(&self, schedule: &Schedule) {
        let begun = Instant::now();
        let [clients, servers] = &schedule.paths;
        let lanes = [&schedule.members, clients, servers, &schedule.manual_edits];
        let lanes = join_all(lanes.map(|lane| async move {
            for planned in lane {
                self.play_one(begun, planned).await;
            }
        }));
        // A server may take long to leave; the next fault does not wait for it.
        let all = schedule.servers.iter();
        let servers = join_all(all.map(|planned| self.play_one(begun, planned)));
        tokio::join!(lanes, servers);
    }

    async fn play_one(&self, begun: Instant, planned: &Planned) {
        let Planned { at, lasts, fault } = planned;
        sleep_until(begun + *at).await;
        if lasts.is_zero() {
            self.say(&fault.to_string());
        } else {
            self.say(&format!("{fault} for {:.3} s", lasts.as_secs_f64()));
        }
        let from = self.clock.now();
        let outcome = self.perform(fault, *lasts).await;
        let to = self.clock.now();
        if let Some(scope) = Scope::of(fault) {
            let disturbance = Disturbance { from, to, scope };
            self.disturbances.lock().push(disturbance);
        }
        if let Some(extension) = Extension::by(fault, from, to) {
            self.observer.add_extension(extension);
        }
        match outcome {
            Ok(Outcome::Done) => {
                self.played.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Outcome::Skipped(why)) => self.say(&format!("{fault}: skipped: {why}")),
            Err(error) => {
                let problem = format!("{fault}: {error}");
                self.say(&problem);
                self.problems.lock().push(problem);
            }
        }
    }

    async fn perform(&self, fault: &Fault, lasts: Duration) -> Result<Outcome> {
        match fault {
            Fault::KillMember(member) => {
                let member = self.cluster.member(*member);
                member.kill().await?;
                sleep(lasts).await;
                member.start_again().await?;
            }
            Fault::PauseMember(member) => {
                self.pause(&[self.cluster.member(*member)], lasts).await?;
            }
            Fault::RestartMember(member) => {
                let member = self.cluster.member(*member);
                member.stop().await?;
                member.start_again().await?;
            }
            Fault::WipeMember(member) => {
                self.cluster.replace(*member).await?;
            }
            Fault::ReplaceWithLearner(member) => {
                self.cluster.replace_with_learner(*member).await?;
                sleep(lasts).await;
                self.cluster.promote(*member).await?;
            }
            Fault::HangLeader => {
                let leader = self.cluster.leader().await?;
                self.pause(&[self.cluster.member(leader)], lasts).await?;
            }
            Fault::KillAll => {
                self.cluster.kill_all().await?;
                sleep(lasts).await;
                self.cluster.start_all().await?;
            }
            Fault::PauseAll => {
                let all: Vec<&Etcd> = self.cluster.members().iter().collect();
                self.pause(&all, lasts).await?;
            }
            Fault::WipeAll => self.wipe_all(lasts).await?,
            Fault::Cut(path) => {
                join_all(self.paths.proxies(*path).iter().map(|proxy| proxy.cut())).await;
                sleep(lasts).await;
                self.restore(*path).await?;
            }
            Fault::Blackhole(path) => {
                self.paths.proxies(*path).iter().for_each(|p| p.blackhole());
                sleep(lasts).await;
                self.restore(*path).await?;
            }
            Fault::Compact => {
                // Never beyond the last observed revision, because the content of a revision that
                // is compacted unobserved would be unknown.
                let revision = self.observer.known_to();
                return self.edit_manually(&ManualEdit::Compact { revision }).await;
            }
            Fault::Advance(revisions) => {
                let revisions = *revisions;
                return self.edit_manually(&ManualEdit::Advance { revisions }).await;
            }
            Fault::RevokeLease(name) => {
                return self.edit_manually(&ManualEdit::Revoke(*name)).await;
            }
            Fault::DeleteKey(name) => return self.edit_manually(&ManualEdit::Delete(*name)).await,
            Fault::CorruptKey(name, damage) => {
                return self
                    .edit_manually(&ManualEdit::Overwrite(*name, *damage))
                    .await;
            }
            Fault::KillServer(name, successor) => {
                self.replace_server(*name, ExitKind::Killed, *successor)
                    .await?
            }
            Fault::TerminateServer(name, successor) => {
                self.replace_server(*name, ExitKind::Terminated, *successor)
                    .await?
            }
            Fault::Join(names) => {
                try_join_all(names.iter().map(|name| self.start(*name))).await?;
            }
        }
        Ok(Outcome::Done)
    }

    async fn replace_server(
        &self,
        name: Name,
        how: ExitKind,
        successor: Option<Name>,
    ) -> Result<()> {
        let starts = async {
            match successor {
                Some(successor) => self.start(successor).await,
                None => Ok(()),
            }
        };
        let (ended, started) = tokio::join!(self.fleet.end(name, how), starts);
        ended.and(started)
    }

    async fn pause(&self, members: &[&Etcd], lasts: Duration) -> Result<()> {
        try_join_all(members.iter().map(|member| member.pause())).await?;
        sleep(lasts).await;
        for member in members {
            member.resume()?;
        }
        try_join_all(members.iter().map(|member| member.wait_ready())).await?;
        Ok(())
    }

    async fn restore(&self, path: Path) -> Result<()> {
        try_join_all(self.paths.proxies(path).iter().map(|p| p.restore())).await?;
        Ok(())
    }

    /// Ends this history of etcd and begins another. The leader ends last, so that all of the old
    /// history is known: without followers the leader commits nothing more, and serves the
    /// committed history until it ends.
    async fn wipe_all(&self, lasts: Duration) -> Result<()> {
        let (leader, term) = timeout(AGREE, self.agreed_leader())
            .await
            .map_err(|_| "the members did not agree on a leader")??;
        let members = self.cluster.members().iter().enumerate();
        let followers = members.filter(|(index, _)| *index != leader);
        try_join_all(followers.map(|(_, member)| member.kill())).await?;
        sleep(LAST_WORDS).await;
        let last = self.cluster.member(leader);
        let whole = match self.wait_until_observed(last, term).await {
            Ok(()) => true,
            Err(error) => {
                self.say(&format!("the end of this history is unknown: {error}"));
                false
            }
        };
        last.kill().await?;
        self.observer.end_epoch(whole);
        sleep(lasts).await;
        self.cluster.wipe_and_restart().await?;
        Ok(())
    }

    /// The index of the leader that all members agree on, and its term.
    async fn agreed_leader(&self) -> Result<(usize, u64)> {
        loop {
            let asked = self.cluster.members().iter().map(|member| async {
                let mut client = member.client().await?;
                leadership(&mut client).await
            });
            if let Ok(responses) = try_join_all(asked).await
                && let Some(first) = responses.first().filter(|response| response.leader != 0)
                && responses
                    .iter()
                    .all(|a| (a.term, a.leader) == (first.term, first.leader))
            {
                return Ok((self.cluster.leader().await?, first.term));
            }
            sleep(LAST_WORDS).await;
        }
    }

    /// Waits until the observer has received everything that this member, the last leader, has
    /// committed.
    async fn wait_until_observed(&self, member: &Etcd, term: u64) -> Result<()> {
        let mut client = member.client().await?;
        let told = async {
            loop {
                let state = leadership(&mut client).await?;
                if state.term != term {
                    return Err(format!("the term changed from {term} to {}", state.term).into());
                }
                if state.applied >= state.committed {
                    return self.observer.catch_up_with(member).await;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE * 3, told).await?
    }

    /// Performs an edit through the first member that responds.
    async fn edit_manually(&self, work: &ManualEdit) -> Result<Outcome> {
        let mut last = "no member runs".to_owned();
        for member in self.cluster.members().iter().filter(|m| m.is_running()) {
            let attempt = async { work.apply(&mut member.client().await?).await };
            match timeout(PATIENCE, attempt).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("{} does not respond", member.name()),
            }
        }
        Ok(Outcome::Skipped(last))
    }
}

enum Outcome {
    Done,
    /// The fault had no target, or no member responded.
    Skipped(String),
}

/// An edit by an ordinary etcd client.
enum ManualEdit {
    Compact { revision: i64 },
    Advance { revisions: u32 },
    Revoke(Name),
    Delete(Name),
    Overwrite(Name, Damage),
}

impl ManualEdit {
    async fn apply(&self, client: &mut Client) -> Result<Outcome> {
        match self {
            ManualEdit::Compact { revision } => {
                client.compact(*revision, None).await?;
            }
            ManualEdit::Advance { revisions } => {
                for _ in 0..*revisions {
                    client.put(OTHERS, "", None).await?;
                }
            }
            ManualEdit::Revoke(name) => {
                let response = client.get(last_key_of(*name), None).await?;
                match response.kvs().first().map(|kv| kv.lease()) {
                    None => return Ok(Outcome::Skipped("the server has no key".to_owned())),
                    Some(0) => return Ok(Outcome::Skipped("the key has no lease".to_owned())),
                    Some(lease) => client.lease_revoke(lease).await?,
                };
            }
            ManualEdit::Delete(name) => {
                if client.delete(last_key_of(*name), None).await?.deleted() == 0 {
                    return Ok(Outcome::Skipped("the server has no key".to_owned()));
                }
            }
            ManualEdit::Overwrite(name, damage) => {
                let key = last_key_of(*name);
                let response = client.get(key.as_str(), None).await?;
                let Some(kv) = response.kvs().first() else {
                    return Ok(Outcome::Skipped("the server has no key".to_owned()));
                };
                let value = apply_damage(*damage, kv.value());
                // The transaction does not create the key again if it was deleted in between.
                let is_there = Compare::create_revision(key.as_str(), CompareOp::Greater, 0);
                let put = TxnOp::put(key, value, None::<PutOptions>);
                let txn = Txn::new().when([is_there]).and_then([put]);
                if !client.txn(txn).await?.succeeded() {
                    return Ok(Outcome::Skipped(
                        "the key was deleted in between".to_owned(),
                    ));
                }
            }
        }
        Ok(Outcome::Done)
    }
}

fn apply_damage(damage: Damage, value: &[u8]) -> Vec<u8> {
    match damage {
        Damage::Garbage => b"\xff garbage".to_vec(),
        Damage::Half => value[..value.len() / 2].to_vec(),
        // Port 1 (tcpmux): nothing listens there.
        Damage::OtherAddress => {
            let text = r#"{"Op":0,"Addr":"127.0.0.1:1"}"#;
            text.into()
        }
    }
}
