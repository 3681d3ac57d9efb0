//! An etcd cluster for tests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, MemberAddOptions};
use futures::future::try_join_all;
use tokio::time::{sleep, timeout};

use super::error::{Result, TestingError};
use super::etcd::Etcd;
use super::leader::query_leader;
use super::peers::PeerNetwork;
use super::timing::{POLL_INTERVAL, PROBE_TIMEOUT};

/// The time limit of one attempt to change the membership; another attempt follows.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// A cluster of real etcd servers on loopback ports. Each member is an [`Etcd`] that can be killed,
/// paused and restarted independently of the others.
///
/// Cloning gives another handle to the same cluster. Each member stops when the last handle to it
/// drops; see [`Etcd`].
#[derive(Debug, Clone)]
#[must_use = "dropping the last handle kills the members"]
pub struct EtcdCluster {
    members: Vec<Etcd>,
    /// The network between the members, if it can be cut.
    peers: Option<Arc<PeerNetwork>>,
}

impl EtcdCluster {
    pub(super) fn new(members: Vec<Etcd>, peers: Option<PeerNetwork>) -> Self {
        let peers = peers.map(Arc::new);
        Self { members, peers }
    }

    /// The members, in a fixed order.
    pub fn members(&self) -> &[Etcd] {
        &self.members
    }

    /// The member with this index.
    ///
    /// # Panics
    ///
    /// Panics if there is no such member.
    pub fn member(&self, index: usize) -> &Etcd {
        &self.members[index]
    }

