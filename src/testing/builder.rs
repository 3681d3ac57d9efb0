//! Starts servers and clusters with options.

use std::path::PathBuf;
use std::time::Duration;

use etcd_client::ConnectOptions;
use futures::future::try_join_all;

use super::cluster::EtcdCluster;
use super::error::{Result, TestingError};
use super::etcd::Etcd;
use super::member::Member;
use super::options::Options;
use super::peers::PeerNetwork;

/// Attempts of a first start. A program that does not use port claims can take a port between our
/// choice and etcd's bind; the next attempt uses other ports.
const PORT_ATTEMPTS: usize = 5;

/// Options for an [`Etcd`] or an [`EtcdCluster`]; from [`Etcd::builder`].
#[derive(Debug, Clone, Default)]
#[must_use = "a builder does nothing until one of its `start` methods is called"]
pub struct EtcdBuilder {
    options: Options,
}

impl Etcd {
    /// Starts a server and waits until it responds.
    ///
    /// # Errors
    ///
    /// Fails if no etcd is found, if it exits (the error has an excerpt of its log), or if it does
    /// not respond within 60 s.
    pub async fn start() -> Result<Self> {
        Self::builder().start().await
    }

    /// Options for a server or a cluster.
    pub fn builder() -> EtcdBuilder {
        EtcdBuilder::default()
    }
}

impl EtcdCluster {
    /// Starts three members and waits until each responds.
    ///
    /// # Errors
    ///
    /// Fails like [`Etcd::start`].
    pub async fn start() -> Result<Self> {
        Etcd::builder().start_cluster(3).await
    }

    /// Starts three members that can be [isolated](Self::isolate), and waits until each responds.
    /// When the last handle to the cluster drops, all members are cut off from each other.
    ///
    /// # Errors
    ///
    /// Fails like [`Etcd::start`].
    pub async fn start_partitionable() -> Result<Self> {
        Etcd::builder().start_partitionable_cluster(3).await
    }
}

impl EtcdBuilder {
    /// Adds flags for etcd, such as `["--auth-token-ttl", "1"]`. They override the flags that this
    /// module sets. etcd 3.6 renamed the flags `--experimental-NAME` to `--NAME`, and 3.7 refuses the
    /// old names.
    ///
    /// With `--cert-file` the client port uses TLS; see [`connect_options`](Self::connect_options).
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.options.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable for etcd. The `ETCD_*` variables of the test's own environment
    /// are not passed on.
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.envs.push((name.into(), value.into()));
        self
    }

    /// Sets the etcd program, for example to test with several releases. By default the program is
    /// searched for as the [module page](super) says.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.options.program = Some(path.into());
        self
    }

    /// Sets how long a start may take until the server responds. Default: 60 s. A start usually
    /// takes one second, but much longer on a machine that runs many tests at once.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = timeout;
        self
    }

    /// Sets user and TLS for the client that [`Etcd::client`], [`Etcd::compact`] and the check for
    /// readiness use.
    pub fn connect_options(mut self, options: ConnectOptions) -> Self {
        self.options.connect = Some(options);
        self
    }

    /// Starts one server and waits until it responds.
    ///
    /// # Errors
    ///
    /// Fails like [`Etcd::start`].
    pub async fn start(self) -> Result<Etcd> {
        let (mut members, _) = self.start_members(1, false).await?;
        Ok(members.remove(0))
    }

    /// Starts a cluster of `size` members (three is the usual number) and waits until each
    /// responds.
    ///
    /// # Errors
    ///
    /// Fails like [`Etcd::start`]. If one member fails to start, the others are stopped.
    pub async fn start_cluster(self, size: usize) -> Result<EtcdCluster> {
        let (members, _) = self.start_members(size, false).await?;
        Ok(EtcdCluster::new(members, None))
    }

    /// As [`start_cluster`](Self::start_cluster), but [`EtcdCluster::isolate`] can cut members off
    /// from the others: the members reach each other through proxies in this process, on the
    /// runtime that calls this method.
    ///
    /// Does not work for members whose peers use TLS.
    ///
    /// # Errors
    ///
    /// Fails like [`start_cluster`](Self::start_cluster).
    pub async fn start_partitionable_cluster(self, size: usize) -> Result<EtcdCluster> {
        let (members, peers) = self.start_members(size, true).await?;
        Ok(EtcdCluster::new(members, Some(peers)))
    }

    async fn start_members(
        self,
        size: usize,
        partitionable: bool,
    ) -> Result<(Vec<Etcd>, PeerNetwork)> {
        let mut attempt = 1;
        loop {
            let (members, peers) = self.launch_members(size, partitionable).await?;
            // Waits for all at once, because no member responds before a majority runs.
            match try_join_all(members.iter().map(Etcd::wait_ready)).await {
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

    async fn launch_members(
        &self,
        size: usize,
        partitionable: bool,
    ) -> Result<(Vec<Etcd>, PeerNetwork)> {
        let members = (0..size)
            .map(|index| Member::new(index, partitionable))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(TestingError::io("finding a free loopback port"))?;
        let mut listeners = Vec::new();
        for proxy in members
            .iter()
            .filter_map(|member| member.peer_proxy.as_ref())
        {
            let listener = proxy.listen().await;
            listeners
                .push(listener.map_err(TestingError::io("listening for the peers of an etcd"))?);
        }
        let initial_cluster = members
            .iter()
            .map(|member| format!("{}={}", member.name, member.peer_url()))
            .collect::<Vec<_>>()
            .join(",");
        let members = members
            .into_iter()
            .map(|member| Etcd::launch(self.options.clone(), member, initial_cluster.clone()))
            .collect::<Result<Vec<_>>>()?;
        let peers = PeerNetwork::start(listeners, &members);
        Ok((members, peers))
    }
}
