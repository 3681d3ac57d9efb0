//! The directory's state machine: what was heard goes in, what to do next comes out.
//!
//! ```text
//!            List                last page              watch lost, or compacted
//!   Empty ---------> Listing ----------------> Watching --------------------+
//!                    ^     |                                                |
//!                    |     | failed: wait, start over                       |
//!                    +-----+<-----------------------------------------------+
//! ```
//!
//! No I/O and no clock in here: time is passed in. Three rules keep what is shown true:
//!
//! - A list is shown only when it is whole, and all its pages are of the revision of the first.
//! - The watch starts at the revision after the list, so nothing falls between them.
//! - After a loss the next list replaces everything, so what vanished meanwhile vanishes.

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::SystemTime;

use super::merge;
use crate::format::{DecodeError, Format, KeyRange};
use crate::instance::Instance;
use crate::snapshot::{Freshness, InstanceKey, Instances, ModRevisions, Snapshot};

/// A key as a list page or an event shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: Vec<u8>,
    /// When the key came to be; another one, and it is not the same key any more.
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    /// `None` when it was deleted.
    pub(crate) value: Option<Vec<u8>>,
}

/// What was heard from etcd.
#[derive(Debug)]
pub(crate) enum Input {
    /// A page of the list; `revision` is the one the answer was given at.
    Page {
        entries: Vec<Entry>,
        more: bool,
        revision: i64,
    },
    /// The watch is open.
    Watching,
    /// Changes, all of those up to `revision`.
    Events { entries: Vec<Entry>, revision: i64 },
    /// The list or the watch failed, or the history it needed is compacted.
    Lost { reason: String },
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Todo {
    /// List from this key to the range's end; at `revision`, or at the newest.
    List {
        from: Vec<u8>,
        revision: Option<i64>,
    },
    /// Open a watch of the range that starts at this revision, and pass on what it brings.
    Watch { from_revision: i64 },
    /// Go on with the open watch.
    Listen,
    /// Wait a while, then list from the start.
    RelistAfterBackoff,
}

/// Where the machine stands.
#[derive(Debug)]
enum Phase {
    Empty,
    Listing { revision: i64, known: Known },
    Watching,
}

/// One key's last good value.
#[derive(Debug, Clone)]
struct Decoded {
    create_revision: i64,
    mod_revision: i64,
    /// Each with the key that it is shown under.
    instances: Vec<(InstanceKey, Arc<Instance>)>,
    /// Whether a later value of it could not be decoded.
    damaged: bool,
}

type Known = BTreeMap<Vec<u8>, Decoded>;

/// A directory of one service in one format under one prefix.
#[derive(Debug)]
pub(crate) struct Machine {
    format: Arc<dyn Format>,
    prefix: String,
    service: String,
    range: KeyRange,
    range_name: Arc<str>,
    /// Whether the address is what tells instances apart, and not the key.
    by_address: bool,
    phase: Phase,
    known: Known,
    revision: i64,
    freshness: Freshness,
    shown: Arc<Instances>,
    mod_revisions: Arc<ModRevisions>,
    /// Whether what is shown is older than what is known.
    outdated: bool,
    /// How many of what is known could not be decoded.
    damaged: usize,
}

impl Machine {
    pub(crate) fn new(format: Arc<dyn Format>, prefix: String, service: String) -> Self {
        let range = format.range(&prefix, &service);
        Self {
            range_name: String::from_utf8_lossy(&range.start).into(),
            by_address: format.merges_by_address(),
            format,
            prefix,
            service,
            range,
            phase: Phase::Empty,
            known: Known::new(),
            revision: 0,
            freshness: Freshness::Stale {
                since: SystemTime::now(),
                reason: "not listed yet".into(),
            },
            shown: Arc::default(),
            mod_revisions: Arc::default(),
            outdated: false,
            damaged: 0,
        }
    }

    /// Tells instances apart by address, whatever the format says.
    pub(crate) fn by_address(mut self) -> Self {
        self.by_address = true;
        self
    }

    pub(crate) fn is_by_address(&self) -> bool {
        self.by_address
    }

    pub(crate) fn format_name(&self) -> &'static str {
        self.format.name()
    }

