//! Transactions.

use etcd_client::{Compare, TxnOp, TxnResponse};

use super::handle::Client;
use crate::error::Result;

/// A transaction: if all comparisons hold, the `and_then` operations, otherwise the `or_else`
/// operations, all at one revision. Made by [`Client::txn`]; nothing is sent before
/// [`commit`](Txn::commit).
///
/// ```no_run
/// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
/// use goo_etcd::{Compare, CompareOp, TxnOp};
///
/// // Create only where nothing is.
/// let answer = client
///     .txn()
///     .when([Compare::create_revision("leader", CompareOp::Equal, 0)])
///     .and_then([TxnOp::put("leader", "me", None)])
///     .or_else([TxnOp::get("leader", None)])
///     .commit()
///     .await?;
/// println!("elected: {}", answer.succeeded());
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "a transaction does nothing until `commit`"]
pub struct Txn {
    client: Client,
    compares: Vec<Compare>,
    success: Vec<TxnOp>,
    failure: Vec<TxnOp>,
}

impl Client {
    /// Starts a transaction.
    pub fn txn(&self) -> Txn {
        Txn {
            client: self.clone(),
            compares: Vec::new(),
            success: Vec::new(),
            failure: Vec::new(),
        }
    }
}

impl Txn {
    /// Adds comparisons. All of them must hold; none at all hold always.
    pub fn when(mut self, compares: impl IntoIterator<Item = Compare>) -> Self {
        self.compares.extend(compares);
        self
    }

    /// Adds operations for when the comparisons hold.
    pub fn and_then(mut self, operations: impl IntoIterator<Item = TxnOp>) -> Self {
        self.success.extend(operations);
        self
    }

    /// Adds operations for when they do not.
    pub fn or_else(mut self, operations: impl IntoIterator<Item = TxnOp>) -> Self {
        self.failure.extend(operations);
        self
    }

    /// Sends the transaction. The answer tells which branch was taken and has the results of its
    /// operations.
    ///
    /// # Errors
    ///
    /// As for [`Client::put`]; after a timeout or a lost connection it may have happened or not.
    pub async fn commit(self) -> Result<TxnResponse> {
        let Txn {
            client,
            compares,
            success,
            failure,
        } = self;
        let (whens, thens, elses) = (compares.len(), success.len(), failure.len());
        let txn = etcd_client::Txn::new()
            .when(compares)
            .and_then(success)
            .or_else(failure);
        let mut kv = client.inner.transport.kv.clone();
        client
            .call(
                || format!("transaction of {whens} comparisons, {thens} and {elses} operations"),
                kv.txn(txn),
            )
            .await
    }
}
