//! Transactions.

use etcd_client::{Compare, TxnOp, TxnResponse};

use super::handle::Client;
use crate::error::Result;

/// A transaction, from [`Client::txn`].
///
/// If all comparisons hold, etcd executes the [`and_then`](Self::and_then) operations, otherwise
/// the [`or_else`](Self::or_else) operations, all at one revision. etcd gets nothing before
/// [`commit`](Self::commit).
///
/// ```no_run
/// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
/// use goo_etcd::{Compare, CompareOp, TxnOp};
///
/// // Creates the key only if it does not exist.
/// let response = client
///     .txn()
///     .when([Compare::create_revision("leader", CompareOp::Equal, 0)])
///     .and_then([TxnOp::put("leader", "me", None)])
///     .or_else([TxnOp::get("leader", None)])
///     .commit()
///     .await?;
/// println!("elected: {}", response.succeeded());
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
    /// Adds comparisons, which must all hold. Without any comparison, the transaction succeeds.
    pub fn when(mut self, compares: impl IntoIterator<Item = Compare>) -> Self {
        self.compares.extend(compares);
        self
    }

    /// Adds operations to execute if the comparisons hold.
    pub fn and_then(mut self, operations: impl IntoIterator<Item = TxnOp>) -> Self {
        self.success.extend(operations);
        self
    }

    /// Adds operations to execute if a comparison does not hold.
    pub fn or_else(mut self, operations: impl IntoIterator<Item = TxnOp>) -> Self {
        self.failure.extend(operations);
        self
    }

    /// Sends the transaction. The response says which branch was executed and has the results of
    /// its operations.
    ///
    /// # Errors
    ///
    /// The errors of [`Client::put`], and [`Error::Compacted`](crate::Error::Compacted) if an
    /// operation reads at a revision that is compacted. After a timeout or a lost connection, the
    /// transaction may or may not have been executed.
    pub async fn commit(self) -> Result<TxnResponse> {
        let Txn {
            client,
            compares,
            success,
            failure,
        } = self;
        let (when, then, otherwise) = (compares.len(), success.len(), failure.len());
        let txn = etcd_client::Txn::new()
            .when(compares)
            .and_then(success)
            .or_else(failure);
        let mut kv = client.inner.transport.kv.clone();
        client
            .call_at_revision(
                b"",
                || format!("transaction of {when} comparisons, {then} and {otherwise} operations"),
                kv.txn(txn),
            )
            .await
    }
}