    /// Shows what was known at another time, until there is a list. What was listed stays: it is newer.
    pub(crate) fn restore(&mut self, known: Snapshot) {
        self.phase = Phase::Empty;
        if self.revision == 0 {
            self.shown = known.instances;
            self.mod_revisions = known.mod_revisions;
            self.revision = known.revision;
            self.freshness = known.freshness;
            self.damaged = known.undecodable;
        }
    }

    pub(crate) fn range(&self) -> &KeyRange {
        &self.range
    }

    pub(crate) fn range_name(&self) -> &str {
        &self.range_name
    }

    pub(crate) fn service(&self) -> &str {
        &self.service
    }

    /// How many keys are known, and the newest revision at which one of them was written.
    pub(crate) fn summary(&self) -> (i64, i64) {
        let newest = self.known.values().map(|entry| entry.mod_revision).max();
        let count = i64::try_from(self.known.len()).unwrap_or(i64::MAX);
        (count, newest.unwrap_or_default())
    }

    /// The beginning: list everything.
    pub(crate) fn start(&self) -> Todo {
        Todo::List {
            from: self.range.start.clone(),
            revision: None,
        }
    }

    /// The whole picture as it stands now.
    pub(crate) fn snapshot(&mut self) -> Snapshot {
        if self.outdated {
            self.show();
        }
        Snapshot {
            range: Arc::clone(&self.range_name),
            instances: Arc::clone(&self.shown),
            mod_revisions: Arc::clone(&self.mod_revisions),
            revision: self.revision,
            freshness: self.freshness.clone(),
            undecodable: self.damaged,
        }
    }

    /// Takes what was heard. Returns what to do next, and whether [`snapshot`](Self::snapshot) has
    /// something new to show.
    pub(crate) fn step(&mut self, input: Input, now: SystemTime) -> (Todo, bool) {
        match input {
            Input::Page {
                entries,
                more,
                revision,
            } => self.page(entries, more, revision),
            // Only now: what changes from here on is heard of.
            Input::Watching => {
                let news = !self.freshness.is_live();
                self.freshness = Freshness::Live;
                (Todo::Listen, news)
            }
            Input::Events { entries, revision } => {
                let changed = self.events(entries, revision);
                (Todo::Listen, changed)
            }
            Input::Lost { reason } => {
                self.phase = Phase::Empty;
                // Since when matters more than the latest way in which it still fails.
                if self.freshness.is_live() {
                    self.freshness = Freshness::Stale {
                        since: now,
                        reason: reason.into(),
                    };
                    (Todo::RelistAfterBackoff, true)
                } else {
                    (Todo::RelistAfterBackoff, false)
                }
            }
        }
    }

    fn page(&mut self, entries: Vec<Entry>, more: bool, revision: i64) -> (Todo, bool) {
        let (pinned, mut known) = match std::mem::replace(&mut self.phase, Phase::Empty) {
            Phase::Listing { revision, known } => (revision, known),
            Phase::Empty | Phase::Watching => (revision, Known::new()),
        };
        let next_key = entries.last().map(|last| {
            // The smallest key after it.
            let mut next = last.key.clone();
            next.push(0);
            next
        });
        // What was known of another history says nothing about this one.
        let earlier = (pinned >= self.revision).then_some(&self.known);
        for entry in entries {
            self.learn(&mut known, earlier, entry);
        }
        // A page without entries cannot be followed by another, whatever it says.
        if let (true, Some(from)) = (more, next_key) {
            self.phase = Phase::Listing {
                revision: pinned,
                known,
            };
            let revision = Some(pinned);
            return (Todo::List { from, revision }, false);
        }
        // The list comes from a quorum, so a lower revision than before means that the history
        // itself went back: etcd was wiped or restored. The new history is the truth now.
        if pinned < self.revision {
            tracing::warn!(
                range = %self.range_name,
                before = self.revision,
                now = pinned,
                "etcd's revision went back; it was wiped or restored, following its new history"
            );
        }
        self.damaged = known.values().filter(|entry| entry.damaged).count();
        self.known = known;
        self.revision = pinned;
        self.phase = Phase::Watching;
        self.show();
        let from_revision = pinned + 1;
        (Todo::Watch { from_revision }, true)
    }

