//! An etcd cluster under test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, MemberAddOptions};
use futures::future::try_join_all;
use tokio::time::{sleep, timeout};

use super::etcd::POLL;
use super::peers::Peers;
use super::ready::PROBE_TIMEOUT;
use super::{Etcd, Result, TestingError};

/// How long one try to change the membership may take; it is made again.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// A cluster of real etcd servers on loopback; each member is an [`Etcd`], to be killed, paused and
/// restarted on its own.
///
/// Cloning gives another handle to the same cluster; a member stops when the last handle to it drops,
/// as [`Etcd`] says.
#[derive(Debug, Clone)]
pub struct EtcdCluster {
    members: Vec<Etcd>,
    /// The network between them, where it can be cut.
    peers: Option<Arc<Peers>>,
}

impl EtcdCluster {
    pub(super) fn new(members: Vec<Etcd>) -> Self {
        let peers = None;
        Self { members, peers }
    }

    pub(super) fn partitionable(members: Vec<Etcd>, peers: Arc<Peers>) -> Self {
        let peers = Some(peers);
        Self { members, peers }
    }

    /// Starts three members and waits until each answers.
    ///
    /// # Errors
    ///
    /// As of [`Etcd::start`].
    pub async fn start() -> Result<Self> {
        Etcd::builder().start_cluster(3).await
    }

    /// Starts three members that can be [isolated](Self::isolate), and waits until each answers. They are
    /// all cut off from each other when the last handle to the cluster drops.
    ///
    /// # Errors
    ///
    /// As of [`Etcd::start`].
    pub async fn start_partitionable() -> Result<Self> {
        Etcd::builder().start_partitionable_cluster(3).await
    }

    /// The members, in a fixed order.
    pub fn members(&self) -> &[Etcd] {
        &self.members
    }

    /// A member.
    ///
    /// # Panics
    ///
    /// When there is none of this index.
    pub fn member(&self, index: usize) -> &Etcd {
        &self.members[index]
    }

