//! Servers, processes, waiting and reading of state, shared by all tests.

#[cfg(feature = "_tls")]
pub mod authority;
pub mod backup;
pub mod balanced;
pub mod echo;
pub mod echo_process;
pub mod frames;
pub mod greeter;
pub mod history;
pub mod interop;
pub mod io;
pub mod log;
pub mod process;
pub mod raw;
pub mod registered_process;
pub mod users;
pub mod versions;

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Directory, GetOptions, Snapshot};
use tokio::sync::MutexGuard;
use tokio_util::task::AbortOnDropHandle;

pub use versions::{Feature, etcd_versions, find_etcd, say_left_out, version};

pub type TestResult<T = ()> = Result<T, Box<dyn Error>>;

/// How long a test waits for an event that must happen: far longer than usual, because the machine
/// may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The interval at which a condition is checked.
const POLL: Duration = Duration::from_millis(10);

/// Waits until a condition holds.
///
/// # Panics
///
/// If it does not hold within [`PATIENCE`].
pub async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
        panic!("not within {PATIENCE:?}: {what}");
    }
}

/// Waits for the output of a future, so that a failing test does not hang.
///
/// # Panics
///
/// If the future does not finish within [`PATIENCE`].
pub async fn wait_for<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// Waits until no other test that measures time, memory or rates is running. The tests that hold
/// this guard run one after another; all other tests run beside them.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    ALONE.lock().await
}

/// The default configuration, except that connecting may take [`PATIENCE`].
pub fn config(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Config {
    let mut config = Config::default();
    config.endpoints = endpoints.into_iter().map(Into::into).collect();
    config.dial_timeout = PATIENCE;
    config
}

/// A client of one endpoint, see [`config`].
pub async fn connect(endpoint: impl Into<String>) -> Client {
    Client::new("test", config([endpoint])).await.unwrap()
}

/// A value of the default format.
pub fn value(address: &str) -> String {
    format!(r#"{{"Op":0,"Addr":"{address}"}}"#)
}

/// A key of the service `greeter` under the default prefix.
pub fn key(id: &str) -> String {
    format!("services/greeter/{id}")
}

/// `id=address` of each instance.
pub fn listing(snapshot: &Snapshot) -> Vec<String> {
    snapshot
        .instances()
        .map(|instance| format!("{}={}", instance.id, instance.address))
        .collect()
}

/// The value of a key in etcd, read over a new connection.
pub async fn stored_value(etcd: &Etcd, key: &str) -> TestResult<Option<String>> {
    let response = etcd.client().await?.get(key, None).await?;
    Ok(match response.kvs().first() {
        Some(kv) => Some(kv.value_str()?.to_owned()),
        None => None,
    })
}

/// The lease of a key in etcd; `None` if the key does not exist.
pub async fn lease_of(etcd: &Etcd, key: &str) -> TestResult<Option<i64>> {
    let response = etcd.client().await?.get(key, None).await?;
    Ok(response.kvs().first().map(|kv| kv.lease()))
}

/// The ids of all leases in etcd.
pub async fn leases(etcd: &Etcd) -> TestResult<Vec<i64>> {
    let response = etcd.client().await?.leases().await?;
    Ok(response.leases().iter().map(|lease| lease.id()).collect())
}

/// The page with etcd's own metrics.
pub async fn metrics_page(etcd: &Etcd) -> TestResult<String> {
    page(etcd, "/metrics").await
}

/// A page that etcd serves over HTTP, with its head.
pub async fn page(etcd: &Etcd, path: &str) -> TestResult<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut connection = tokio::net::TcpStream::connect(etcd.endpoint()).await?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: etcd\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut page = String::new();
    connection.read_to_string(&mut page).await?;
    Ok(page)
}

/// The number of calls of a method that etcd has received, by its own metrics.
pub async fn call_count(etcd: &Etcd, method: &str) -> TestResult<u64> {
    let page = metrics_page(etcd).await?;
    let method = format!("grpc_method=\"{method}\"");
    let calls = page
        .lines()
        .filter(|line| line.starts_with("grpc_server_started_total"))
        .filter(|line| line.contains(&method))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    Ok(calls.sum::<f64>() as u64)
}

/// The number of open watches, by etcd's own metrics.
pub async fn watcher_count(etcd: &Etcd) -> TestResult<u64> {
    let page = metrics_page(etcd).await?;
    let count = page
        .lines()
        .find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "))
        .ok_or("etcd has no metric for watchers")?;
    Ok(count.trim().parse::<f64>()? as u64)
}

/// All keys under the default prefix.
pub async fn registered_keys(client: &Client) -> TestResult<Vec<String>> {
    let options = GetOptions::new().with_prefix().with_keys_only();
    let response = client.get("services/", options).await?;
    let keys = response
        .kvs()
        .iter()
        .map(|kv| kv.key_str().map(str::to_owned));
    Ok(keys.collect::<Result<_, _>>()?)
}

/// Collects the snapshots of a directory in the background. Like every consumer, it may miss a
/// snapshot that is replaced at once.
pub struct SnapshotRecorder {
    snapshots: Arc<Mutex<Vec<Arc<Snapshot>>>>,
    _collector: AbortOnDropHandle<()>,
}

impl SnapshotRecorder {
    pub fn new(directory: &Directory) -> Self {
        let snapshots = Arc::new(Mutex::new(Vec::new()));
        let mut changes = directory.changes();
        let into = Arc::clone(&snapshots);
        let collector = tokio::spawn(async move {
            while let Some(snapshot) = changes.next().await {
                into.lock().unwrap().push(snapshot);
            }
        });
        Self {
            snapshots,
            _collector: AbortOnDropHandle::new(collector),
        }
    }

    pub fn all(&self) -> Vec<Arc<Snapshot>> {
        self.snapshots.lock().unwrap().clone()
    }

    pub fn last(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.lock().unwrap().last().cloned()
    }
}
