//! The events and actions that pass between the state machine and its driver.

use std::fmt;

/// A key and its value at one revision, from a list page or a watch event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KeyValueAt {
    pub(super) key: Vec<u8>,
    /// The revision that created the key. A key that was deleted and created again has another one.
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    /// `None` after a deletion.
    pub(super) value: Option<Vec<u8>>,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) entries: Vec<KeyValueAt>,
    /// Whether the range has more keys after the last entry.
    pub(super) more: bool,
    /// etcd's revision when it responded, which may be newer than the revision of the entries.
    pub(super) revision: i64,
}

/// Changes from a watch: all changes up to `revision` that were not sent before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) entries: Vec<KeyValueAt>,
    pub(super) revision: i64,
}

/// Tells two states of a range apart without comparing every key: another history has the same
/// fingerprint only by an unlikely accident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fingerprint {
    /// The number of keys.
    pub(super) count: i64,
    /// The highest modification revision of a key, or 0 without keys.
    pub(super) newest: i64,
}

/// The result of an [`Action`]. `W` is an open watch.
pub(super) enum Event<W> {
    Page(Page),
    WatchOpened(W),
    Changes(Changes),
    /// The list or the watch failed, or etcd has compacted the history that it needs.
    Lost {
        reason: String,
    },
    BackoffElapsed,
}

/// The next thing that the driver must do. `W` is an open watch.
#[derive(PartialEq, Eq)]
pub(super) enum Action<'a, W> {
    /// List the keys from `from` to the end of the range, at `revision` or at the newest revision.
    List {
        from: &'a [u8],
        revision: Option<i64>,
    },
    /// Open a watch that starts at `from_revision`. The list before it has the fingerprint
    /// `listed`.
    Watch {
        from_revision: i64,
        listed: Fingerprint,
    },
    /// Wait for the next changes from the open watch.
    Receive(&'a mut W),
    /// Wait before the next list.
    Backoff,
}

impl<W> fmt::Debug for Action<'_, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::List { from, revision } => f
                .debug_struct("List")
                .field("from", &String::from_utf8_lossy(from))
                .field("revision", revision)
                .finish(),
            Self::Watch {
                from_revision,
                listed,
            } => f
                .debug_struct("Watch")
                .field("from_revision", from_revision)
                .field("listed", listed)
                .finish(),
            Self::Receive(_) => f.write_str("Receive"),
            Self::Backoff => f.write_str("Backoff"),
        }
    }
}
