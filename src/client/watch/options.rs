//! What a watch asks for, and what it yields.

use etcd_client::{Event, GetOptions, WatchFilterType};

/// Options of [`Client::watch`](crate::Client::watch). Without any, one key is watched from now on.
///
/// They are those of `etcd-client`, under the same names. A type of their own, since a watch that
/// resumes must know where it started; and there is no watch id, since each has a stream of its own.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct WatchOptions {
    options: etcd_client::WatchOptions,
    /// A read of what is watched.
    read: GetOptions,
    start_revision: Option<i64>,
    progress_notify: bool,
}

impl WatchOptions {
    /// One key, from now on.
    pub fn new() -> Self {
        Self::default()
    }

    /// All keys that start with the key.
    pub fn with_prefix(mut self) -> Self {
        self.options = self.options.with_prefix();
        self.read = self.read.with_prefix();
        self
    }

    /// All keys from the key up to `end`, without it.
    pub fn with_range(mut self, end: impl Into<Vec<u8>>) -> Self {
        let end = end.into();
        self.options = self.options.with_range(end.as_slice());
        self.read = self.read.with_range(end);
        self
    }

    /// All keys from the key on.
    pub fn with_from_key(mut self) -> Self {
        self.options = self.options.with_from_key();
        self.read = self.read.with_from_key();
        self
    }

    /// All keys there are.
    pub fn with_all_keys(mut self) -> Self {
        self.options = self.options.with_all_keys();
        self.read = self.read.with_all_keys();
        self
    }

    /// From this revision on, itself included; it may be in the past or to come. 0, as without
    /// this option, is now.
    pub fn with_start_revision(mut self, revision: i64) -> Self {
        self.start_revision = (revision > 0).then_some(revision);
        self
    }

    /// Yields etcd's own progress notifications too: responses without events, every ten minutes
    /// or as etcd is configured.
    pub fn with_progress_notify(mut self) -> Self {
        self.progress_notify = true;
        self
    }

    /// Leaves out puts or deletes.
    pub fn with_filters(mut self, filters: impl Into<Vec<WatchFilterType>>) -> Self {
        self.options = self.options.with_filters(filters);
        self
    }

    /// Each event has the key's previous value, where it is not compacted away.
    pub fn with_prev_key(mut self) -> Self {
        self.options = self.options.with_prev_key();
        self
    }

    pub(super) fn start_revision(&self) -> Option<i64> {
        self.start_revision
    }

    pub(super) fn wants_progress(&self) -> bool {
        self.progress_notify
    }

    /// What a user must be allowed to do who watches.
    pub(super) fn to_read(&self) -> GetOptions {
        self.read.clone().with_count_only()
    }

    pub(super) fn to_etcd(&self) -> etcd_client::WatchOptions {
        // Progress is always asked for: it costs a message every ten minutes, and moves the
        // revision to resume from along, so that an idle watch does not fall behind compaction. And
        // answers may be split: a history to catch up with may be any size, and messages may not.
        self.options
            .clone()
            .with_fragment()
            .with_start_revision(self.start_revision.unwrap_or_default())
            .with_progress_notify()
    }
}

/// What etcd sent on a watch: the events of one or more whole revisions, in order.
#[derive(Debug, Clone)]
pub struct WatchResponse {
    revision: i64,
    events: Vec<Event>,
}

impl WatchResponse {
    pub(super) fn new(revision: i64, events: Vec<Event>) -> Self {
        WatchResponse { revision, events }
    }

    /// etcd's revision when it sent this, at least that of the last event.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The events, in the order of their revisions; none in a progress notification.
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The events, in the order of their revisions; none in a progress notification.
    pub fn into_events(self) -> Vec<Event> {
        self.events
    }

    /// Whether this has no events and only says how far etcd is: every event up to
    /// [`revision`](Self::revision) has been yielded.
    pub fn is_progress(&self) -> bool {
        self.events.is_empty()
    }

    /// Drops the events before `revision`.
    pub(super) fn skip_before(&mut self, revision: i64) {
        self.events.retain(|event| mod_revision(event) >= revision);
    }

    /// The revision that follows all that this tells of.
    pub(super) fn next_revision(&self) -> i64 {
        match self.events.last() {
            Some(event) => mod_revision(event) + 1,
            None => self.revision + 1,
        }
    }
}

fn mod_revision(event: &Event) -> i64 {
    event.kv().map_or(0, |kv| kv.mod_revision())
}
