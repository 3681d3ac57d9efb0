//! Plays a schedule: does the faults, and undoes them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use goo_etcd::etcd_client::{Client, Compare, CompareOp, PutOptions, Txn, TxnOp};
use goo_etcd::testing::{Etcd, EtcdCluster};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::fleet::{Fleet, Paths};
use crate::observer::{Observer, PATIENCE, leadership};
use crate::record::{Clock, Disturbance, Ending, Extension, Whom, last_key_of};
use crate::schedule::{Damage, Fault, Name, Path, Planned, Schedule};

/// How long a cluster may take to agree on a leader before all members are wiped.
const AGREE: Duration = Duration::from_secs(20);

/// A key that is none of the servers'.
const OTHERS: &str = "others";

/// What a killed follower has sent is with the leader by then.
const LAST_WORDS: Duration = Duration::from_millis(100);

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What the faults are done to.
pub struct Stage {
    pub clock: Clock,
    pub cluster: EtcdCluster,
    pub paths: Paths,
    pub fleet: Fleet,
    pub observer: Observer,
    played: AtomicUsize,
    problems: Mutex<Vec<String>>,
    disturbances: Mutex<Vec<Disturbance>>,
}

impl Stage {
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

    /// How many faults were played.
    pub fn played(&self) -> usize {
        self.played.load(Ordering::Relaxed)
    }

    /// What did not end as it should, such as a server that did not leave when asked to.
    pub fn problems(&self) -> Vec<String> {
        lock(&self.problems).clone()
    }

    /// When whom what was done to.
    pub fn disturbances(&self) -> Vec<Disturbance> {
        lock(&self.disturbances).clone()
    }

    /// A line with the time.
    pub fn say(&self, what: &str) {
        println!("{:9.3} s  {what}", self.clock.now().as_secs_f64());
    }

    /// Starts a server on its path.
    pub async fn start(&self, name: Name) -> Result<()> {
        let endpoints = self.paths.endpoints(name.path(), &self.cluster);
        self.fleet.start(name, &endpoints).await
    }

    /// Plays it from now on. Returns when all faults are undone.
    pub async fn play(&self, schedule: &Schedule) {
        let begun = Instant::now();
        let [clients, servers] = &schedule.paths;
        let lanes = [&schedule.members, clients, servers, &schedule.by_hand];
        let lanes = join_all(lanes.map(|lane| async move {
            for planned in lane {
                self.play_one(begun, planned).await;
            }
        }));
        // A server may take its time to leave; the next one does not wait for that.
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
        let outcome = self.do_it(fault, *lasts).await;
        let to = self.clock.now();
        if let Some(whom) = Whom::disturbed_by(fault) {
            let disturbance = Disturbance { from, to, whom };
            lock(&self.disturbances).push(disturbance);
        }
        if let Some(extension) = Extension::by(fault, from, to) {
            self.observer.extended(extension);
        }
        match outcome {
            Ok(Done::Yes) => {
                self.played.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Done::No(why)) => self.say(&format!("{fault}: not done, {why}")),
            Err(error) => {
                let problem = format!("{fault}: {error}");
                self.say(&problem);
                lock(&self.problems).push(problem);
            }
        }
    }

