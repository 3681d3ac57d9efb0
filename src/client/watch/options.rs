//! The options of a watch, and its responses.

use etcd_client::{Event, GetOptions, WatchFilterType};

/// Options of [`Client::watch`](crate::Client::watch). The default watches one key from now on.
///
/// The options have the names of those of `etcd-client`. The type is different, because a watch
/// that resumes must know where it started. There is no watch id, because each watch has its own
/// stream.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct WatchOptions {
    options: etcd_client::WatchOptions,
    /// A read of the watched keys.
    read: GetOptions,
    start_revision: Option<i64>,
    progress_notify: bool,
}

impl WatchOptions {
    /// Watches one key, from now on.
    pub fn new() -> Self {
        Self::default()
    }

    /// Watches all keys that start with the key.
    pub fn with_prefix(mut self) -> Self {
        self.options = self.options.with_prefix();
        self.read = self.read.with_prefix();
        self
    }

    /// Watches all keys from the key up to, but not including, `end`.
    pub fn with_range(mut self, end: impl Into<Vec<u8>>) -> Self {
        let end = end.into();
        self.options = self.options.with_range(end.as_slice());
        self.read = self.read.with_range(end);
        self
    }

    /// Watches the key and all keys after it.
    pub fn with_from_key(mut self) -> Self {
        self.options = self.options.with_from_key();
        self.read = self.read.with_from_key();
        self
    }

    /// Watches all keys.
    pub fn with_all_keys(mut self) -> Self {
        self.options = self.options.with_all_keys();
        self.read = self.read.with_all_keys();
        self
    }

    /// Starts at this revision, inclusive, which may be in the past or in the future. 0 means from
    /// now on, which is the default.
    pub fn with_start_revision(mut self, revision: i64) -> Self {
        self.start_revision = (revision > 0).then_some(revision);
        self
    }

    /// Yields etcd's progress notifications too. These are responses without events; etcd sends
    /// them every ten minutes by default.
    pub fn with_progress_notify(mut self) -> Self {
        self.progress_notify = true;
        self
    }

    /// Leaves out puts or deletes.
    pub fn with_filters(mut self, filters: impl Into<Vec<WatchFilterType>>) -> Self {
        self.options = self.options.with_filters(filters);
        self
    }

    /// Adds to each event the previous value of its key, unless that value is compacted.
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

    /// A read that needs the same permissions as the watch.
    pub(super) fn to_read(&self) -> GetOptions {
        self.read.clone().with_count_only()
    }

    pub(super) fn to_etcd(&self) -> etcd_client::WatchOptions {
        // Always with progress notifications: one small message every ten minutes moves the
        // revision to resume from, so that an idle watch does not fall behind compaction. Always
        // fragmented, because the history to catch up with may exceed the size limit of a message.
        self.options
            .clone()
            .with_fragment()
            .with_start_revision(self.start_revision.unwrap_or_default())
            .with_progress_notify()
    }
}

/// A response of a watch: the events of one or more whole revisions, in order.
#[derive(Debug, Clone)]
pub struct WatchResponse {
    revision: i64,
    events: Vec<Event>,
}

impl WatchResponse {
    pub(super) fn new(revision: i64, events: Vec<Event>) -> Self {
        WatchResponse { revision, events }
    }

    /// etcd's revision when it sent the response; at least the revision of the last event.
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

    /// Whether the response is a progress notification: it has no events, and every event up to
    /// [`revision`](Self::revision) was yielded.
    pub fn is_progress(&self) -> bool {
        self.events.is_empty()
    }

    /// Removes the events before `revision`.
    pub(super) fn skip_before(&mut self, revision: i64) {
        self.events.retain(|event| mod_revision(event) >= revision);
    }

    /// The revision after the last revision in the response.
    pub(super) fn next_revision(&self) -> i64 {
        match self.events.last() {
            Some(event) => mod_revision(event) + 1,
            None => self.revision + 1,
        }
    }
}

impl PartialEq for WatchResponse {
    fn eq(&self, other: &Self) -> bool {
        // `etcd_client::Event` does not compare, but the message inside it does.
        let theirs = other.events.iter().map(|event| &event.0);
        self.revision == other.revision && self.events.iter().map(|event| &event.0).eq(theirs)
    }
}

fn mod_revision(event: &Event) -> i64 {
    event.kv().map_or(0, |kv| kv.mod_revision())
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::{PbEvent, PbKeyValue};

    use super::*;

    fn event(key: &str, mod_revision: i64) -> Event {
        let kv = PbKeyValue {
            key: key.into(),
            mod_revision,
            ..PbKeyValue::default()
        };
        Event(PbEvent {
            kv: Some(kv),
            ..PbEvent::default()
        })
    }

    #[test]
    fn responses_compare_by_revision_and_events() {
        let response = |revision, key| WatchResponse::new(revision, vec![event(key, 5)]);
        assert_eq!(response(5, "a"), response(5, "a"));
        assert_ne!(response(5, "a"), response(6, "a"));
        assert_ne!(response(5, "a"), response(5, "b"));
        assert_ne!(response(5, "a"), WatchResponse::new(5, Vec::new()));
    }

    #[test]
    fn events_before_a_revision_are_skipped() {
        let mut response = WatchResponse::new(9, vec![event("a", 5), event("b", 6)]);
        response.skip_before(6);
        assert_eq!(response, WatchResponse::new(9, vec![event("b", 6)]));
        assert_eq!(response.next_revision(), 7);
        response.skip_before(7);
        assert!(response.is_progress());
        assert_eq!(response.next_revision(), 10);
    }
}
