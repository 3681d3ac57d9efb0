//! One watch on one stream, until the stream is lost.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Event, GetOptions, WatchStream};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Status;

use super::options::{WatchOptions, WatchResponse};
use crate::backoff::Backoff;
use crate::client::etcd_error::{EtcdError, cancel_status};
use crate::client::handle::{Client, display_key};
use crate::client::transport::CallOptions;
use crate::error::{Error, Result};

/// How long a stream may be silent before the client sends a progress request: often enough to
/// notice a lost stream within tens of seconds, at the cost of one small message.
const PROGRESS_REQUEST_AFTER: Duration = Duration::from_secs(5);

/// How long the response to a progress request may take.
///
/// The sum with [`PROGRESS_REQUEST_AFTER`] is longer than the HTTP/2 keep-alive takes by default
/// (10 s and 3 s), which detects lost connections. So this only catches servers whose connection
/// works and whose watches do not. The limit is generous, because etcd responds only once the watch
/// has caught up with the history.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a watch is tried again after the user's token was renewed.
const MAX_TRIES: u32 = 4;

/// etcd's watch id in responses that belong to the stream and not to a watch (`InvalidWatchID`):
/// those to progress requests.
const NO_WATCH: i64 = -1;

/// A watch on one stream, without resuming after a loss as [`Watch`](super::Watch) does.
///
/// After an error it must not be used again. Dropping it cancels the watch at the server.
pub(crate) struct RawWatch {
    client: Client,
    key: Vec<u8>,
    options: WatchOptions,
    stream: WatchStream,
    /// The member at the other end of the stream.
    member: Option<Arc<str>>,
    start: Start,
    /// The events of the fragments of an incomplete response.
    fragments: Vec<Event>,
    revision: i64,
    last_message_at: Instant,
    /// When the outstanding progress request was sent.
    progress_requested_at: Option<Instant>,
}

/// The revision at which a watch started, while that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// etcd is past the first requested revision.
    Passed,
    /// The watch started at this revision, which may lie in the future. Until etcd reaches it, etcd
    /// does not respond to progress requests (from 3.5.22 and 3.6.2 on), so that the stream seems
    /// lost.
    At(i64),
    /// The watch started at the revision before this one. That revision exists, so etcd responds to
    /// progress requests. The events of that revision are removed.
    Before(i64),
}

impl Client {
    /// Opens a watch and waits until etcd has created it, within `request_timeout`.
    pub(crate) async fn open_watch(
        &self,
        key: impl Into<Vec<u8>>,
        options: &WatchOptions,
    ) -> Result<RawWatch> {
        let key = key.into();
        let create = || self.create_with_valid_token(&key, options);
        self.open_stream(|| operation(&key), create).await
    }

    /// Creates a watch. After a refusal, renews the user's token if needed and tries again, because
    /// etcd before 3.5.5 reports an expired token as "permission denied", and because each member
    /// forgets tokens separately.
    async fn create_with_valid_token(
        &self,
        key: &[u8],
        options: &WatchOptions,
    ) -> Result<RawWatch> {
        let started_at = Instant::now();
        match self.create_watch(key, options).await {
            Err(refused) if self.is_maybe_expired_token(&refused) => {}
            result => return result,
        }
        // The read fails if the user lacks the permission. If this member does not know the token
        // either, etcd-client renews it, once for all calls that find it expired.
        self.read_revision(key, options.to_read()).await?;
        let (mut pauses, mut tries, mut is_renewed) = (Backoff::for_etcd(), 0, false);
        loop {
            let sent_at = Instant::now();
            let refused = match self.create_watch(key, options).await {
                Err(refused) if self.is_maybe_expired_token(&refused) => refused,
                result => return result,
            };
            match EtcdError::of(&refused) {
                // Members learn of a new token one after another.
                EtcdError::InvalidToken if self.may_token_be_unknown(&refused) => {}
                // A change of a user or role has invalidated the token, however new it is.
                EtcdError::OldToken => self.renew_token(key, sent_at).await?,
                // Different members responded to the read and to the watch, and only one of them
                // knows the token. Every watch that was lost with a member gets here at the same
                // time, so they share one renewal: checking a password is expensive for etcd.
                _ if !is_renewed => {
                    is_renewed = true;
                    self.renew_token(key, started_at).await?;
                    continue;
                }
                _ if tries == MAX_TRIES => return Err(refused),
                _ => tries += 1,
            }
            sleep(pauses.next()).await;
        }
    }

