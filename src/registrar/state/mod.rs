//! The registrar's state machine: given the desired registrations and the known state of etcd, it
//! chooses the next request to etcd.
//!
//! A [`Reconciler`] holds one [`Entry`](entry::Entry) per registration, and the lease that their
//! keys are under. The handles change the desired state ([`register`](Reconciler::register),
//! [`update`](Reconciler::update), [`set_ready`](Reconciler::set_ready),
//! [`deregister`](Reconciler::deregister)). The driver calls [`step`](Reconciler::step), performs
//! the returned [`Action`], and reports its [`ActionOutcome`] and the changes that the watches saw
//! to [`on_event`](Reconciler::on_event). The state machine does no I/O and reads no clock.
//!
//! The status of an entry has the latest reason why etcd differs from the desired state. New states
//! and new reasons are logged and announced once; see [`status`].
//!
//! No entry is ever given up: a failed action is retried, and after the loss of a lease all entries
//! are written again under a new one.
//!
//! # States
//!
//! ```text
//!             ready                 written               update
//!   Unready <--------> Registering ----------> Registered <------> Draining
//!           not ready       |                    |     ^
//!                           |              fault |     | written again, or the lease was renewed
//!             another owner |                    v     |
//!                           |                   Recovering
//!                           v                    |
//!                      Superseded <--------------+ another owner
//!                           |
//!                           +---> Registered, once the other owner's key is gone
//!
//!   any state ---- a deletion failed ----> Removing ----> Unready, Deregistered or Registering
//!   any state ---- deregister, and the keys are gone ----> Deregistered
//! ```
//!
//! # Requests
//!
//! One mutation runs at a time: grant a lease, *ensure* an entry's keys (read them and correct them
//! in a transaction), delete an entry's keys, or revoke the lease. A renewal of the lease may run
//! beside it. The lease is renewed at a third of its TTL, and revoked when no entry needs it any
//! more.
//!
//! # Faults
//!
//! **Lease lost.** etcd responds to a renewal or a write with "lease not found", because the lease
//! expired or was revoked. The keys are gone with the lease. All entries become `Recovering`; after
//! a random pause of up to 500 ms ([`MAX_RECOVERY_JITTER`](reconciler::MAX_RECOVERY_JITTER)) a new
//! lease is granted, and every entry is written under it.
//!
//! **Lease refused.** Some releases of etcd refuse to renew or to revoke a lease when the user may
//! not write one of its keys any more. Another lease is granted at once, and the entries, which are
//! `Recovering` until then, are written under it. Their keys may be under two leases for that time,
//! so they are deleted one by one.
//!
//! **No response from etcd.** A failed renewal is retried after a backoff of 50 ms to 1 s. When the
//! TTL has passed without a confirmed renewal, the entries become `Recovering`. The renewals
//! continue, because only etcd decides whether the lease is gone: if the next one succeeds, the
//! keys still exist and the entries are `Registered` again; otherwise the lease is lost, as above.
//!
//! **Response lost.** An action that times out may have been applied, or may be applied later. Each
//! write is conditional on the revisions that were read before, so a late write that would undo a
//! newer one fails. A late write can still create a key that did not exist. Therefore the keys of
//! an entry with a late write stay watched until its lease is gone, even after the entry was
//! deregistered, and are deleted if they appear.
//!
//! **Key deleted or overwritten by hand.** The key's watch reports the change. The entry becomes
//! `Recovering` and its keys are restored: at once after an overwrite, after the random pause after
//! a deletion, because an expired lease looks the same. If another client repeats the change within
//! 10 s, the pauses grow to 1 s.
//!
//! **Key owned by another registration.** A key under a lease that this registrar was never granted
//! belongs to another process. The later registration wins: a new entry takes such a key over, and
//! an entry that had the keys before becomes `Superseded`. A superseded entry waits until its watch
//! reports that the key changed, and then checks the key again. If two processes lose their leases
//! at the same time, the first to write keeps the key.
//!
//! **etcd wiped or restored.** The watches start again, and every entry is checked. If the lease is
//! unknown to etcd, it is lost, as above. A key of another process that is older than the revision
//! at which the entry had the keys comes from the restored snapshot. That process may have ended
//! since, so the entry takes the key over. If etcd has the lease, keys that were deleted since the
//! snapshot may be back under it. Another lease replaces it, and such keys expire with it.
//!
//! **Watch lost.** The new watch may have missed changes, so its start causes a check.
//!
//! **etcd full** (`RESOURCE_EXHAUSTED`), or another fault of etcd as a whole: all mutations wait
//! for the backoff, and the failed entry goes to the back of the queue. Among new requests,
//! deletions come first, because a full etcd still accepts them. Renewals continue.
//!
//! **Permission denied**, or another refusal of one entry: only that entry pauses, and is retried
//! after its own backoff because permissions can change.
//!
//! **Client closed.** All entries become `Recovering` with the error, and no further action
//! follows.

mod action;
mod ensure;
mod entry;
mod event;
mod key_event;
mod lease;
mod outcome;
mod presence;
mod reconciler;
mod registration_state;
mod request;
mod retry_schedule;
mod status;
mod stored_key;

pub(super) use action::{Action, Step, Timestamp};
pub(super) use ensure::{Ensure, EntryId, Records, TargetRecords, WritePlan};
pub(super) use event::{ActionOutcome, Event, KeyEvent};
pub(super) use presence::{Desired, Readiness};
pub(super) use reconciler::Reconciler;
pub use registration_state::RegistrationState;
pub(super) use request::Overlap;
pub(super) use status::{EntryHandle, Status};
pub(super) use stored_key::StoredKey;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
