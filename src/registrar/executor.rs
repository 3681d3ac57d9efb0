//! Performs the reconciler's actions at etcd.

use std::fmt;
use std::pin::pin;
use std::time::Duration;

use parking_lot::Mutex;

use super::state::{Action, ActionOutcome, Ensure, StoredKey, WritePlan};
use crate::client::etcd_error::EtcdError;
use crate::client::{
    AttemptRecord, Client, Compare, CompareOp, PutOptions, Renewals, TxnOp, TxnOpResponse,
};
use crate::error::{Error, Result};

/// The number of attempts of a transaction that fails because another client changed the keys since
/// they were read. More conflicts in a row are no accident, so the reconciler pauses instead.
const MAX_CONFLICTS: usize = 5;

/// Performs the actions of one reconciler.
pub(super) struct Executor {
    client: Client,
    ttl: Duration,
    /// `None` while there is no lease to renew.
    renewals: Mutex<Option<Renewals>>,
}

impl Executor {
    pub(super) fn new(client: Client, ttl: Duration) -> Self {
        Self {
            client,
            ttl,
            renewals: Mutex::new(None),
        }
    }

    /// Performs one action within a third of the lease's TTL, which leaves time for another attempt
    /// before the lease expires. A renewal has two thirds, which is how long the lease lasts when
    /// the renewal is due. Within that time the client sends the renewal to several members.
    ///
    /// `record` gets the attempts at the members of etcd.
    pub(super) async fn perform(
        &self,
        action: Action,
        record: AttemptRecord,
    ) -> (Action, Result<ActionOutcome>) {
        let result = match self.execute_in_time(&action, record).await {
            Err(error) if EtcdError::of(&error) == EtcdError::LeaseNotFound => {
                Ok(ActionOutcome::LeaseGone)
            }
            Err(error) if is_refusal_of_lease(&action, &error) => {
                Ok(ActionOutcome::LeaseRefused(error))
            }
            Err(error) => Err(name_keys(error, &action)),
            Ok(outcome) => Ok(outcome),
        };
        (action, result)
    }

    async fn execute_in_time(
        &self,
        action: &Action,
        record: AttemptRecord,
    ) -> Result<ActionOutcome> {
        // Passed on by reference, because the future is large.
        let work = pin!(self.execute(action));
        let operation = || action.to_string();
        let limit = match action {
            Action::Renew { .. } => self.ttl * 2 / 3,
            _ => self.ttl / 3,
        };
        self.client
            .within_recorded(limit, operation, record, work)
            .await
    }

    async fn execute(&self, action: &Action) -> Result<ActionOutcome> {
        match action {
            Action::Grant => self.grant().await,
            Action::Renew { lease } => self.renew(*lease).await,
            Action::Ensure(ensure) => {
                let outcome = self.ensure(ensure).await?;
                outcome.ok_or_else(|| conflict_error(action))
            }
            Action::Delete {
                keys, own_leases, ..
            } => {
                let outcome = self.delete(keys, own_leases).await?;
                outcome.ok_or_else(|| conflict_error(action))
            }
            Action::Revoke { lease } => {
                *self.renewals.lock() = None;
                self.client.revoke(*lease).await?;
                Ok(ActionOutcome::Revoked)
            }
        }
    }

    async fn grant(&self) -> Result<ActionOutcome> {
        let ttl = self.ttl.as_secs().try_into().unwrap_or(i64::MAX);
        let granted = self.client.grant(ttl).await?;
        Ok(ActionOutcome::Granted {
            lease: granted.id(),
            ttl: Duration::from_secs(granted.ttl().max(1).unsigned_abs()),
        })
    }

    async fn renew(&self, lease: i64) -> Result<ActionOutcome> {
        let renewals = self
            .renewals
            .lock()
            .get_or_insert_with(|| self.client.renewals())
            .clone();
        let sent_at = renewals.renew(lease, self.ttl).await?;
        Ok(ActionOutcome::Renewed { sent_at })
    }

    /// Brings an entry's keys into etcd; `None` after too many conflicts.
    async fn ensure(&self, ensure: &Ensure) -> Result<Option<ActionOutcome>> {
        let record_keys = ensure.records.iter().map(|(key, _)| key);
        let keys: Vec<&String> = record_keys.chain(&ensure.stale_keys).collect();
        for _ in 0..MAX_CONFLICTS {
            let (read_at, mut found) = self.read(&keys).await?;
            let stale = found.split_off(ensure.records.len());
            let (put, delete) = match ensure.plan(&found, &stale) {
                WritePlan::UpToDate => {
                    let revision = read_at;
                    return Ok(Some(ActionOutcome::Ensured { read_at, revision }));
                }
                WritePlan::Superseded { by } => return Ok(Some(ActionOutcome::Superseded { by })),
                WritePlan::Write { put, delete } => (put, delete),
            };
            let as_read = keys.iter().zip(found.iter().chain(&stale));
            let options = PutOptions::new().with_lease(ensure.lease);
            let records = put.iter().filter_map(|index| ensure.records.get(*index));
            let puts = records
                .map(|(key, value)| TxnOp::put(key.as_str(), value.clone(), Some(options.clone())));
            let stale_keys = delete.iter().filter_map(|at| ensure.stale_keys.get(*at));
            let deletes = stale_keys.map(|key| TxnOp::delete(key.as_str(), None));
            if let Some(revision) = self.commit(as_read, puts.chain(deletes)).await? {
                return Ok(Some(ActionOutcome::Ensured { read_at, revision }));
            }
        }
        Ok(None)
    }