    /// Whether etcd refused a token that is so new that a member may not know it yet.
    fn may_token_be_unknown(&self, refused: &Error) -> bool {
        let is_of_etcd = |status: &Status| status.message().starts_with("etcdserver: ");
        matches!(refused, Error::Rpc { status, .. } if is_of_etcd(status))
            && self.inner.transport.rpc.token().is_new()
    }

    async fn renew_token(&self, key: &[u8], since: Instant) -> Result<()> {
        let transport = &self.inner.transport;
        let renewing = transport.raw.refresh_token();
        let renewed = transport.rpc.renew_token(since, renewing).await;
        renewed.map_err(|error| Error::from_etcd(operation(key), error))
    }

    fn is_maybe_expired_token(&self, error: &Error) -> bool {
        self.inner.config.username.is_some() && EtcdError::of(error).is_auth_refusal()
    }

    async fn create_watch(&self, key: &[u8], options: &WatchOptions) -> Result<RawWatch> {
        let failed = |error| Error::from_etcd(operation(key), error);
        let mut watch = self.inner.transport.watch.clone();
        let mut stream = watch
            .watch(key, Some(options.to_etcd()))
            .await
            .map_err(failed)?;
        let created = stream
            .message()
            .await
            .map_err(failed)?
            .ok_or_else(|| watch_lost(key, "the stream ended before the watch was created"))?;
        if created.canceled() {
            return Err(cancel_error(key, &created));
        }
        if !created.created() {
            return Err(watch_lost(
                key,
                "the first response does not confirm the creation",
            ));
        }
        Ok(RawWatch {
            client: self.clone(),
            key: key.to_owned(),
            options: options.clone(),
            stream,
            member: CallOptions::current().last_attempted(),
            start: options.start_revision().map_or(Start::Passed, Start::At),
            fragments: Vec::new(),
            revision: created.header().map_or(0, |header| header.revision()),
            last_message_at: Instant::now(),
            progress_requested_at: None,
        })
    }

    /// etcd's current revision, confirmed by a quorum. The user must be allowed to read `key`.
    pub(crate) async fn current_revision(&self, key: &[u8]) -> Result<i64> {
        // etcd refuses to read the empty key.
        let one_key = if key.is_empty() { b"\0" } else { key };
        self.with_timeout(
            || read_operation(key),
            self.read_revision(one_key, GetOptions::new().with_count_only()),
        )
        .await
    }

    async fn read_revision(&self, key: &[u8], options: GetOptions) -> Result<i64> {
        let mut kv = self.inner.transport.kv.clone();
        let response = kv
            .get(key, Some(options))
            .await
            .map_err(|error| Error::from_etcd(read_operation(key), error))?;
        Ok(response.header().map_or(0, |header| header.revision()))
    }
}

impl RawWatch {
    /// etcd's revision when it created the watch. Without a start revision the watch yields all
    /// events after it.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// Waits for the next response: the events of whole revisions, or a progress notification.
    ///
    /// Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// - [`Error::Compacted`]: the start revision is compacted.
    /// - [`Error::Closed`]: the client was closed.
    /// - [`Error::StreamLost`]: the stream ended, or does not respond.
    /// - [`Error::Rpc`] with `Unauthenticated` or `PermissionDenied`: etcd cancelled the watch.
    /// - [`Error::Rpc`] with `OutOfRange`: a message exceeds `max_call_recv_msg_size`.
    pub(crate) async fn next(&mut self) -> Result<WatchResponse> {
        loop {
            let wake_at = match self.progress_requested_at {
                None => self.last_message_at + PROGRESS_REQUEST_AFTER,
                Some(sent_at) => sent_at + PROGRESS_TIMEOUT,
            };
            tokio::select! {
                biased;
                () = self.client.inner.closed.cancelled() => return Err(self.client.closed_error()),
                message = self.stream.message() => {
                    self.last_message_at = Instant::now();
                    self.progress_requested_at = None;
                    if let Some(response) = self.filter(message)? {
                        return Ok(response);
                    }
                }
                () = sleep_until(wake_at) => match self.progress_requested_at {
                    Some(_) => self.reopen_before_start().await?,
                    None => self.request_progress().await?,
                }
            }
        }
    }

    async fn request_progress(&mut self) -> Result<()> {
        self.stream
            .request_progress()
            .await
            .map_err(|_| watch_lost(&self.key, "the stream accepts no more requests"))?;
        self.progress_requested_at = Some(Instant::now());
        Ok(())
    }