    fn events(&mut self, entries: Vec<Entry>, revision: i64) -> bool {
        let mut known = std::mem::take(&mut self.known);
        let mut changed = std::collections::BTreeSet::new();
        for entry in entries {
            // Heard before: a watch that was resumed may repeat itself.
            if entry.mod_revision <= self.revision {
                continue;
            }
            let key = entry.key.clone();
            // Of several changes of one key, what was there before the first is what is shown.
            if !self.by_address && !changed.contains(&key) {
                self.hide(known.get(&key));
            }
            let is_damaged = |known: &Known| known.get(&key).is_some_and(|entry| entry.damaged);
            let was_damaged = is_damaged(&known);
            if entry.value.is_some() {
                self.learn(&mut known, None, entry);
            } else {
                known.remove(&key);
            }
            self.damaged += usize::from(is_damaged(&known));
            self.damaged -= usize::from(was_damaged);
            changed.insert(key);
        }
        self.known = known;
        self.revision = self.revision.max(revision);
        if self.by_address {
            // All of it is looked at for that: not for each of many changes, but when somebody looks.
            self.outdated |= !changed.is_empty();
        } else {
            self.show_too(&changed);
        }
        !changed.is_empty()
    }

    /// Takes what an entry shows away; not by address, where another may show the same.
    fn hide(&mut self, entry: Option<&Decoded>) {
        for (key, _) in entry.iter().flat_map(|entry| &entry.instances) {
            Arc::make_mut(&mut self.shown).remove(key);
        }
    }

    /// Shows these entries as well: with thousands of others, only they are touched.
    fn show_too(&mut self, keys: &std::collections::BTreeSet<Vec<u8>>) {
        let entries = keys.iter().filter_map(|key| self.known.get(key));
        for (key, instance) in entries.flat_map(|entry| &entry.instances) {
            Arc::make_mut(&mut self.shown).insert(key.clone(), Arc::clone(instance));
        }
    }

    /// Decodes an entry into `known`. One that cannot be decoded leaves the last good value of its
    /// key in force: a slip of the hand must not take a server away from its clients.
    ///
    /// A list starts empty, so that the last good value may be that of `earlier`; but only of the same
    /// key: one that was deleted and made anew has none.
    fn learn(&self, known: &mut Known, earlier: Option<&Known>, entry: Entry) {
        let value = entry.value.as_deref().unwrap_or_default();
        let Entry {
            create_revision,
            mod_revision,
            ..
        } = entry;
        let before = known
            .remove(&entry.key)
            .or_else(|| earlier?.get(&entry.key).cloned());
        let same_key = |before: &Decoded| before.create_revision == create_revision;
        let decoded = match self.decode(&entry.key, value) {
            Ok(instances) => Decoded {
                create_revision,
                mod_revision,
                instances: self.keyed(&entry.key, instances, before.as_ref()),
                damaged: false,
            },
            Err(error) => {
                let before = before.filter(same_key);
                let said_already = before
                    .as_ref()
                    .is_some_and(|before| before.damaged && before.mod_revision == mod_revision);
                let instances = before.map(|before| before.instances).unwrap_or_default();
                if !said_already {
                    tracing::warn!(
                        key = %String::from_utf8_lossy(&entry.key),
                        mod_revision,
                        format = self.format.name(),
                        kept_last_good = !instances.is_empty(),
                        %error,
                        "an entry could not be decoded and is left out"
                    );
                }
                Decoded {
                    create_revision,
                    mod_revision,
                    instances,
                    damaged: true,
                }
            }
        };
        known.insert(entry.key, decoded);
    }

    /// One that panics has said as well that the value is none of its: what it does to one entry must not
    /// end what follows the others.
    fn decode(&self, key: &[u8], value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let decode = || self.format.decode(&self.prefix, &self.service, key, value);
        // It has nothing of ours that it could leave half done.
        std::panic::catch_unwind(AssertUnwindSafe(decode))
            .unwrap_or_else(|_| Err(DecodeError::new("the format panicked")))
    }

