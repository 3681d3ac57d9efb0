//! The last known instances on disk, for a client that starts while etcd is away.
//!
//! One file for each source (a format under a prefix): a line with the version and a checksum, then JSON.
//! It is written beside and renamed, so that whoever reads it sees a whole one, also when several processes
//! share the folder.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::state::Machine;
use crate::error::{Error, Result};
use crate::instance::Instance;
use crate::snapshot::{Freshness, InstanceKey, Instances, ModRevisions, Snapshot};

/// The least time between two writes: a service that changes all the time costs no more than this.
const WRITE_EVERY: Duration = Duration::from_secs(1);

/// How long a list may take when there is a file to be served instead. A member in the same region
/// answers in milliseconds; and those who start without etcd wait no longer than this.
pub(super) const LIST_WITHIN: Duration = Duration::from_millis(500);

/// What each file begins with; another version of the format is another number.
const MAGIC: &str = "goo-etcd instances 1";

/// The file of one source.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    path: PathBuf,
    of: Source,
}

/// What a file is about. A name is not enough: several may come to the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Source {
    client: String,
    format: String,
    range: String,
    by_address: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    of: Source,
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
    /// The file of what `machine` reads, in a folder that is made if it is not there.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a folder that cannot be made.
    pub(super) fn of(machine: &Machine, client: &str, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|error| {
            Error::invalid("cache_dir", folder.display().to_string(), error.to_string())
        })?;
        let of = Source {
            client: client.to_owned(),
            format: machine.format_name().to_owned(),
            range: machine.range_name().to_owned(),
            by_address: machine.is_by_address(),
        };
        let identity = format!(
            "{}\0{}\0{}\0{}",
            of.client, of.format, of.range, of.by_address
        );
        let mut name: String = machine
            .service()
            .chars()
            // What no file system refuses; for people, the rest of the name is unique.
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .take(64)
            .collect();
        // A `String` takes everything.
        let _ = write!(name, "-{:08x}.json", crc32fast::hash(identity.as_bytes()));
        let path = folder.join(name);
        Ok(Self { path, of })
    }

    /// What was last written; `None`, with a warning, if it cannot be used.
    pub(super) fn load(&self) -> Option<Snapshot> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => return self.ignored(&error.to_string()),
        };
        match self.read(&bytes) {
            Ok(snapshot) => Some(snapshot),
            Err(reason) => self.ignored(&reason),
        }
    }

    fn ignored(&self, reason: &str) -> Option<Snapshot> {
        tracing::warn!(
            file = %self.path.display(),
            reason,
            "the last known instances cannot be read and are ignored"
        );
        None
    }

    fn read(&self, bytes: &[u8]) -> Result<Snapshot, String> {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let (head, body) = bytes.split_at(end.ok_or("it has no first line")?);
        let body = &body[1..];
        if head != first_line(body).as_bytes() {
            return Err(
                "its first line is not that of its content: it is damaged, or of another version"
                    .into(),
            );
        }
        let saved: Saved = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        if saved.of != self.of {
            return Err(format!("it is of {:?}", saved.of));
        }
        let (mut instances, mut mod_revisions) = (Instances::new(), ModRevisions::new());
        for saved in saved.instances {
            let (key, at, instance) = saved.into_instance();
            if let Some(at) = at {
                mod_revisions.insert(key.clone(), at);
            }
            instances.insert(key, Arc::new(instance));
        }
        Ok(Snapshot {
            range: self.of.range.as_str().into(),
            instances: Arc::new(instances),
            mod_revisions: Arc::new(mod_revisions),
            revision: saved.revision,
            freshness: Freshness::Stale {
                since: SystemTime::UNIX_EPOCH + Duration::from_millis(saved.saved_at),
                reason: format!("read from {}", self.path.display()).into(),
            },
            undecodable: saved.undecodable,
        })
    }

    fn write(&self, snapshot: &Snapshot) -> std::io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let saved_at = now.unwrap_or_default().as_millis();
        let instances = snapshot.iter().map(|(key, instance)| {
            SavedInstance::new(key, snapshot.mod_revisions.get(key).copied(), instance)
        });
        let saved = Saved {
            of: self.of.clone(),
            saved_at: u64::try_from(saved_at).unwrap_or(u64::MAX),
            revision: snapshot.revision,
            undecodable: snapshot.undecodable,
            instances: instances.collect(),
        };
        let body = serde_json::to_vec(&saved)?;
        // In the same folder, for a rename does not leave its file system. Of its own name, for another
        // process may be writing as well; removed if anything fails.
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        writeln!(file, "{}", first_line(&body))?;
        file.write_all(&body)?;
        file.as_file().sync_all()?;
        file.persist(&self.path).map_err(|failed| failed.error)?;
        Ok(())
    }
}

fn first_line(body: &[u8]) -> String {
    format!("{MAGIC} {:08x}", crc32fast::hash(body))
}

impl SavedInstance {
    fn new(key: &InstanceKey, mod_revision: Option<i64>, instance: &Instance) -> Self {
        // Each by name, so that a new one is not forgotten.
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

/// Writes what it is given, the newest of it. When it is dropped, what is not written yet is, at once or a
/// second later.
#[derive(Debug)]
pub(super) struct Keeper {
    newest: watch::Sender<Option<Snapshot>>,
}

impl Keeper {
    /// Its task ends after it.
    pub(super) fn of(cache: Cache) -> Self {
        let (newest, mut to_write) = watch::channel(None::<Snapshot>);
        tokio::spawn(async move {
            let cache = Arc::new(cache);
            let mut failed = false;
            while to_write.changed().await.is_ok() {
                let snapshot = to_write.borrow_and_update().clone();
                if let Some(snapshot) = snapshot {
                    let to = Arc::clone(&cache);
                    let written = tokio::task::spawn_blocking(move || to.write(&snapshot)).await;
                    let result = written.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
                    match &result {
                        // Once for all that fail alike.
                        Err(error) if !failed => tracing::warn!(
                            file = %cache.path.display(),
                            %error,
                            "the last known instances cannot be written"
                        ),
                        _ => {}
                    }
                    failed = result.is_err();
                }
                tokio::time::sleep(WRITE_EVERY).await;
            }
        });
        Self { newest }
    }

    /// Has this written, unless something newer comes first.
    pub(super) fn keep(&self, snapshot: &Snapshot) {
        self.newest.send_replace(Some(snapshot.clone()));
    }
}
