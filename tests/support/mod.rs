//! What the tests against a real etcd and real servers share.

pub mod balanced;
pub mod echo;
pub mod greeter;
pub mod history;
pub mod process;
pub mod raw;
pub mod registered;

use std::error::Error;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::testing::{Etcd, EtcdBuilder};
use goo_etcd::{Client, Config, Directory, GetOptions, Snapshot};
use tokio_util::task::AbortOnDropHandle;

pub type TestResult<T = ()> = Result<T, Box<dyn Error>>;

/// How long a test waits for what must come. Far more than it takes, for machines that are busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Waits until a condition holds.
///
/// # Panics
///
/// When it does not within [`PATIENCE`].
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
        panic!("not within {PATIENCE:?}: {what}");
    }
}

/// What a future comes to.
///
/// # Panics
///
/// When it does not within [`PATIENCE`]: a test that fails must not hang.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(output) => output,
        Err(_) => panic!("not within {PATIENCE:?}: {what}"),
    }
}

/// A client of one endpoint, with the defaults except for patience while connecting.
pub async fn connect(endpoint: impl Into<String>) -> Client {
    let config = Config::builder()
        .endpoints([endpoint])
        .dial_timeout(PATIENCE)
        .build()
        .unwrap();
    Client::new("test", config).await.unwrap()
}

/// A value of the default format.
pub fn value(address: &str) -> String {
    format!(r#"{{"Op":0,"Addr":"{address}"}}"#)
}

/// A key of the service `greeter` under the default prefix.
pub fn key(id: &str) -> String {
    format!("services/greeter/{id}")
}

/// `id=address` of each instance shown.
pub fn shown(snapshot: &Snapshot) -> Vec<String> {
    snapshot
        .instances()
        .map(|instance| format!("{}={}", instance.id, instance.address))
        .collect()
}

/// The value of a key in etcd, asked over a connection of its own.
pub async fn stored(etcd: &Etcd, key: &str) -> TestResult<Option<String>> {
    let answer = etcd.client().await?.get(key, None).await?;
    Ok(match answer.kvs().first() {
        Some(kv) => Some(kv.value_str()?.to_owned()),
        None => None,
    })
}

/// The lease that a key in etcd hangs on; `None` without the key.
pub async fn lease_of(etcd: &Etcd, key: &str) -> TestResult<Option<i64>> {
    let answer = etcd.client().await?.get(key, None).await?;
    Ok(answer.kvs().first().map(|kv| kv.lease()))
}

/// All leases in etcd.
pub async fn leases(etcd: &Etcd) -> TestResult<Vec<i64>> {
    let answer = etcd.client().await?.leases().await?;
    Ok(answer.leases().iter().map(|lease| lease.id()).collect())
}

/// What etcd tells of itself.
pub async fn metrics(etcd: &Etcd) -> TestResult<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut connection = tokio::net::TcpStream::connect(etcd.endpoint()).await?;
    connection
        .write_all(b"GET /metrics HTTP/1.0\r\nHost: etcd\r\n\r\n")
        .await?;
    let mut page = String::new();
    connection.read_to_string(&mut page).await?;
    Ok(page)
}

/// How many calls of this method etcd has begun to answer, as it counts itself.
pub async fn calls(etcd: &Etcd, method: &str) -> TestResult<u64> {
    let page = metrics(etcd).await?;
    let method = format!("grpc_method=\"{method}\"");
    let calls = page
        .lines()
        .filter(|line| line.starts_with("grpc_server_started_total"))
        .filter(|line| line.contains(&method))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    Ok(calls.sum::<f64>() as u64)
}

/// An etcd beside the usual one, from this variable or where `scripts/tools` puts it. `none` says that there is
/// none.
///
/// # Panics
///
/// When nobody has looked for it.
pub fn other_etcd(variable: &str, name: &str) -> Option<PathBuf> {
    let set = std::env::var(variable).unwrap_or_default();
    if set == "none" {
        return None;
    }
    let found = if set.is_empty() {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("target/tools/bin")
            .join(name)
    } else {
        set.into()
    };
    assert!(
        found.is_file(),
        "{} is missing: run scripts/tools, or set {variable} to one or to `none`",
        found.display()
    );
    Some(found)
}

/// The usual etcd and, where it is to be had, the newest: what it does has changed.
pub fn etcds() -> Vec<EtcdBuilder> {
    let newest = other_etcd("ETCD_NEWEST", "etcd-newest");
    let newest = newest.map(|program| Etcd::builder().program(program));
    [Etcd::builder()].into_iter().chain(newest).collect()
}

/// How many watches etcd itself counts.
pub async fn watchers(etcd: &Etcd) -> TestResult<u64> {
    let page = metrics(etcd).await?;
    let count = page
        .lines()
        .find_map(|line| line.strip_prefix("etcd_debugging_mvcc_watcher_total "))
        .ok_or("etcd does not tell how many watchers it has")?;
    Ok(count.trim().parse::<f64>()? as u64)
}

/// All keys under the default prefix.
pub async fn keys(client: &Client) -> TestResult<Vec<String>> {
    let options = GetOptions::new().with_prefix().with_keys_only();
    let answer = client.get("services/", options).await?;
    let keys = answer
        .kvs()
        .iter()
        .map(|kv| kv.key_str().map(str::to_owned));
    Ok(keys.collect::<Result<_, _>>()?)
}

/// Everything that a directory publishes, as far as it can be seen: collected in the background.
pub struct Seen {
    snapshots: Arc<Mutex<Vec<Arc<Snapshot>>>>,
    _collector: AbortOnDropHandle<()>,
}

impl Seen {
    pub fn by(directory: &Directory) -> Self {
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
