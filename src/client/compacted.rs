//! Calls at a revision that may have been compacted.
//!
//! etcd tells a watch the revision of the last compaction, but not a unary call. So after such a
//! refusal the client opens a watch that is compacted as well, and passes on what etcd says.

use std::future::Future;
use std::time::Duration;

use etcd_client::WatchFilterType;
use tokio::time::{Instant, timeout};

use super::etcd_error::EtcdError;
use super::handle::Client;
use super::watch::WatchOptions;
use crate::error::{Error, Result};

/// The first revision that can be compacted.
const FIRST_REVISION: i64 = 1;

/// How long etcd may take to cancel the watch. etcd does not cancel it at all if the history is
/// compacted up to revision 1 at most, or if the member has not compacted yet.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(1);

impl Client {
    /// Makes one call, as [`Client::call`] does, whose revision may have been compacted. `key` is
    /// one that the user may read.
    pub(super) async fn call_at_revision<T>(
        &self,
        key: &[u8],
        operation: impl Fn() -> String,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T> {
        let started = Instant::now();
        match self.call(operation, call).await {
            Err(error) if EtcdError::of(&error) == EtcdError::Compacted => {
                let left = self.request_timeout().saturating_sub(started.elapsed());
                let limit = left.min(LOOK_UP_TIMEOUT);
                // Boxed, because the future is large and rarely needed.
                let compact_revision = Box::pin(self.read_compact_revision(key, limit)).await;
                Err(Error::Compacted { compact_revision })
            }
            result => result,
        }
    }

    /// The revision of the last compaction, or 0 if etcd does not say it within `limit`.
    async fn read_compact_revision(&self, key: &[u8], limit: Duration) -> i64 {
        // Without events, in case the watch reaches a member that has not compacted yet.
        let options = WatchOptions::new()
            .with_start_revision(FIRST_REVISION)
            .with_filters([WatchFilterType::NoPut, WatchFilterType::NoDelete]);
        let compacted = async {
            let mut watch = self.open_watch(key, &options).await?;
            // etcd creates the watch, and cancels it up to 100 ms later.
            loop {
                watch.next().await?;
            }
        };
        match timeout(limit, compacted).await {
            Ok(Err::<(), _>(Error::Compacted { compact_revision })) => compact_revision,
            other => {
                tracing::debug!(?other, "cannot read the revision of the last compaction");
                0
            }
        }
    }
}