    /// Handles a stream that did not respond to a progress request.
    ///
    /// etcd does not respond while the start revision lies in the future, so such a watch is
    /// reopened one revision earlier, once. Any other silent stream is lost. Watches do not start
    /// one revision earlier from the beginning, because a watch on an existing revision first has
    /// to catch up, which takes etcd 100 ms.
    async fn reopen_before_start(&mut self) -> Result<()> {
        let silent = || {
            let member = self.member.as_deref().unwrap_or("a member");
            let reason = format!(
                "the stream to {member} is silent and does not respond to a progress request"
            );
            watch_lost(&self.key, &reason)
        };
        let Start::At(start @ 2..) = self.start else {
            return Err(silent());
        };
        let options = self.options.clone().with_start_revision(start - 1);
        let reopened = self.client.open_watch(self.key.as_slice(), &options).await;
        let mut reopened = reopened.map_err(|error| {
            tracing::debug!(%error, "cannot reopen a silent watch");
            if self.client.is_closed() {
                error
            } else {
                silent()
            }
        })?;
        reopened.options = self.options.clone();
        reopened.start = Start::Before(start);
        // Callers know the revision at which the first stream was created.
        reopened.revision = self.revision;
        *self = reopened;
        Ok(())
    }

    /// Decodes a message, and removes events and errors that concern revisions before the start.
    fn filter(
        &mut self,
        message: Result<Option<etcd_client::WatchResponse>, etcd_client::Error>,
    ) -> Result<Option<WatchResponse>> {
        let response = self.decode(message).map_err(|error| match error {
            Error::Compacted { compact_revision }
                if matches!(self.start, Start::Before(start) if compact_revision <= start) =>
            {
                watch_lost(&self.key, "the revision before the start is compacted")
            }
            error
                if matches!(self.start, Start::Before(_))
                    && EtcdError::of(&error) == EtcdError::TooLarge =>
            {
                watch_lost(&self.key, "the revision before the start is too large")
            }
            error => error,
        })?;
        let Some(mut response) = response else {
            return Ok(None);
        };
        let (Start::At(start) | Start::Before(start)) = self.start else {
            return Ok(Some(response));
        };
        if !response.is_progress() {
            response.skip_before(start);
            if response.is_progress() {
                return Ok(None);
            }
        }
        if response.next_revision() > start {
            self.start = Start::Passed;
        }
        Ok(Some(response))
    }

    /// Converts a message into a response; `None` while there is nothing to yield.
    fn decode(
        &mut self,
        message: Result<Option<etcd_client::WatchResponse>, etcd_client::Error>,
    ) -> Result<Option<WatchResponse>> {
        let message = message
            .map_err(|error| {
                // `close` also ends the stream, which may be noticed before the cancellation.
                if self.client.is_closed() {
                    self.client.closed_error()
                } else if self.client.has_runtime_ended() {
                    self.client.runtime_error(operation(&self.key))
                } else {
                    Error::from_etcd(operation(&self.key), error)
                }
            })?
            .ok_or_else(|| watch_lost(&self.key, "the server ended the stream"))?;
        if message.canceled() {
            return Err(cancel_error(&self.key, &message));
        }
        // Before etcd 3.5.8 a response to a progress request may overtake events
        // (etcd-io/etcd#15220), so it only shows that the server is alive. etcd's own progress
        // notifications come in order.
        if message.watch_id() == NO_WATCH {
            return Ok(None);
        }
        let revision = message.header().map_or(0, |header| header.revision());
        // etcd may split a response in the middle of a revision; users see whole revisions.
        if message.0.fragment {
            self.fragments.extend_from_slice(message.events());
            return Ok(None);
        }
        let mut events = std::mem::take(&mut self.fragments);
        events.extend_from_slice(message.events());
        Ok(Some(WatchResponse::new(revision, events)))
    }
}

fn operation(key: &[u8]) -> String {
    format!("watch {}", display_key(key))
}

fn read_operation(key: &[u8]) -> String {
    format!("read the revision at {}", display_key(key))
}

fn watch_lost(key: &[u8], reason: &str) -> Error {
    Error::StreamLost {
        operation: operation(key),
        reason: reason.to_owned(),
    }
}

/// The error of a watch that etcd cancelled. etcd gives the reason only as text.
fn cancel_error(key: &[u8], message: &etcd_client::WatchResponse) -> Error {
    if message.compact_revision() > 0 {
        return Error::Compacted {
            compact_revision: message.compact_revision(),
        };
    }
    Error::Rpc {
        operation: operation(key),
        status: Box::new(cancel_status(message.cancel_reason())),
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests_on_etcd;
