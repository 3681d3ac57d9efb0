//! One watch on one stream, until it is lost.

use std::time::Duration;

use etcd_client::{Event, GetOptions, WatchStream};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::{Code, Status};

use super::options::{WatchOptions, WatchResponse};
use crate::client::handle::{Client, OLD_TOKEN, shown};
use crate::error::{Error, Result};

/// How long a stream may be silent before etcd is asked whether it is still there: often enough
/// to notice within tens of seconds, rare enough to cost nothing (one small message).
const ASK_AFTER: Duration = Duration::from_secs(5);

/// How long the answer may take. Longer than the connection's own test takes by default (10 s
/// and 3 s, together with `ASK_AFTER`), so this is left for servers whose connection works and
/// whose watches do not; and since etcd answers only when the watch has caught up with
/// the history, it is not tight.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// etcd's watch id for answers that belong to the stream, not to a watch (`InvalidWatchID`):
/// those to progress requests.
const NO_WATCH: i64 = -1;

/// One watch on one stream. It does not resume; what does is [`Watch`](super::Watch).
///
/// After an error it is spent. Dropping it cancels the watch at the server.
pub(crate) struct RawWatch {
    client: Client,
    key: Vec<u8>,
    options: WatchOptions,
    stream: WatchStream,
    start: Start,
    /// The events of an answer that is not complete yet.
    fragments: Vec<Event>,
    revision: i64,
    heard: Instant,
    asked: Option<Instant>,
}

/// Where a watch began, as far as it still matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// Etcd is past the first revision that is asked for.
    Passed,
    /// At this revision, and it may be one that is yet to come. Until it is there etcd answers no question
    /// for progress (from 3.5.22 and 3.6.2 on), and may be taken for silent.
    At(i64),
    /// At the revision before it, which is there, so that etcd answers; what is of that one is left out.
    Before(i64),
}

impl Client {
    /// Opens a watch and waits until etcd has created it, within `request_timeout`.
    ///
    /// A refusal is tried again after the user's token was renewed, if need be: etcd before 3.5.5
    /// calls an expired token "permission denied" as well, and each member forgets tokens by itself.
    pub(crate) async fn open_watch(
        &self,
        key: impl Into<Vec<u8>>,
        options: &WatchOptions,
    ) -> Result<RawWatch> {
        let key = key.into();
        self.opened_stream(|| watching(&key), || self.create_as_user(&key, options))
            .await
    }

    async fn create_as_user(&self, key: &[u8], options: &WatchOptions) -> Result<RawWatch> {
        let begun = Instant::now();
        let refused = match self.create(key, options).await {
            Err(refused) if self.may_be_expired(&refused) => refused,
            result => return result,
        };
        // Answers with the user's real rights; and where this member does not know the token
        // either, it is renewed on the way, once for all calls that find it expired.
        self.read_revision(key, options.to_read()).await?;
        match self.create(key, options).await {
            Err(again) if self.may_be_expired(&again) => {}
            result => return result,
        }
        // The two were answered by different members, of which one knows the token. Every watch that was
        // lost with a member finds this at the same time, and a password costs etcd much.
        let transport = &self.inner.transport;
        let renewed = transport
            .wire
            .renewed_since(begun, transport.raw.refresh_token());
        renewed
            .await
            .map_err(|error| Error::from_etcd(watching(key), error))?;
        for pause in [0, 50, 200, 500] {
            sleep(Duration::from_millis(pause)).await;
            match self.create(key, options).await {
                Err(again) if self.may_be_expired(&again) => {}
                result => return result,
            }
        }
        Err(refused)
    }

    fn may_be_expired(&self, error: &Error) -> bool {
        self.inner.config.username.is_some()
            && matches!(
                error.code(),
                Some(Code::Unauthenticated | Code::PermissionDenied)
            )
    }

    async fn create(&self, key: &[u8], options: &WatchOptions) -> Result<RawWatch> {
        let failed = |error| Error::from_etcd(watching(key), error);
        let mut watch = self.inner.transport.watch.clone();
        let mut stream = watch
            .watch(key, Some(options.to_etcd()))
            .await
            .map_err(failed)?;
        let created = stream
            .message()
            .await
            .map_err(failed)?
            .ok_or_else(|| lost(key, "the stream ended before the watch was created"))?;
        if created.canceled() {
            return Err(canceled(key, &created));
        }
        if !created.created() {
            return Err(lost(
                key,
                "the first answer does not say that it was created",
            ));
        }
        Ok(RawWatch {
            client: self.clone(),
            key: key.to_owned(),
            options: options.clone(),
            stream,
            start: options.start_revision().map_or(Start::Passed, Start::At),
            fragments: Vec::new(),
            revision: created.header().map_or(0, |header| header.revision()),
            heard: Instant::now(),
            asked: None,
        })
    }

