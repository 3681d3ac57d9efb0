//! What the reconciler asks for, done at etcd.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::state::{Action, Ensure, Held, Outcome, Verdict, is_ours};
use crate::client::Client;
use crate::client::{
    Compare, CompareOp, KeyValue, PutOptions, RenewalStream, TxnOp, TxnOpResponse,
};
use crate::error::{Error, Result};

/// How often a transaction that lost a race against another writer is made anew before the registrar
/// pauses: more than a few in a row are no accident.
const MAX_CONFLICTS: usize = 5;

/// etcd, for one registrar.
pub(super) struct Executor {
    client: Client,
    ttl: Duration,
    /// The stream of renewals, and the lease that it is for.
    link: Mutex<Option<(i64, RenewalStream)>>,
}

impl Executor {
    pub(super) fn new(client: Client, ttl: Duration) -> Self {
        Self {
            client,
            ttl,
            link: Mutex::new(None),
        }
    }

    /// One piece of work, bounded by a third of the lease's time to live: there must be time for
    /// another attempt before the lease is gone.
    pub(super) async fn perform(&self, action: Action) -> (Action, Result<Outcome>) {
        let limit = self.ttl / 3;
        let result = match tokio::time::timeout(limit, self.execute(&action)).await {
            Ok(Err(Error::LeaseNotFound { .. })) => Ok(Outcome::LeaseGone),
            Ok(Err(error)) if error.code() == Some(tonic::Code::NotFound) => Ok(Outcome::LeaseGone),
            // A transaction does not say which keys it was about.
            Ok(Err(Error::Rpc { status, .. }))
                if matches!(action, Action::Ensure(_) | Action::Delete { .. }) =>
            {
                let operation = action.to_string();
                Err(Error::Rpc { operation, status })
            }
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                operation: action.to_string(),
                after: limit,
            }),
        };
        (action, result)
    }

    async fn execute(&self, action: &Action) -> Result<Outcome> {
        let client = &self.client;
        Ok(match action {
            Action::Grant => {
                let ttl = self.ttl.as_secs().try_into().unwrap_or(i64::MAX);
                let granted = client.grant(ttl).await?;
                Outcome::Granted {
                    lease: granted.id(),
                    ttl: Duration::from_secs(granted.ttl().max(1).unsigned_abs()),
                }
            }
            Action::Renew { lease } => {
                let link = self.link().take().filter(|(of, _)| of == lease);
                // So that there is time for two members, of which one may hang.
                let within = self.ttl / 6;
                let link = link.map(|(_, link)| link);
                let link = client.renew(*lease, link, within).await?;
                *self.link() = Some((*lease, link));
                Outcome::Renewed
            }
            Action::Ensure(ensure) => self.ensure(ensure).await?,
            Action::Delete { keys, ours, .. } => {
                self.delete(keys, ours).await?;
                Outcome::Done
            }
            Action::Revoke { lease } => {
                client.revoke(*lease).await?;
                Outcome::Done
            }
        })
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Option<(i64, RenewalStream)>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ensure(&self, ensure: &Ensure) -> Result<Outcome> {
        let pairs = ensure.pairs.iter().map(|(key, _)| key);
        let keys: Vec<&String> = pairs.chain(&ensure.gone).collect();
        for _ in 0..MAX_CONFLICTS {
            let (revision, mut found) = self.read(&keys).await?;
            let gone = found.split_off(ensure.pairs.len());
            let (put, delete) = match ensure.judge(&found, &gone) {
                Verdict::Fine => return Ok(Outcome::Ensured { revision }),
                Verdict::Superseded { by } => return Ok(Outcome::Superseded { by }),
                Verdict::Write { put, delete } => (put, delete),
            };
            let as_found = keys.iter().zip(found.iter().chain(&gone));
            let options = PutOptions::new().with_lease(ensure.lease);
            let put = put.iter().filter_map(|at| ensure.pairs.get(*at));
            let puts = put
                .map(|(key, value)| TxnOp::put(key.as_str(), value.clone(), Some(options.clone())));
            let deletes = delete.iter().filter_map(|at| ensure.gone.get(*at));
            let deletes = deletes.map(|key| TxnOp::delete(key.as_str(), None));
            if let Some(revision) = self.commit(as_found, puts.chain(deletes)).await? {
                return Ok(Outcome::Ensured { revision });
            }
        }
        Err(conflict_error())
    }

    async fn delete(&self, keys: &[String], ours: &[i64]) -> Result<()> {
        let keys: Vec<&String> = keys.iter().collect();
        for _ in 0..MAX_CONFLICTS {
            let (_, found) = self.read(&keys).await?;
            let ours = |held: &Option<Held>| held.as_ref().is_some_and(|held| is_ours(held, ours));
            let mine: Vec<_> = keys
                .iter()
                .zip(&found)
                .filter(|(_, held)| ours(held))
                .collect();
            let deletes = mine
                .iter()
                .map(|(key, _)| TxnOp::delete(key.as_str(), None));
            let as_found = mine.iter().copied();
            if mine.is_empty() || self.commit(as_found, deletes).await?.is_some() {
                return Ok(());
            }
        }
        Err(conflict_error())
    }

    /// What a quorum says is at each key, and the revision at which it is.
    async fn read(&self, keys: &[&String]) -> Result<(i64, Vec<Option<Held>>)> {
        let gets = keys.iter().map(|key| TxnOp::get(key.as_str(), None));
        let answer = self.client.txn().and_then(gets).commit().await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        let held = |kv: &KeyValue| Held {
            lease: kv.lease(),
            mod_revision: kv.mod_revision(),
            value: kv.value().to_vec(),
        };
        let mut found: Vec<Option<Held>> = answer
            .op_responses()
            .iter()
            .map(|response| match response {
                TxnOpResponse::Get(got) => got.kvs().first().map(held),
                _ => None,
            })
            .collect();
        found.resize(keys.len(), None);
        Ok((revision, found))
    }

    /// Writes if every key still is as it was found. That makes a write harmless which is late, for the
    /// answer was lost and something else was done since: it finds another revision.
    async fn commit<'a>(
        &self,
        as_found: impl Iterator<Item = (&'a &'a String, &'a Option<Held>)>,
        operations: impl Iterator<Item = TxnOp>,
    ) -> Result<Option<i64>> {
        let unchanged = as_found.map(|(key, held)| {
            let revision = held.as_ref().map_or(0, |held| held.mod_revision);
            Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)
        });
        let unchanged: Vec<Compare> = unchanged.collect();
        let transaction = self.client.txn().when(unchanged).and_then(operations);
        let answer = transaction.commit().await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(answer.succeeded().then_some(revision))
    }
}

fn conflict_error() -> Error {
    Error::Rpc {
        operation: "write".into(),
        status: Box::new(tonic::Status::aborted(
            "another writer changed the keys each time",
        )),
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Action::Grant => f.write_str("grant of a lease"),
            Action::Renew { lease } => write!(f, "keep-alive of lease {lease:x}"),
            Action::Ensure(ensure) => {
                write!(f, "put {}", list(ensure.pairs.iter().map(|(key, _)| key)))
            }
            Action::Delete { keys, .. } => write!(f, "delete {}", list(keys)),
            Action::Revoke { lease } => write!(f, "revoke of lease {lease:x}"),
        }
    }
}

fn list<'a>(keys: impl IntoIterator<Item = &'a String>) -> String {
    let keys: Vec<String> = keys.into_iter().map(|key| format!("{key:?}")).collect();
    keys.join(" and ")
}
