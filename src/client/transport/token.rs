//! The user's token: its value, how old it is, and whose turn it is to renew it.

use std::future::Future;
use std::time::Duration;

use etcd_client::proto::PbAuthenticateResponse;
use parking_lot::Mutex;
use prost::Message as _;
use tokio::time::Instant;
use tonic::metadata::AsciiMetadataValue;

/// How long a new token may be unknown to some member. Tokens reach the members in the order of
/// etcd's log, and a member may lag behind.
const SPREADS_WITHIN: Duration = Duration::from_secs(2);

/// The user's token, when etcd issued it, and the right to ask for another.
#[derive(Debug, Default)]
pub(in crate::client) struct Token {
    value: Mutex<Option<AsciiMetadataValue>>,
    issued_at: Mutex<Option<Instant>>,
    renewal: tokio::sync::Mutex<()>,
}

impl Token {
    pub(super) fn record_issued(&self) {
        *self.issued_at.lock() = Some(Instant::now());
    }

    /// Records the token in a response to `Authenticate`, as etcd-client does.
    pub(super) fn record_value(&self, response: &[u8]) {
        let response = PbAuthenticateResponse::decode(response).ok();
        let value = response.and_then(|response| response.token.parse().ok());
        *self.value.lock() = value.map(|mut value: AsciiMetadataValue| {
            value.set_sensitive(true);
            value
        });
    }

    /// The token, for calls that etcd-client does not make.
    pub(in crate::client) fn value(&self) -> Option<AsciiMetadataValue> {
        self.value.lock().clone()
    }

    /// Whether some member may not know the token yet.
    pub(in crate::client) fn is_new(&self) -> bool {
        let issued_at = *self.issued_at.lock();
        issued_at.is_some_and(|issued_at| issued_at.elapsed() < SPREADS_WITHIN)
    }

    /// Renews the token by `renew`, unless etcd has issued one after `since`. Of the callers that
    /// wait at the same time, one renews the token for all.
    pub(super) async fn renew_unless_issued_since<E>(
        &self,
        since: Instant,
        renew: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        // Held across the await on purpose: the others wait for this renewal and then find its
        // token.
        let _turn = self.renewal.lock().await;
        let issued_at = *self.issued_at.lock();
        if issued_at.is_some_and(|issued_at| issued_at >= since) {
            return Ok(());
        }
        renew.await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn concurrent_callers_share_one_renewal() {
        let token = Token::default();
        let renewals = AtomicU32::new(0);
        let since = Instant::now();
        let renew = async || {
            tokio::time::sleep(Duration::from_millis(50)).await;
            renewals.fetch_add(1, Ordering::Relaxed);
            token.record_issued();
            Ok::<_, ()>(())
        };
        let callers = (0..10).map(|_| token.renew_unless_issued_since(since, renew()));
        futures::future::try_join_all(callers).await.unwrap();
        assert_eq!(renewals.load(Ordering::Relaxed), 1);
        assert!(token.is_new());

        tokio::time::sleep(SPREADS_WITHIN).await;
        assert!(!token.is_new());
        let later = Instant::now();
        token
            .renew_unless_issued_since(later, renew())
            .await
            .unwrap();
        assert_eq!(renewals.load(Ordering::Relaxed), 2);
    }
}
