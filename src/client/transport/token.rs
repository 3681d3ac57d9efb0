//! The user's token: its value, how old it is, and whose turn it is to renew it.

use std::future::Future;
use std::time::Duration;

use etcd_client::proto::PbAuthenticateResponse;
use http::{HeaderName, HeaderValue};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::time::Instant;
use tonic::metadata::AsciiMetadataValue;

use super::message::PREFIX;

/// The header of a call with the user's token.
pub(super) const HEADER: HeaderName = HeaderName::from_static("token");

/// The request of `Authenticate`. etcd-client does not export its own.
#[derive(Clone, PartialEq, prost::Message)]
struct AuthenticateRequest {
    #[prost(string, tag = "1")]
    name: String,
}

/// The user in a plain message of `Authenticate`. A program may also ask for the tokens of other
/// users, through the raw client.
pub(super) fn authenticated_user(message: &[u8]) -> Option<String> {
    let request = AuthenticateRequest::decode(message.get(PREFIX..)?).ok()?;
    Some(request.name)
}

/// How long a new token may be unknown to some member. Tokens reach the members in the order of
/// etcd's log, and a member may lag behind.
const SPREADS_WITHIN: Duration = Duration::from_secs(2);

/// The user's token, and the right to ask for another.
#[derive(Debug, Default)]
pub(in crate::client) struct Token {
    latest: Mutex<Option<IssuedToken>>,
    renewal: tokio::sync::Mutex<()>,
}

/// A token as etcd issued it.
#[derive(Debug)]
struct IssuedToken {
    value: AsciiMetadataValue,
    issued_at: Instant,
}

impl IssuedToken {
    fn is_new(&self) -> bool {
        self.issued_at.elapsed() < SPREADS_WITHIN
    }
}

impl Token {
    /// Records the token in a response to `Authenticate`, as etcd-client does.
    pub(super) fn record(&self, response: &[u8]) {
        let response = PbAuthenticateResponse::decode(response).ok();
        let value = response.and_then(|response| response.token.parse().ok());
        if let Some(mut value) = value {
            AsciiMetadataValue::set_sensitive(&mut value, true);
            let issued_at = Instant::now();
            *self.latest.lock() = Some(IssuedToken { value, issued_at });
        }
    }

    /// The token, for calls that etcd-client does not make.
    pub(in crate::client) fn value(&self) -> Option<AsciiMetadataValue> {
        let latest = self.latest.lock();
        latest.as_ref().map(|latest| latest.value.clone())
    }

    /// Whether some member may not know the token yet.
    pub(in crate::client) fn is_new(&self) -> bool {
        let latest = self.latest.lock();
        latest.as_ref().is_some_and(IssuedToken::is_new)
    }

    /// Whether a call was refused with the latest token, which some member may not know yet.
    pub(super) fn is_spreading(&self, sent: Option<&HeaderValue>) -> bool {
        let latest = self.latest.lock();
        let Some(latest) = latest.as_ref().filter(|latest| latest.is_new()) else {
            return false;
        };
        sent.is_some_and(|sent| sent.as_bytes() == latest.value.as_encoded_bytes())
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
        let latest = self.latest.lock().as_ref().map(|latest| latest.issued_at);
        if latest.is_some_and(|issued_at| issued_at >= since) {
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
        let issued = PbAuthenticateResponse {
            token: "t".to_owned(),
            ..PbAuthenticateResponse::default()
        };
        let renewals = AtomicU32::new(0);
        let since = Instant::now();
        let renew = async || {
            tokio::time::sleep(Duration::from_millis(50)).await;
            renewals.fetch_add(1, Ordering::Relaxed);
            token.record(&issued.encode_to_vec());
            Ok::<_, ()>(())
        };
        let callers = (0..10).map(|_| token.renew_unless_issued_since(since, renew()));
        futures::future::try_join_all(callers).await.unwrap();
        assert_eq!(renewals.load(Ordering::Relaxed), 1);
        let [sent, older] = ["t", "s"].map(HeaderValue::from_static);
        assert!(token.is_spreading(Some(&sent)));
        assert!(!token.is_spreading(Some(&older)));
        assert!(!token.is_spreading(None));

        tokio::time::sleep(SPREADS_WITHIN).await;
        assert!(!token.is_spreading(Some(&sent)));
        let later = Instant::now();
        token
            .renew_unless_issued_since(later, renew())
            .await
            .unwrap();
        assert_eq!(renewals.load(Ordering::Relaxed), 2);
    }
}
