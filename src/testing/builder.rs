//! How an etcd under test is started.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::ConnectOptions;

use super::peers::Peers;
use super::port::Port;
use super::{Etcd, EtcdCluster, Result, TestingError};

/// How often a first start is tried with other ports when a program that knows nothing of our claims
/// takes one in the moment between choosing and listening.
const PORT_ATTEMPTS: usize = 5;

/// Options for an [`Etcd`] or an [`EtcdCluster`]; from [`Etcd::builder`].
#[derive(Clone)]
#[must_use]
pub struct EtcdBuilder {
    pub(super) program: Option<PathBuf>,
    pub(super) envs: Vec<(String, String)>,
    pub(super) timeout: Duration,
    args: Vec<String>,
    pub(super) connect: Option<ConnectOptions>,
}

impl Default for EtcdBuilder {
    fn default() -> Self {
        Self {
            program: None,
            envs: Vec::new(),
            timeout: Duration::from_secs(60),
            args: Vec::new(),
            connect: None,
        }
    }
}

impl EtcdBuilder {
    /// More flags for etcd, such as `["--auth-token-ttl", "1"]`. They come after those that this module
    /// sets, and etcd takes the last of a kind, so they win.
    ///
    /// With `--cert-file` the client port speaks TLS: see [`connect_options`](Self::connect_options).
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// An environment variable for etcd. The `ETCD_*` of the test's own environment do not reach it.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.envs.push((name.into(), value.into()));
        self
    }

    /// The program to run, in place of the one that is found (see the [module page](super)); for
    /// example to test with several releases of etcd.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.program = Some(path.into());
        self
    }

    /// How long a start may take until the server answers. One minute by default, which is long: a
    /// start takes a second, but not on a machine that runs thirty other tests.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How the handle's own client connects: the user, TLS. It is what [`Etcd::client`],
    /// [`Etcd::compact`] and the wait for readiness use.
    pub fn connect_options(mut self, options: ConnectOptions) -> Self {
        self.connect = Some(options);
        self
    }

    /// Starts one server and waits until it answers.
    ///
    /// # Errors
    ///
    /// As of [`Etcd::start`].
    pub async fn start(self) -> Result<Etcd> {
        let mut members = self.start_members(1).await?;
        Ok(members.remove(0))
    }

    /// Starts a cluster of `size` members (three is the usual number) and waits until each answers.
    ///
    /// # Errors
    ///
    /// As of [`Etcd::start`]; if one member fails to start, the others are stopped.
    pub async fn start_cluster(self, size: usize) -> Result<EtcdCluster> {
        Ok(EtcdCluster::new(self.start_members(size).await?))
    }

    /// As [`start_cluster`](Self::start_cluster), of members that [`EtcdCluster::isolate`] can cut off from the
    /// others: they reach each other through doors of this process, on the runtime that calls this.
    ///
    /// Not for members whose peers speak TLS.
    ///
    /// # Errors
    ///
    /// As of [`start_cluster`](Self::start_cluster).
    pub async fn start_partitionable_cluster(self, size: usize) -> Result<EtcdCluster> {
        let (members, peers) = self.start_with(size, true).await?;
        Ok(EtcdCluster::partitionable(members, peers))
    }

    async fn start_members(self, size: usize) -> Result<Vec<Etcd>> {
        let (members, _) = self.start_with(size, false).await?;
        Ok(members)
    }

    async fn start_with(self, size: usize, doors: bool) -> Result<(Vec<Etcd>, Arc<Peers>)> {
        let mut attempt = 1;
        loop {
            let (members, peers) = self.launch_members(size, doors).await?;
            // Together: none answers before a majority is there.
            let ready = members.iter().map(Etcd::wait_ready);
            match futures::future::try_join_all(ready).await {
                Ok(_) => return Ok((members, peers)),
                Err(TestingError::NotRunning { log, .. })
                    if attempt < PORT_ATTEMPTS && log.contains("address already in use") =>
                {
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn launch_members(&self, size: usize, doors: bool) -> Result<(Vec<Etcd>, Arc<Peers>)> {
        let members = (0..size)
            .map(|index| Member::new(index, doors))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(TestingError::io("finding a free loopback port"))?;
        let peers = Arc::new(Peers::new());
        for member in &members {
            if let Some(door) = &member.door {
                let target = member.peer.endpoint();
                peers.open(door, member.peer_url(), target).await?;
            }
        }
        let initial_cluster = members
            .iter()
            .map(|member| format!("{}={}", member.name, member.peer_url()))
            .collect::<Vec<_>>()
            .join(",");
        let members = members
            .into_iter()
            .map(|member| Etcd::launch(self.clone(), member, initial_cluster.clone()))
            .collect::<Result<_>>()?;
        Ok((members, peers))
    }

    pub(super) fn is_tls(&self) -> bool {
        self.args.iter().any(|arg| {
            let flag = arg.trim_start_matches('-');
            flag.starts_with("cert-file") || flag.starts_with("auto-tls")
        })
    }

    pub(super) fn command_line(
        &self,
        member: &Member,
        data_dir: &Path,
        initial_cluster: &str,
        joins: bool,
    ) -> Vec<String> {
        let scheme = if self.is_tls() { "https" } else { "http" };
        let client_url = format!("{scheme}://{}", member.client.endpoint());
        let peer_url = member.peer_url();
        let state = if joins { "existing" } else { "new" };
        // Timing is etcd's own (heartbeat 100 ms, election 1 s), so that what depends on it is as in
        // production: the least TTL of a lease (2 s), and how long a cluster is without a leader.
        let ours = [
            format!("--name={}", member.name),
            format!("--data-dir={}", data_dir.display()),
            format!("--listen-client-urls={client_url}"),
            format!("--advertise-client-urls={client_url}"),
            format!("--listen-peer-urls=http://{}", member.peer.endpoint()),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster={initial_cluster}"),
            format!("--initial-cluster-state={state}"),
            // Data outlives the process, in the page cache, but not the machine: all that a test needs.
            "--unsafe-no-fsync".to_owned(),
        ];
        ours.into_iter().chain(self.args.iter().cloned()).collect()
    }
}

impl fmt::Debug for EtcdBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Connect options hold a password, and variables may.
        f.debug_struct("EtcdBuilder")
            .field("program", &self.program)
            .field("args", &self.args)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// What tells one member from another.
pub(super) struct Member {
    pub(super) name: String,
    pub(super) client: Port,
    pub(super) peer: Port,
    /// Where its peers come in, if not where it listens.
    pub(super) door: Option<Port>,
}

impl Member {
    fn new(index: usize, door: bool) -> std::io::Result<Self> {
        Ok(Self {
            name: format!("etcd{index}"),
            client: Port::claim()?,
            peer: Port::claim()?,
            door: door.then(Port::claim).transpose()?,
        })
    }

    /// Where its peers reach it.
    pub(super) fn peer_url(&self) -> String {
        let port = self.door.as_ref().unwrap_or(&self.peer);
        format!("http://{}", port.endpoint())
    }
}