    async fn do_it(&self, fault: &Fault, lasts: Duration) -> Result<Done> {
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
                // Up to what was seen: of what is compacted unseen nobody could say what it was.
                let revision = self.observer.known_to();
                return self.by_hand(&ByHand::Compact { revision }).await;
            }
            Fault::Advance(revisions) => {
                let revisions = *revisions;
                return self.by_hand(&ByHand::Advance { revisions }).await;
            }
            Fault::RevokeLease(name) => return self.by_hand(&ByHand::Revoke(*name)).await,
            Fault::DeleteKey(name) => return self.by_hand(&ByHand::Delete(*name)).await,
            Fault::CorruptKey(name, damage) => {
                return self.by_hand(&ByHand::Overwrite(*name, *damage)).await;
            }
            Fault::KillServer(name, heir) => self.succeed(*name, Ending::Killed, *heir).await?,
            Fault::EndServer(name, heir) => self.succeed(*name, Ending::Left, *heir).await?,
            Fault::Join(names) => {
                try_join_all(names.iter().map(|name| self.start(*name))).await?;
            }
        }
        Ok(Done::Yes)
    }

    async fn succeed(&self, name: Name, how: Ending, heir: Option<Name>) -> Result<()> {
        let starts = async {
            match heir {
                Some(heir) => self.start(heir).await,
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

    /// Ends this history of etcd and begins another. To know all of the old one, the leader ends last:
    /// without its followers nothing is added to the history, and what it knows to be in there it
    /// tells until it ends.
    async fn wipe_all(&self, lasts: Duration) -> Result<()> {
        let (leader, term) = timeout(AGREE, self.agreed_leader())
            .await
            .map_err(|_| "the members did not agree on a leader")??;
        let members = self.cluster.members().iter().enumerate();
        let followers = members.filter(|(index, _)| *index != leader);
        try_join_all(followers.map(|(_, member)| member.kill())).await?;
        sleep(LAST_WORDS).await;
        let last = self.cluster.member(leader);
        let whole = match self.told_all(last, term).await {
            Ok(()) => true,
            Err(error) => {
                self.say(&format!("the end of this history is not known: {error}"));
                false
            }
        };
        last.kill().await?;
        self.observer.end_epoch(whole);
        sleep(lasts).await;
        self.cluster.wipe_and_restart().await?;
        Ok(())
    }

    /// The index of the leader that all members name, and its term.
    async fn agreed_leader(&self) -> Result<(usize, u64)> {
        loop {
            let asked = self.cluster.members().iter().map(|member| async {
                let mut client = member.client().await?;
                leadership(&mut client).await
            });
            if let Ok(answers) = try_join_all(asked).await
                && let Some(first) = answers.first().filter(|answer| answer.leader != 0)
                && answers
                    .iter()
                    .all(|a| (a.term, a.leader) == (first.term, first.leader))
            {
                return Ok((self.cluster.leader().await?, first.term));
            }
            sleep(LAST_WORDS).await;
        }
    }

    /// Waits until the observer knows all that this member, which has led until now, can tell.
    async fn told_all(&self, member: &Etcd, term: u64) -> Result<()> {
        let mut client = member.client().await?;
        let told = async {
            loop {
                let state = leadership(&mut client).await?;
                if state.term != term {
                    return Err(format!("another term, {} after {term}", state.term).into());
                }
                if state.applied >= state.committed {
                    return self.observer.catch_up_with(member).await;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE * 3, told).await?
    }

    /// Does it through the first member that answers.
    async fn by_hand(&self, work: &ByHand) -> Result<Done> {
        let mut last = "no member runs".to_owned();
        for member in self.cluster.members().iter().filter(|m| m.is_running()) {
            let attempt = async { work.done_by(&mut member.client().await?).await };
            match timeout(PATIENCE, attempt).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => last = format!("{} does not answer", member.name()),
            }
        }
        Ok(Done::No(last))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

enum Done {
    Yes,
    /// There was nothing to do it to, or nobody who would.
    No(String),
}

/// What somebody does with an ordinary client of etcd.
enum ByHand {
    Compact { revision: i64 },
    Advance { revisions: u32 },
    Revoke(Name),
    Delete(Name),
    Overwrite(Name, Damage),
}

impl ByHand {
    async fn done_by(&self, client: &mut Client) -> Result<Done> {
        match self {
            ByHand::Compact { revision } => {
                client.compact(*revision, None).await?;
            }
            ByHand::Advance { revisions } => {
                for _ in 0..*revisions {
                    client.put(OTHERS, "", None).await?;
                }
            }
            ByHand::Revoke(name) => {
                let answer = client.get(last_key_of(*name), None).await?;
                match answer.kvs().first().map(|kv| kv.lease()) {
                    None => return Ok(Done::No("it has no key".to_owned())),
                    Some(0) => return Ok(Done::No("its key has no lease".to_owned())),
                    Some(lease) => client.lease_revoke(lease).await?,
                };
            }
            ByHand::Delete(name) => {
                if client.delete(last_key_of(*name), None).await?.deleted() == 0 {
                    return Ok(Done::No("it has no key".to_owned()));
                }
            }
            ByHand::Overwrite(name, damage) => {
                let key = last_key_of(*name);
                let answer = client.get(key.as_str(), None).await?;
                let Some(kv) = answer.kvs().first() else {
                    return Ok(Done::No("it has no key".to_owned()));
                };
                let value = damaged(*damage, kv.value());
                // Not made anew if it has gone in between.
                let is_there = Compare::create_revision(key.as_str(), CompareOp::Greater, 0);
                let put = TxnOp::put(key, value, None::<PutOptions>);
                let txn = Txn::new().when([is_there]).and_then([put]);
                if !client.txn(txn).await?.succeeded() {
                    return Ok(Done::No("its key has just gone".to_owned()));
                }
            }
        }
        Ok(Done::Yes)
    }
}

fn damaged(damage: Damage, value: &[u8]) -> Vec<u8> {
    match damage {
        Damage::Garbage => b"\xff garbage".to_vec(),
        Damage::Half => value[..value.len() / 2].to_vec(),
        // tcpmux: nobody listens there.
        Damage::OtherAddress => {
            let text = r#"{"Op":0,"Addr":"127.0.0.1:1"}"#;
            text.into()
        }
    }
}