    /// etcd's present revision, agreed on by a majority of the members. The key is one that
    /// the user may read.
    pub(crate) async fn current_revision(&self, key: &[u8]) -> Result<i64> {
        let one = if key.is_empty() { b"\0" } else { key };
        self.bounded(
            || format!("read the revision at {}", shown(key)),
            self.read_revision(one, GetOptions::new().with_count_only()),
        )
        .await
    }

    async fn read_revision(&self, key: &[u8], options: GetOptions) -> Result<i64> {
        let mut kv = self.inner.transport.kv.clone();
        let answer = kv.get(key, Some(options)).await.map_err(|error| {
            Error::from_etcd(format!("read the revision at {}", shown(key)), error)
        })?;
        Ok(answer.header().map_or(0, |header| header.revision()))
    }
}

impl RawWatch {
    /// etcd's revision when it created the watch. A watch from "now" yields what comes after it.
    pub(crate) fn revision(&self) -> i64 {
        self.revision
    }

    /// What comes next: the events of whole revisions, or etcd's own progress notification.
    ///
    /// Cancel-safe: dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Compacted`]; [`Error::Closed`]; [`Error::Rpc`] with `Unavailable` when the stream
    /// is lost or silent, `Unauthenticated` or `PermissionDenied` when etcd takes the watch away,
    /// `OutOfRange` when a message exceeds `max_call_recv_msg_size`.
    pub(crate) async fn next(&mut self) -> Result<WatchResponse> {
        loop {
            let wake = match self.asked {
                None => self.heard + ASK_AFTER,
                Some(asked) => asked + ANSWER_WITHIN,
            };
            tokio::select! {
                biased;
                () = self.client.inner.closed.cancelled() => return Err(self.client.closed()),
                message = self.stream.message() => {
                    self.heard = Instant::now();
                    self.asked = None;
                    if let Some(response) = self.accept(message)? {
                        return Ok(response);
                    }
                }
                () = sleep_until(wake) => {
                    if self.asked.is_some() {
                        self.ask_otherwise().await?;
                        continue;
                    }
                    self.stream
                        .request_progress()
                        .await
                        .map_err(|_| lost(&self.key, "the stream takes no more requests"))?;
                    self.asked = Some(Instant::now());
                }
            }
        }
    }

    /// What is silent is lost, unless it may be so only because it begins at a revision that is yet to come.
    /// Then it is opened once more, in a way that can be asked. All begin as they should nevertheless: one
    /// from a revision that is there has to catch up first, which takes etcd a tenth of a second.
    async fn ask_otherwise(&mut self) -> Result<()> {
        let silent = || {
            lost(
                &self.key,
                "the stream is silent, even when asked for progress",
            )
        };
        let Start::At(start @ 2..) = self.start else {
            return Err(silent());
        };
        let options = self.options.clone().with_start_revision(start - 1);
        let again = self.client.open_watch(self.key.as_slice(), &options).await;
        let mut again = again.map_err(|error| {
            tracing::debug!(%error, "a silent watch cannot be opened once more");
            if self.client.is_closed() {
                error
            } else {
                silent()
            }
        })?;
        again.options = self.options.clone();
        again.start = Start::Before(start);
        // What it was created at is what its user goes by.
        again.revision = self.revision;
        *self = again;
        Ok(())
    }