    /// Where clients reach the members: `127.0.0.1:PORT` of each.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Etcd::endpoint).collect()
    }

    /// The index of the member that leads, as seen by the first running member that knows.
    ///
    /// # Errors
    ///
    /// When none has told of a leader within the builder's timeout.
    pub async fn leader(&self) -> Result<usize> {
        let deadline = Instant::now() + self.member(0).options().timeout;
        loop {
            let mut last = TestingError::NoLeader;
            for member in self.members.iter().filter(|member| member.is_running()) {
                match leader_according_to(member).await {
                    Ok(Some(name)) => {
                        if let Some(index) = self.members.iter().position(|m| m.name() == name) {
                            return Ok(index);
                        }
                    }
                    Ok(None) => {}
                    Err(error) => last = error,
                }
            }
            if Instant::now() > deadline {
                return Err(last);
            }
            sleep(POLL).await;
        }
    }

    /// Cuts a member off from the others, both ways, while clients reach it as before. When this returns
    /// nothing comes through any more; that it has lost its leader the member notices after an
    /// election timeout, a second and more.
    ///
    /// # Panics
    ///
    /// When there is no member of this index, or the cluster was not started by
    /// [`start_partitionable`](Self::start_partitionable) or
    /// [`EtcdBuilder::start_partitionable_cluster`](super::EtcdBuilder::start_partitionable_cluster).
    pub async fn isolate(&self, index: usize) {
        let member = self.member(index).peer_url();
        self.network().isolate(&member).await;
    }

    /// Lets a member reach the others again, and does not wait.
    ///
    /// # Panics
    ///
    /// As [`isolate`](Self::isolate).
    pub fn rejoin(&self, index: usize) {
        let member = self.member(index).peer_url();
        self.network().rejoin(&member);
    }

    fn network(&self) -> &Peers {
        let peers = self.peers.as_deref();
        peers.expect("a cluster that was started as one that can be partitioned")
    }

    /// Kills all members, and waits for their end.
    pub async fn kill_all(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Etcd::kill)).await?;
        Ok(())
    }

    /// Starts those members that are down, with their data, and waits until all answer.
    ///
    /// # Errors
    ///
    /// As of [`Etcd::start`].
    pub async fn start_all(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Etcd::start_again)).await?;
        Ok(())
    }

    /// Kills all members and starts them with nothing in them, on the same ports, and waits until all
    /// answer. Revisions begin anew.
    ///
    /// # Errors
    ///
    /// As of [`Etcd::start`].
    pub async fn wipe_and_restart(&self) -> Result<()> {
        for member in &self.members {
            member.wipe().await?;
            member.set_joins(false);
        }
        self.start_all().await
    }

    /// Replaces a member by one with an empty disk, on the same ports: it is killed, removed from the
    /// cluster, added anew and started, and has caught up when this returns.
    ///
    /// # Errors
    ///
    /// When the other members do not agree to the change within the builder's timeout: a majority of
    /// them must be up.
    ///
    /// # Panics
    ///
    /// When there is no member of this index.
    pub async fn replace(&self, index: usize) -> Result<()> {
        self.replace_with(index, MemberAddOptions::new()).await
    }

    /// As [`replace`](Self::replace), by a learner: it receives the log, and has no vote until it is promoted.
    ///
    /// # Errors and panics
    ///
    /// As of [`replace`](Self::replace).
    pub async fn replace_with_learner(&self, index: usize) -> Result<()> {
        self.replace_with(index, MemberAddOptions::new().with_is_learner())
            .await
    }

    async fn replace_with(&self, index: usize, options: MemberAddOptions) -> Result<()> {
        let member = self.member(index);
        member.wipe().await?;
        let deadline = Instant::now() + member.options().timeout;
        // etcd refuses to change a cluster whose members have not been connected for some seconds; and
        // it never answers a request that was on its way to a leader that has just been killed.
        loop {
            let error = match timeout(CHANGE_TIMEOUT, self.readmit(member, &options)).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => error,
                Err(_) => TestingError::NoLeader,
            };
            if Instant::now() > deadline {
                return Err(error);
            }
            sleep(POLL).await;
        }
        member.set_joins(true);
        member.start_again().await
    }

    /// Removes the member and adds it again; what an earlier try has done is not done twice.
    async fn readmit(&self, member: &Etcd, options: &MemberAddOptions) -> Result<()> {
        let mut client = self.client_beside(member).await?;
        let peer_url = member.peer_url();
        let list = client
            .member_list()
            .await
            .map_err(TestingError::client("listing members"))?;
        let listed = list
            .members()
            .iter()
            .find(|m| m.peer_urls().contains(&peer_url));
        if let Some(listed) = listed {
            // Added by an earlier try: a member that has not started has no name.
            if listed.name().is_empty() {
                return Ok(());
            }
            client
                .member_remove(listed.id())
                .await
                .map_err(TestingError::client("removing a member"))?;
        }
        client
            .member_add([peer_url], Some(options.clone()))
            .await
            .map_err(TestingError::client("adding a member"))?;
        Ok(())
    }

    async fn client_beside(&self, member: &Etcd) -> Result<Client> {
        for other in &self.members {
            if other.name() != member.name() && other.is_running() {
                return other.client().await;
            }
        }
        Err(TestingError::NoLeader)
    }
}

async fn leader_according_to(member: &Etcd) -> Result<Option<String>> {
    let ask = async {
        let mut client = member.client().await?;
        let leader = client
            .status()
            .await
            .map_err(TestingError::client("asking for the status"))?
            .leader();
        let members = client
            .member_list()
            .await
            .map_err(TestingError::client("listing members"))?;
        let found = members.members().iter().find(|m| m.id() == leader);
        Ok(found.map(|m| m.name().to_owned()))
    };
    // A paused member does not answer; another one may.
    timeout(PROBE_TIMEOUT, ask).await.unwrap_or(Ok(None))
}
