//! The last known instances on disk. A client that starts while etcd is unreachable uses them.
//!
//! Each layout (a format under a prefix) has a file: a header line with the version and a checksum,
//! then JSON. A write goes to a temporary file that replaces the old one by a rename, so that
//! readers always see a complete file, even if several processes share the folder.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::state::ListWatchState;
use crate::error::{Error, Result};
use crate::instance::{Instance, uncallable_reason};
use crate::snapshot::{Freshness, InstanceKey, Instances, ModRevisions, Snapshot};

/// The shortest time between two writes, which bounds the cost of a service that changes all the
/// time.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// How long the first list may take if there is a cache file. A member in the same region responds
/// in milliseconds, and a process that starts without etcd waits only this long.
pub(super) const LIST_TIMEOUT: Duration = Duration::from_millis(500);

/// The start of the header line. Another version of the file format gets another number.
const HEADER: &str = "goo-etcd instances 2";

/// The cache file of one layout.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    path: PathBuf,
    key: CacheKey,
}

/// The client and the range whose snapshot a cache file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct CacheKey {
    client: String,
    format: String,
    range: String,
    by_address: bool,
}

/// The contents of a cache file. They include the key, because two keys may have the same file
/// name.
#[derive(Debug, Serialize, Deserialize)]
struct SavedSnapshot {
    key: CacheKey,
    /// In milliseconds since 1970.
    saved_at: u64,
    revision: i64,
    undecodable: usize,
    instances: Vec<SavedInstance>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedInstance {
    key: String,
    mod_revision: Option<i64>,
    service: String,
    id: String,
    address: String,
    weight: u32,
    zone: Option<String>,
    version: Option<String>,
    draining: bool,
    tls: Option<bool>,
    metadata: BTreeMap<String, String>,
}

impl Cache {
    /// Opens the cache file of the range that `state` lists. Creates the folder if it does not
    /// exist.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if the folder cannot be created.
    pub(super) fn open<W>(state: &ListWatchState<W>, client: &str, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|error| {
            Error::invalid("cache_dir", folder.display().to_string(), error.to_string())
        })?;
        let key = CacheKey {
            client: client.to_owned(),
            format: state.format_name().to_owned(),
            range: state.range_name().to_owned(),
            by_address: state.is_by_address(),
        };
        let path = folder.join(key.file_name(state.service()));
        Ok(Self { path, key })
    }

    /// Reads the last written snapshot, which is stale since it was written. Returns `None` without
    /// a file, and with a warning if the file is unusable.
    pub(super) fn load(&self) -> Option<Snapshot> {
        let result = match fs::read(&self.path) {
            Ok(bytes) => self.parse(&bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => Err(error.to_string()),
        };
        result
            .inspect_err(|reason| {
                tracing::warn!(
                    file = %self.path.display(),
                    reason,
                    "ignoring an unusable cache file"
                );
            })
            .ok()
    }

    fn parse(&self, bytes: &[u8]) -> Result<Snapshot, String> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (header, body) = bytes.split_at(end.ok_or("the header line is missing")?);
        let body = &body[1..];
        if header != header_line(body).as_bytes() {
            return Err("checksum or format version does not match".into());
        }
        let saved: SavedSnapshot =
            serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if saved.key != self.key {
            return Err(format!("the file belongs to {:?}", saved.key));
        }
        let (mut instances, mut mod_revisions) = (Instances::new(), ModRevisions::new());
        let mut undecodable = saved.undecodable;
        for saved in saved.instances {
            let (key, mod_revision, instance) = saved.into_instance();
            // A version of this crate without the check may have written the file.
            if let Some(reason) = uncallable_reason(&instance.address) {
                tracing::warn!(%key, reason, "ignoring an instance in a cache file");
                undecodable += 1;
                continue;
            }
            if let Some(mod_revision) = mod_revision {
                mod_revisions.insert(key.clone(), mod_revision);
            }
            instances.insert(key, Arc::new(instance));
        }
        Ok(Snapshot {
            range: self.key.range.as_str().into(),
            instances: Arc::new(instances),
            mod_revisions: Arc::new(mod_revisions),
            revision: saved.revision,
            freshness: Freshness::Stale {
                since: SystemTime::UNIX_EPOCH + Duration::from_millis(saved.saved_at),
                reason: format!("read from {}", self.path.display()).into(),
            },
            undecodable,
        })
    }