    fn accept(
        &mut self,
        message: Result<Option<etcd_client::WatchResponse>, etcd_client::Error>,
    ) -> Result<Option<WatchResponse>> {
        let response = self.received(message).map_err(|error| match error {
            // Of what was not asked for.
            Error::Compacted { compact_revision }
                if matches!(self.start, Start::Before(start) if compact_revision <= start) =>
            {
                lost(&self.key, "the revision before its first is compacted")
            }
            error if matches!(self.start, Start::Before(_)) && is_too_large(&error) => {
                lost(&self.key, "what is before its first revision is too large")
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

    fn received(
        &mut self,
        message: Result<Option<etcd_client::WatchResponse>, etcd_client::Error>,
    ) -> Result<Option<WatchResponse>> {
        let message = message
            .map_err(|error| {
                // The client's own end of the connection is cut by `close`, which may be noticed
                // here first.
                if self.client.is_closed() {
                    self.client.closed()
                } else {
                    Error::from_etcd(watching(&self.key), error)
                }
            })?
            .ok_or_else(|| lost(&self.key, "the server ended the stream"))?;
        if message.canceled() {
            return Err(canceled(&self.key, &message));
        }
        // Before etcd 3.5.8 the answer to a progress request may overtake events
        // (etcd-io/etcd#15220): it shows that the server is alive, and nothing else. Its own
        // notifications come in order.
        if message.watch_id() == NO_WATCH {
            return Ok(None);
        }
        let revision = message.header().map_or(0, |header| header.revision());
        // What etcd splits may be in the middle of a revision, and is shown whole.
        if message.0.fragment {
            self.fragments.extend_from_slice(message.events());
            return Ok(None);
        }
        let mut events = std::mem::take(&mut self.fragments);
        events.extend_from_slice(message.events());
        Ok(Some(WatchResponse::new(revision, events)))
    }
}

fn watching(key: &[u8]) -> String {
    format!("watch {}", shown(key))
}

fn lost(key: &[u8], reason: &str) -> Error {
    Error::Rpc {
        operation: watching(key),
        status: Box::new(Status::unavailable(reason)),
    }
}

fn is_too_large(error: &Error) -> bool {
    error.code() == Some(Code::OutOfRange)
}

/// etcd tells why it cancels a watch in words only.
fn canceled(key: &[u8], message: &etcd_client::WatchResponse) -> Error {
    if message.compact_revision() > 0 {
        return Error::Compacted {
            compact_revision: message.compact_revision(),
        };
    }
    Error::Rpc {
        operation: watching(key),
        status: Box::new(reason_status(message.cancel_reason())),
    }
}

fn reason_status(reason: &str) -> Status {
    // The texts of etcd's `rpctypes`.
    let code = if reason.contains("invalid auth token") || reason.contains(OLD_TOKEN) {
        Code::Unauthenticated
    } else if reason.contains("permission denied") {
        Code::PermissionDenied
    } else if reason.contains("user name is empty") || reason.contains("duplicate ID") {
        Code::InvalidArgument
    } else {
        Code::Unavailable
    };
    let text = match reason {
        "" => "etcd canceled the watch without a reason",
        reason => reason,
    };
    Status::new(code, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_a_cancel_reason_then_its_code_says_what_can_be_done() {
        for (reason, code) in [
            ("etcdserver: invalid auth token", Code::Unauthenticated),
            (
                "etcdserver: revision of auth store is old",
                Code::Unauthenticated,
            ),
            ("etcdserver: permission denied", Code::PermissionDenied),
            ("etcdserver: user name is empty", Code::InvalidArgument),
            ("etcdserver: no leader", Code::Unavailable),
            ("", Code::Unavailable),
        ] {
            assert_eq!(reason_status(reason).code(), code, "{reason}");
        }
    }
}

#[cfg(all(test, feature = "testing"))]
mod tests_on_etcd {
    use super::*;
    use crate::config::Config;
    use crate::testing::Etcd;

    async fn watched(etcd: &Etcd) -> Result<RawWatch> {
        let config = Config::builder()
            .endpoints([etcd.endpoint()])
            // The connection's own test must not be what notices.
            .keep_alive_interval(Duration::from_secs(600))
            .build()?;
        let client = Client::new("main", config).await?;
        client.open_watch("key", &WatchOptions::new()).await
    }

    #[tokio::test]
    async fn given_a_server_that_does_not_answer_then_the_silent_stream_is_given_up() {
        let etcd = Etcd::start().await.unwrap();
        let mut watch = watched(&etcd).await.unwrap();
        etcd.pause().await.unwrap();
        let error = tokio::time::timeout(Duration::from_secs(60), watch.next())
            .await
            .unwrap()
            .unwrap_err();
        assert_eq!(error.code(), Some(Code::Unavailable));
        assert!(error.to_string().contains("silent"), "{error}");
    }

    #[tokio::test]
    async fn given_nothing_to_tell_then_a_server_that_answers_is_kept() {
        let etcd = Etcd::start().await.unwrap();
        let mut watch = watched(&etcd).await.unwrap();
        let patience = ASK_AFTER * 2 + ANSWER_WITHIN + Duration::from_secs(2);
        assert!(tokio::time::timeout(patience, watch.next()).await.is_err());
    }
}
