//! What etcd itself says has happened, to hold against what was shown.

use std::collections::BTreeMap;

use goo_etcd::Snapshot;
use goo_etcd::etcd_client::{EventType, WatchOptions};
use goo_etcd::testing::Etcd;

use super::TestResult;

/// One key's change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub revision: i64,
    pub key: String,
    /// `None` when it was deleted.
    pub value: Option<String>,
}

/// All changes under `services/`, from the first on. The history must not have been compacted.
pub async fn history(etcd: &Etcd) -> TestResult<Vec<Change>> {
    const END: &str = "end-of-history";
    let mut client = etcd.client().await?;
    client.put(END, "", None).await?;
    let everything = WatchOptions::new().with_all_keys().with_start_revision(1);
    let mut stream = client.watch("", Some(everything)).await?;
    let mut changes = Vec::new();
    while let Some(message) = super::soon("what etcd had", stream.message()).await? {
        if message.canceled() {
            return Err(format!("no history: {}", message.cancel_reason()).into());
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
    Err("the history ended before its end".into())
}

/// Panics unless each snapshot is what etcd's history was at its revision, and none is older than the
/// one before it.
pub fn assert_true_to_history(
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
        assert!(revision >= last, "back from revision {last} to {revision}");
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
