//! etcd's own history of the keys, to compare with the snapshots of a directory.

use std::collections::BTreeMap;

use goo_etcd::Snapshot;
use goo_etcd::etcd_client::{EventType, WatchOptions};
use goo_etcd::testing::Etcd;

use super::TestResult;

/// A change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub revision: i64,
    pub key: String,
    /// `None` if the key was deleted.
    pub value: Option<String>,
}

/// Reads all changes under `services/` since the first revision. Fails if the history is compacted.
pub async fn history(etcd: &Etcd) -> TestResult<Vec<Change>> {
    const END: &str = "end-of-history";
    let mut client = etcd.client().await?;
    client.put(END, "", None).await?;
    let everything = WatchOptions::new().with_all_keys().with_start_revision(1);
    let mut stream = client.watch("", Some(everything)).await?;
    let mut changes = Vec::new();
    while let Some(message) = super::wait_for("the history", stream.message()).await? {
        if message.canceled() {
            return Err(format!("the watch was cancelled: {}", message.cancel_reason()).into());
        }
        for event in message.events() {
            let Some(kv) = event.kv() else { continue };
            match kv.key_str()? {
                END => return Ok(changes),
                key if key.starts_with("services/") => changes.push(Change {
                    revision: kv.mod_revision(),
                    key: key.to_owned(),
                    value: match event.event_type() {
                        EventType::Put => Some(kv.value_str()?.to_owned()),
                        EventType::Delete => None,
                    },
                }),
                _ => {}
            }
        }
    }
    Err("the watch ended before the last change".into())
}

/// Asserts that each snapshot equals etcd's state at its revision, and that revisions never
/// decrease.
pub fn assert_matches_history(
    history: &[Change],
    service: &str,
    snapshots: &[impl AsRef<Snapshot>],
) {
    let range = format!("services/{service}/");
    let mut changes = history
        .iter()
        .filter(|change| change.key.starts_with(&range))
        .peekable();
    let mut truth: BTreeMap<&str, &str> = BTreeMap::new();
    let mut last = 0;
    for snapshot in snapshots {
        let snapshot = snapshot.as_ref();
        let revision = snapshot.revision();
        assert!(
            revision >= last,
            "the revision decreased from {last} to {revision}"
        );
        last = revision;
        while let Some(change) = changes.next_if(|change| change.revision <= revision) {
            match &change.value {
                Some(value) => truth.insert(&change.key, value),
                None => truth.remove(change.key.as_str()),
            };
        }
        let shown: BTreeMap<String, String> = snapshot
            .iter()
            .map(|(key, instance)| (key.to_string(), super::value(&instance.address)))
            .collect();
        let missing: Vec<_> = truth
            .iter()
            .filter(|(key, value)| shown.get(**key).is_none_or(|shown| shown != *value))
            .collect();
        let wrong: Vec<_> = shown
            .iter()
            .filter(|(key, value)| truth.get(key.as_str()) != Some(&value.as_str()))
            .collect();
        assert!(
            missing.is_empty() && wrong.is_empty(),
            "not the state at revision {revision}: missing {missing:?}, wrong {wrong:?}"
        );
    }
}
