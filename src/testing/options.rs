//! The options of a server, and the command line made from them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::ConnectOptions;

use super::member::Member;

/// The options of one server, or of all members of a cluster.
#[derive(Clone)]
pub(super) struct Options {
    pub(super) program: Option<PathBuf>,
    pub(super) args: Vec<String>,
    pub(super) envs: Vec<(String, String)>,
    pub(super) timeout: Duration,
    pub(super) connect: Option<ConnectOptions>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            program: None,
            args: Vec::new(),
            envs: Vec::new(),
            timeout: Duration::from_secs(60),
            connect: None,
        }
    }
}

impl Options {
    pub(super) fn is_tls(&self) -> bool {
        self.args.iter().any(|arg| {
            let flag = arg.trim_start_matches('-');
            flag.starts_with("cert-file") || flag.starts_with("auto-tls")
        })
    }

    /// The flags of a member. `joins_existing` says whether an empty data folder means joining an
    /// existing cluster or founding a new one.
    pub(super) fn command_line(
        &self,
        member: &Member,
        data_dir: &Path,
        initial_cluster: &str,
        joins_existing: bool,
    ) -> Vec<String> {
        let scheme = if self.is_tls() { "https" } else { "http" };
        let client_url = format!("{scheme}://{}", member.client.endpoint());
        let peer_url = member.peer_url();
        let state = if joins_existing { "existing" } else { "new" };
        // The timing is etcd's default (heartbeat 100 ms, election 1 s), because the minimum TTL of
        // a lease (2 s) and the time without a leader depend on it.
        let ours = [
            format!("--name={}", member.name),
            format!("--data-dir={}", data_dir.display()),
            format!("--listen-client-urls={client_url}"),
            format!("--advertise-client-urls={client_url}"),
            format!("--listen-peer-urls=http://{}", member.peer.endpoint()),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster={initial_cluster}"),
            format!("--initial-cluster-state={state}"),
            // The page cache keeps the data when the process dies, and tests need no more.
            "--unsafe-no-fsync".to_owned(),
        ];
        ours.into_iter().chain(self.args.iter().cloned()).collect()
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Leaves out the connect options and the variables, which may hold secrets.
        f.debug_struct("Options")
            .field("program", &self.program)
            .field("args", &self.args)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