    /// Of several entries with one key the one written last counts: by address, it tells of the
    /// process that listens there now, the others of those before it.
    fn show(&mut self) {
        let mut entries: Vec<&Decoded> = self.known.values().collect();
        entries.sort_by_key(|entry| entry.mod_revision);
        let (mut shown, mut mod_revisions) = (Instances::new(), ModRevisions::new());
        for entry in entries {
            for (key, instance) in &entry.instances {
                if self.by_address {
                    mod_revisions.insert(key.clone(), entry.mod_revision);
                }
                shown.insert(key.clone(), Arc::clone(instance));
            }
        }
        self.shown = Arc::new(shown);
        self.mod_revisions = Arc::new(mod_revisions);
        self.outdated = false;
    }

    /// The decoded instances of an entry, with their keys. Those that are as before are the same allocation
    /// as before, which makes comparing snapshots cheap.
    fn keyed(
        &self,
        key: &[u8],
        instances: Vec<Instance>,
        before: Option<&Decoded>,
    ) -> Vec<(InstanceKey, Arc<Instance>)> {
        let before = before.map_or(&[][..], |before| &before.instances);
        // Not by their number where there may be several, so that each keeps its key when another
        // comes or goes.
        let several = self.format.holds_several() || instances.len() > 1;
        instances
            .into_iter()
            .enumerate()
            .map(|(at, instance)| {
                let instance = match before.get(at) {
                    Some((_, same)) if **same == instance => Arc::clone(same),
                    _ => Arc::new(instance),
                };
                (self.key_of(key, several, &instance), instance)
            })
            .collect()
    }