    fn write(&self, snapshot: &Snapshot) -> std::io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let saved_at = now.unwrap_or_default().as_millis();
        let instances = snapshot.iter().map(|(key, instance)| {
            SavedInstance::new(key, snapshot.mod_revisions.get(key).copied(), instance)
        });
        let saved = SavedSnapshot {
            key: self.key.clone(),
            saved_at: u64::try_from(saved_at).unwrap_or(u64::MAX),
            revision: snapshot.revision,
            undecodable: snapshot.undecodable,
            instances: instances.collect(),
        };
        let body = serde_json::to_vec(&saved)?;
        // In the same folder, because a rename cannot leave its file system. With a unique name,
        // because another process may be writing as well. `tempfile` deletes the file if a step
        // fails.
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        writeln!(file, "{}", header_line(&body))?;
        file.write_all(&body)?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|failed| failed.error)?;
        Ok(())
    }
}

impl CacheKey {
    /// A checksum of the key tells files apart. The service's name in front is for people.
    fn file_name(&self, service: &str) -> String {
        let Self {
            client,
            format,
            range,
            by_address,
        } = self;
        let key = format!("{client}\0{format}\0{range}\0{by_address}");
        // Only characters that every file system accepts.
        let service: String = service
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(64)
            .collect();
        format!("{service}-{:08x}.json", crc32fast::hash(key.as_bytes()))
    }
}

fn header_line(body: &[u8]) -> String {
    format!("{HEADER} {:08x}", crc32fast::hash(body))
}

impl SavedInstance {
    fn new(key: &InstanceKey, mod_revision: Option<i64>, instance: &Instance) -> Self {
        // Without `..`, so that a new field cannot be forgotten.
        let Instance {
            service,
            id,
            address,
            weight,
            zone,
            version,
            draining,
            tls,
            metadata,
        } = instance.clone();
        Self {
            key: key.as_str().to_owned(),
            mod_revision,
            service,
            id,
            address,
            weight,
            zone,
            version,
            draining,
            tls,
            metadata,
        }
    }

    fn into_instance(self) -> (InstanceKey, Option<i64>, Instance) {
        let instance = Instance {
            service: self.service,
            id: self.id,
            address: self.address,
            weight: self.weight,
            zone: self.zone,
            version: self.version,
            draining: self.draining,
            tls: self.tls,
            metadata: self.metadata,
        };
        (InstanceKey::new(self.key), self.mod_revision, instance)
    }
}

/// Writes the newest snapshot to a cache file, in a background task. After the writer is dropped,
/// the task still writes the last snapshot, up to a second later, and ends.
#[derive(Debug)]
pub(super) struct CacheWriter {
    latest: watch::Sender<Option<Snapshot>>,
}

impl CacheWriter {
    pub(super) fn spawn(cache: Cache) -> Self {
        let (latest, receiver) = watch::channel(None);
        tokio::spawn(write_changes(Arc::new(cache), receiver));
        Self { latest }
    }

    /// Queues a snapshot, in place of an earlier one in the queue.
    pub(super) fn write_latest(&self, snapshot: &Snapshot) {
        self.latest.send_replace(Some(snapshot.clone()));
    }
}

async fn write_changes(cache: Arc<Cache>, mut latest: watch::Receiver<Option<Snapshot>>) {
    let mut failed = false;
    while latest.changed().await.is_ok() {
        let snapshot = latest.borrow_and_update().clone();
        if let Some(snapshot) = snapshot {
            let result = write_blocking(Arc::clone(&cache), snapshot).await;
            // Warn once for a series of failures.
            if let Err(error) = &result
                && !failed
            {
                tracing::warn!(
                    file = %cache.path.display(),
                    %error,
                    "cannot write the cache file"
                );
            }
            failed = result.is_err();
        }
        tokio::time::sleep(WRITE_INTERVAL).await;
    }
}

async fn write_blocking(cache: Arc<Cache>, snapshot: Snapshot) -> std::io::Result<()> {
    tokio::task::spawn_blocking(move || cache.write(&snapshot))
        .await
        .unwrap_or_else(|panic| Err(std::io::Error::other(panic)))
}