    /// Deletes the keys that this registrar owns; `None` after too many conflicts.
    async fn delete(&self, keys: &[String], own_leases: &[i64]) -> Result<Option<ActionOutcome>> {
        let keys: Vec<&String> = keys.iter().collect();
        let is_own = |stored: &Option<StoredKey>| {
            let stored = stored.as_ref();
            stored.is_some_and(|stored| stored.is_own(own_leases))
        };
        for _ in 0..MAX_CONFLICTS {
            let (read_at, found) = self.read(&keys).await?;
            let found = keys.iter().zip(&found);
            let own: Vec<_> = found.filter(|(_, stored)| is_own(stored)).collect();
            if own.is_empty() {
                let revision = read_at;
                return Ok(Some(ActionOutcome::Deleted { read_at, revision }));
            }
            let deletes = own.iter().map(|(key, _)| TxnOp::delete(key.as_str(), None));
            let as_read = own.iter().copied();
            if let Some(revision) = self.commit(as_read, deletes).await? {
                return Ok(Some(ActionOutcome::Deleted { read_at, revision }));
            }
        }
        Ok(None)
    }

    /// Reads the keys in one linearizable transaction. Returns the revision of the read, and the
    /// stored key for each of `keys`.
    async fn read(&self, keys: &[&String]) -> Result<(i64, Vec<Option<StoredKey>>)> {
        let gets = keys.iter().map(|key| TxnOp::get(key.as_str(), None));
        let response = self.client.txn().and_then(gets).commit().await?;
        let revision = response.header().map_or(0, |header| header.revision());
        let mut found: Vec<Option<StoredKey>> = response
            .op_responses()
            .iter()
            .map(|response| match response {
                TxnOpResponse::Get(got) => got.kvs().first().map(StoredKey::from),
                _ => None,
            })
            .collect();
        found.resize(keys.len(), None);
        Ok((revision, found))
    }

    /// Writes if no key has changed since it was read; `None` if one has. The comparison makes a
    /// late write harmless: a write with a lost response that etcd applies after a newer one finds
    /// another revision.
    async fn commit<'a>(
        &self,
        as_read: impl Iterator<Item = (&'a &'a String, &'a Option<StoredKey>)>,
        operations: impl Iterator<Item = TxnOp>,
    ) -> Result<Option<i64>> {
        let unchanged = as_read.map(|(key, stored)| {
            // etcd reports revision 0 for a key that does not exist.
            let revision = stored.as_ref().map_or(0, |stored| stored.mod_revision);
            Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)
        });
        let unchanged: Vec<Compare> = unchanged.collect();
        let transaction = self.client.txn().when(unchanged).and_then(operations);
        let response = transaction.commit().await?;
        let revision = response.header().map_or(0, |header| header.revision());
        Ok(response.succeeded().then_some(revision))
    }
}

fn is_refusal_of_lease(action: &Action, error: &Error) -> bool {
    let is_of_lease = matches!(action, Action::Renew { .. } | Action::Revoke { .. });
    let is_refusal = |status: &tonic::Status| EtcdError::is_refusal_of_lease(status);
    is_of_lease && matches!(error, Error::Rpc { status, .. } if is_refusal(status))
}

fn conflict_error(action: &Action) -> Error {
    Error::Conflict {
        operation: action.to_string(),
        attempts: MAX_CONFLICTS,
    }
}

/// Names the action's keys in the error of a transaction, which the client calls just "txn".
fn name_keys(error: Error, action: &Action) -> Error {
    if !matches!(action, Action::Ensure(_) | Action::Delete { .. }) {
        return error;
    }
    let operation = action.to_string();
    match error {
        Error::Rpc { status, .. } => Error::Rpc { operation, status },
        Error::NotConnected { after, reason, .. } => Error::NotConnected {
            operation,
            after,
            reason,
        },
        Error::Timeout { after, reason, .. } => Error::Timeout {
            operation,
            after,
            reason,
        },
        other => other,
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Grant => f.write_str("grant of a lease"),
            Action::Renew { lease } => write!(f, "keep-alive of lease {lease:x}"),
            Action::Ensure(ensure) => {
                let keys = ensure.records.iter().map(|(key, _)| key);
                write!(f, "put {}", quote(keys))
            }
            Action::Delete { keys, .. } => write!(f, "delete {}", quote(keys)),
            Action::Revoke { lease } => write!(f, "revoke of lease {lease:x}"),
        }
    }
}

fn quote<'a>(keys: impl IntoIterator<Item = &'a String>) -> String {
    let keys: Vec<String> = keys.into_iter().map(|key| format!("{key:?}")).collect();
    keys.join(" and ")
}