    fn key_of(&self, key: &[u8], several: bool, instance: &Instance) -> InstanceKey {
        if self.by_address {
            return merge::key_of(instance);
        }
        let key = String::from_utf8_lossy(key);
        if several {
            InstanceKey::new(format!("{key}#{}", instance.address))
        } else {
            InstanceKey::new(key)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{EtcdNaming, GoMicro};

    fn machine() -> Machine {
        Machine::new(Arc::new(EtcdNaming), "services".into(), "a".into())
    }

    fn put(id: &str, mod_revision: i64, address: &str) -> Entry {
        Entry {
            key: format!("services/a/{id}").into_bytes(),
            create_revision: 1,
            mod_revision,
            value: Some(format!(r#"{{"Addr":"{address}"}}"#).into_bytes()),
        }
    }

    fn raw(id: &str, mod_revision: i64, value: &str) -> Entry {
        let value = Some(value.as_bytes().to_vec());
        Entry {
            value,
            ..put(id, mod_revision, "")
        }
    }

    fn delete(id: &str, mod_revision: i64) -> Entry {
        Entry {
            value: None,
            ..put(id, mod_revision, "")
        }
    }

    fn page(entries: Vec<Entry>, more: bool, revision: i64) -> Input {
        Input::Page {
            entries,
            more,
            revision,
        }
    }

    fn events(entries: Vec<Entry>, revision: i64) -> Input {
        Input::Events { entries, revision }
    }

    fn lost() -> Input {
        let reason = "cut".into();
        Input::Lost { reason }
    }

    fn step(machine: &mut Machine, input: Input) -> (Todo, bool) {
        machine.step(input, SystemTime::now())
    }

    fn shown(machine: &mut Machine) -> Vec<String> {
        machine
            .snapshot()
            .iter()
            .map(|(key, instance)| {
                let id = key.as_str().trim_start_matches("services/a/");
                format!("{id}={}", instance.address)
            })
            .collect()
    }

    #[test]
    fn pages_are_pinned_to_the_revision_of_the_first_and_shown_only_when_whole() {
        let mut machine = machine();
        assert_eq!(
            machine.start(),
            Todo::List {
                from: b"services/a/".to_vec(),
                revision: None
            }
        );
        let (todo, news) = step(&mut machine, page(vec![put("1", 3, "h:1")], true, 10));
        assert_eq!(
            todo,
            Todo::List {
                from: b"services/a/1\0".to_vec(),
                revision: Some(10)
            }
        );
        assert!(!news);
        assert!(shown(&mut machine).is_empty());
        // The answer to a pinned page carries the newest revision; the pinned one counts.
        let (todo, news) = step(&mut machine, page(vec![put("2", 4, "h:2")], false, 15));
        assert_eq!(todo, Todo::Watch { from_revision: 11 });
        assert!(news);
        assert_eq!(shown(&mut machine), ["1=h:1", "2=h:2"]);
        assert_eq!(machine.snapshot().revision(), 10);
        // A list alone is not kept current.
        assert!(!machine.snapshot().freshness().is_live());
        assert_eq!(step(&mut machine, Input::Watching), (Todo::Listen, true));
        assert!(machine.snapshot().freshness().is_live());
    }

    #[test]
    fn a_batch_of_changes_is_one_snapshot_and_a_repeated_one_is_none() {
        let mut machine = machine();
        step(&mut machine, page(vec![put("1", 3, "h:1")], false, 10));
        let batch = || events(vec![put("2", 11, "h:2"), delete("1", 11)], 11);
        assert_eq!(step(&mut machine, batch()), (Todo::Listen, true));
        assert_eq!(shown(&mut machine), ["2=h:2"]);
        assert_eq!(step(&mut machine, batch()), (Todo::Listen, false));
        assert_eq!(shown(&mut machine), ["2=h:2"]);
    }

    #[test]
    fn after_a_loss_the_last_known_stays_marked_stale_until_a_list_replaces_it() {
        let mut machine = machine();
        let listed = vec![put("1", 3, "h:1"), put("2", 3, "h:2")];
        step(&mut machine, page(listed, false, 10));
        step(&mut machine, Input::Watching);
        let kept = Arc::clone(machine.snapshot().instances().next().unwrap());
        let first = SystemTime::UNIX_EPOCH;
        assert_eq!(
            machine.step(lost(), first),
            (Todo::RelistAfterBackoff, true)
        );
        assert_eq!(
            step(&mut machine, lost()),
            (Todo::RelistAfterBackoff, false)
        );
        assert_eq!(shown(&mut machine), ["1=h:1", "2=h:2"]);
        let reason: Arc<str> = "cut".into();
        let since = first;
        assert_eq!(
            *machine.snapshot().freshness(),
            Freshness::Stale { since, reason }
        );
        step(&mut machine, page(vec![put("1", 3, "h:1")], false, 20));
        assert_eq!(shown(&mut machine), ["1=h:1"]);
        let stale_still = machine.snapshot().freshness().clone();
        assert!(matches!(stale_still, Freshness::Stale { since, .. } if since == first));
        step(&mut machine, Input::Watching);
        assert!(machine.snapshot().freshness().is_live());
        // What did not change is the very same, so that nobody reconnects to it.
        assert!(Arc::ptr_eq(
            &kept,
            machine.snapshot().instances().next().unwrap()
        ));
    }

    #[test]
    fn a_loss_between_pages_starts_the_list_over() {
        let mut machine = machine();
        step(&mut machine, page(vec![put("1", 3, "h:1")], true, 10));
        step(&mut machine, lost());
        let (todo, _) = step(&mut machine, page(vec![put("2", 12, "h:2")], false, 12));
        assert_eq!(todo, Todo::Watch { from_revision: 13 });
        assert_eq!(shown(&mut machine), ["2=h:2"]);
    }

    #[test]
    fn an_undecodable_value_is_skipped_and_a_bad_overwrite_keeps_the_last_good_one() {
        let mut machine = machine();
        let listed = vec![put("1", 3, "h:1"), raw("2", 3, "nonsense")];
        step(&mut machine, page(listed, false, 10));
        assert_eq!(shown(&mut machine), ["1=h:1"]);
        assert_eq!(machine.snapshot().undecodable(), 1);
        step(&mut machine, events(vec![raw("1", 11, "nonsense")], 11));
        assert_eq!(shown(&mut machine), ["1=h:1"]);
        assert_eq!(machine.snapshot().undecodable(), 2);
        // The same over a re-list.
        step(&mut machine, lost());
        let listed = vec![raw("1", 11, "nonsense"), put("2", 12, "h:2")];
        step(&mut machine, page(listed, false, 12));
        assert_eq!(shown(&mut machine), ["1=h:1", "2=h:2"]);
        step(&mut machine, events(vec![delete("1", 13)], 13));
        assert_eq!(shown(&mut machine), ["2=h:2"]);
        assert_eq!(machine.snapshot().undecodable(), 0);
    }

    #[test]
    fn by_address_several_keys_are_one_until_the_last_is_gone_and_the_latest_counts() {
        let mut machine = machine().by_address();
        let zone = |id: &str, mod_revision, zone: &str| {
            let value = format!(r#"{{"Addr":"h:1","Metadata":{{"zone":"{zone}"}}}}"#);
            raw(id, mod_revision, &value)
        };
        let shown = |machine: &mut Machine| -> Vec<(String, Option<String>)> {
            let look = |(key, instance): (&InstanceKey, &Arc<Instance>)| {
                (key.to_string(), instance.zone.clone())
            };
            machine.snapshot().iter().map(look).collect()
        };
        let at = |zone: &str| vec![("h:1".to_owned(), Some(zone.to_owned()))];
        let listed = vec![zone("1", 4, "new"), zone("2", 3, "old")];
        step(&mut machine, page(listed, false, 10));
        assert_eq!(shown(&mut machine), at("new"));
        step(&mut machine, events(vec![zone("2", 11, "newer")], 11));
        assert_eq!(shown(&mut machine), at("newer"));
        // Also when nobody has looked before the next thing happens.
        step(&mut machine, events(vec![delete("2", 12)], 12));
        step(&mut machine, lost());
        assert_eq!(shown(&mut machine), at("new"));
        step(&mut machine, events(vec![delete("1", 13)], 13));
        assert_eq!(shown(&mut machine), []);
    }

    #[test]
    fn of_several_in_one_value_each_keeps_its_key_whoever_comes_and_goes_beside_it() {
        let mut machine = Machine::new(Arc::new(GoMicro), "services".into(), "a".into());
        let nodes = |mod_revision, ports: &[u16]| {
            // All with one id, as careless writers have it.
            let node = |port| format!(r#"{{"id":"1","address":"h:{port}"}}"#);
            let nodes: Vec<String> = ports.iter().map(node).collect();
            let value = format!(r#"{{"nodes":[{}]}}"#, nodes.join(","));
            raw("1", mod_revision, &value)
        };
        let shown = |machine: &mut Machine| -> Vec<String> {
            let snapshot = machine.snapshot();
            snapshot.iter().map(|(key, _)| key.to_string()).collect()
        };
        let (first, second) = ("services/a/1#h:1", "services/a/1#h:2");
        step(&mut machine, page(vec![nodes(3, &[1])], false, 10));
        assert_eq!(shown(&mut machine), [first]);
        step(&mut machine, events(vec![nodes(11, &[2, 1])], 11));
        assert_eq!(shown(&mut machine), [first, second]);
        step(&mut machine, events(vec![nodes(12, &[2])], 12));
        assert_eq!(shown(&mut machine), [second]);
    }

    #[test]
    fn a_key_that_was_deleted_and_made_anew_has_no_last_good_value() {
        let remade = |mod_revision| Entry {
            create_revision: mod_revision,
            ..raw("1", mod_revision, "nonsense")
        };
        let mut machine = machine();
        step(&mut machine, page(vec![put("1", 3, "h:1")], false, 10));
        step(&mut machine, lost());
        step(&mut machine, page(vec![remade(12)], false, 12));
        assert!(shown(&mut machine).is_empty());
        // Nor has one in another history, whatever its revisions.
        step(&mut machine, events(vec![put("2", 13, "h:2")], 13));
        step(&mut machine, lost());
        step(&mut machine, page(vec![raw("2", 3, "nonsense")], false, 4));
        assert!(shown(&mut machine).is_empty());
    }

    #[test]
    fn a_wiped_etcd_is_followed_to_its_new_history_even_at_the_same_revisions() {
        let mut machine = machine();
        step(&mut machine, page(vec![put("1", 3, "h:1")], false, 10));
        step(&mut machine, lost());
        step(&mut machine, page(vec![put("1", 3, "h:9")], false, 4));
        assert_eq!(shown(&mut machine), ["1=h:9"]);
        assert_eq!(machine.snapshot().revision(), 4);
        step(&mut machine, events(vec![put("2", 5, "h:2")], 5));
        assert_eq!(shown(&mut machine), ["1=h:9", "2=h:2"]);
    }
}
