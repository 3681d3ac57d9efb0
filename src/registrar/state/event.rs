//! The input of the step function: outcomes of actions, and changes that the watches report.

use std::time::Duration;

use tokio::time::Instant;

use super::action::Action;
use super::stored_key::StoredKey;
use crate::error::Error;

/// An occurrence outside the reconciler.
#[derive(Debug)]
pub(in crate::registrar) enum Event {
    /// The watch of `key` started, or saw a change.
    Key { key: String, event: KeyEvent },
    /// An action has finished.
    Finished {
        action: Action,
        outcome: ActionOutcome,
    },
    /// The client was closed; no further request can reach etcd.
    ClientClosed(Error),
}

/// A report of a key's watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) enum KeyEvent {
    /// The watch started. Changes before its start may have been missed.
    Started,
    /// The key was put, or deleted (`stored` is `None`), in this revision.
    Changed {
        revision: i64,
        stored: Option<StoredKey>,
    },
}

/// The outcome of an action.
#[derive(Debug)]
pub(in crate::registrar) enum ActionOutcome {
    /// etcd granted a lease, with the TTL that etcd chose.
    Granted { lease: i64, ttl: Duration },
    /// The lease was renewed, by a message sent at this time. That may be before the action began,
    /// if the response to an earlier renewal was still to come.
    Renewed { sent_at: Instant },
    /// The keys of the entry were read at the revision `read_at`, and all of them were as they
    /// should be at `revision`, which is later if they had to be written.
    Ensured { read_at: i64, revision: i64 },
    /// Another registration, which has the lease `by`, owns one of the keys, so no key was
    /// written.
    Superseded { by: i64 },
    /// The keys of the entry were read at the revision `read_at`, and none of them existed at
    /// `revision`, which is later if they had to be deleted.
    Deleted { read_at: i64, revision: i64 },
    /// The lease is revoked.
    Revoked,
    /// The lease does not exist: it expired or was revoked.
    LeaseGone,
    /// etcd refuses to renew or to revoke the lease, because the user may not write one of its keys.
    LeaseRefused(Error),
    /// The action failed; etcd may have applied it or not.
    Failed(Error),
}