    /// The endpoints of the members for clients, as `127.0.0.1:PORT`.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Etcd::endpoint).collect()
    }

    /// The index of the leader, according to the first running member that knows it. Needs no
    /// user, except with `--cert-file` on a release of etcd that refuses the status without one, as
    /// 3.6.16 does with authentication enabled: there
    /// [`connect_options`](super::EtcdBuilder::connect_options) must have one.
    ///
    /// # Errors
    ///
    /// Fails if no member knows a leader within the builder's timeout.
    pub async fn leader(&self) -> Result<usize> {
        let deadline = Instant::now() + self.member(0).options().timeout;
        loop {
            let mut last = TestingError::NoLeader;
            for member in self.members.iter().filter(|member| member.is_running()) {
                // A paused member does not respond; then the next one is asked.
                match timeout(PROBE_TIMEOUT, query_leader(member)).await {
                    Ok(Ok(Some(name))) => {
                        if let Some(index) = self.members.iter().position(|m| m.name() == name) {
                            return Ok(index);
                        }
                    }
                    Ok(Err(error)) => last = error,
                    Ok(Ok(None)) | Err(_) => {}
                }
            }
            if Instant::now() > deadline {
                return Err(last);
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Cuts a member off from the others in both directions; clients still reach it. When this
    /// method returns, no more data passes to or from it, and the others reach each other as before.
    /// The member notices that it has lost its leader only after an election timeout of at least one
    /// second.
    ///
    /// The kernel's tables tell which member a connection belongs to: in `/proc` on Linux, through
    /// `lsof` elsewhere. Without them the other members are cut off from each other, too.
    ///
    /// # Panics
    ///
    /// Panics if there is no member with this index, or if the cluster was not started by
    /// [`start_partitionable`](Self::start_partitionable) or
    /// [`EtcdBuilder::start_partitionable_cluster`](super::EtcdBuilder::start_partitionable_cluster).
    pub async fn isolate(&self, index: usize) {
        assert!(index < self.members.len(), "there is no member {index}");
        self.network().isolate(index).await;
    }

    /// Reconnects an isolated member to the others. Does not wait until it has caught up.
    ///
    /// # Panics
    ///
    /// Panics like [`isolate`](Self::isolate).
    pub fn rejoin(&self, index: usize) {
        assert!(index < self.members.len(), "there is no member {index}");
        self.network().rejoin(index);
    }

    fn network(&self) -> &PeerNetwork {
        let peers = self.peers.as_deref();
        peers.expect("the cluster was started as a partitionable one")
    }

    /// Kills all members and waits for their exit.
    pub async fn kill_all(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Etcd::kill)).await?;
        Ok(())
    }

    /// Starts the members that are down, with their data, and waits until all members respond.
    ///
    /// # Errors
    ///
    /// Fails like [`Etcd::start`].
    pub async fn start_all(&self) -> Result<()> {
        try_join_all(self.members.iter().map(Etcd::start_again)).await?;
        Ok(())
    }

    /// Kills all members, starts them with the same ports and without data, and waits until all
    /// respond. Revisions start at 1 again.
    ///
    /// # Errors
    ///
    /// Fails like [`Etcd::start`].
    pub async fn wipe_and_restart(&self) -> Result<()> {
        for member in &self.members {
            member.wipe().await?;
            member.set_joins_existing(false);
        }
        self.start_all().await
    }

    /// Replaces a member by one with an empty disk and the same ports: kills it, removes it from
    /// the cluster, adds it again and starts it. The new member has caught up when this method
    /// returns.
    ///
    /// # Errors
    ///
    /// Fails if the other members do not agree to the change within the builder's timeout: a
    /// majority of them must be up.
    ///
    /// # Panics
    ///
    /// Panics if there is no member with this index.
    pub async fn replace(&self, index: usize) -> Result<()> {
        self.replace_with(index, MemberAddOptions::new()).await
    }

    /// As [`replace`](Self::replace), but the new member is a learner, which receives the log and
    /// has no vote until it is promoted.
    ///
    /// # Errors and panics
    ///
    /// Fails and panics like [`replace`](Self::replace).
    pub async fn replace_with_learner(&self, index: usize) -> Result<()> {
        self.replace_with(index, MemberAddOptions::new().with_is_learner())
            .await
    }

    /// Promotes the learner that [`replace_with_learner`](Self::replace_with_learner) has added to a
    /// voting member, as soon as it has caught up with the log.
    ///
    /// # Errors
    ///
    /// Fails if the learner has not been promoted within the builder's timeout.
    ///
    /// # Panics
    ///
    /// Panics if there is no member with this index.
    pub async fn promote(&self, index: usize) -> Result<()> {
        let learner = self.member(index);
        self.change_until_done(learner, async || self.promote_once(learner).await)
            .await
    }

    async fn promote_once(&self, learner: &Etcd) -> Result<()> {
        let mut client = self.client_of_another(learner).await?;
        // An earlier attempt may have promoted it without a response.
        match find_listed(&mut client, learner).await? {
            Some(listed) if listed.is_learner() => {
                let promoted = client.member_promote(listed.id()).await;
                promoted.map_err(TestingError::client("promoting a learner"))?;
            }
            _ => {}
        }
        Ok(())
    }

    async fn replace_with(&self, index: usize, options: MemberAddOptions) -> Result<()> {
        let member = self.member(index);
        member.wipe().await?;
        self.change_until_done(member, async || self.remove_and_add(member, &options).await)
            .await?;
        member.set_joins_existing(true);
        member.start_again().await
    }

    /// Attempts a change of the cluster until it succeeds, because etcd refuses until its members
    /// have been connected for some seconds, and never responds to a request that was forwarded to a
    /// leader when that leader was killed.
    async fn change_until_done(
        &self,
        member: &Etcd,
        change: impl AsyncFn() -> Result<()>,
    ) -> Result<()> {
        let deadline = Instant::now() + member.options().timeout;
        loop {
            let error = match timeout(CHANGE_TIMEOUT, change()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => error,
                Err(_) => TestingError::NoLeader,
            };
            if Instant::now() > deadline {
                return Err(error);
            }
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Removes the member from the cluster and adds it again. Skips steps that an earlier attempt
    /// has done.
    async fn remove_and_add(&self, member: &Etcd, options: &MemberAddOptions) -> Result<()> {
        let mut client = self.client_of_another(member).await?;
        if let Some(listed) = find_listed(&mut client, member).await? {
            // A member without a name has not started: an earlier attempt has added it.
            if listed.name().is_empty() {
                return Ok(());
            }
            client
                .member_remove(listed.id())
                .await
                .map_err(TestingError::client("removing a member"))?;
        }
        client
            .member_add([member.peer_url()], Some(options.clone()))
            .await
            .map_err(TestingError::client("adding a member"))?;
        Ok(())
    }

    async fn client_of_another(&self, member: &Etcd) -> Result<Client> {
        for other in &self.members {
            if other.name() != member.name() && other.is_running() {
                return other.client().await;
            }
        }
        Err(TestingError::NoLeader)
    }
}

/// The member in etcd's list of members, if it is there.
async fn find_listed(client: &mut Client, member: &Etcd) -> Result<Option<etcd_client::Member>> {
    let list = client
        .member_list()
        .await
        .map_err(TestingError::client("listing members"))?;
    let peer_url = member.peer_url();
    let mut members = list.members().iter();
    Ok(members
        .find(|listed| listed.peer_urls().contains(&peer_url))
        .cloned())
}
