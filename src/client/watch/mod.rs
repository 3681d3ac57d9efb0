//! Watches that resume after their stream is lost.
//!
//! A [`RawWatch`] is one watch on one stream and ends when the stream is lost. A [`Watch`], the
//! public type, then opens another raw watch where the lost one stopped.

mod options;
mod raw;

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::etcd_error::EtcdError;
use super::handle::Client;
use crate::backoff::Backoff;
use crate::error::{Error, Result};

pub use options::{WatchOptions, WatchResponse};
pub(crate) use raw::RawWatch;

/// How long a stream must live for the next backoff to start from its minimum again.
const BACKOFF_RESET_AFTER: Duration = Duration::from_secs(10);

/// The events of a key or a range of keys, from [`Client::watch`].
///
/// Yields each event exactly once and in order, all events of a revision together. A stream that is
/// lost or silent is reopened after the last event, with backoff and without end; meanwhile the
/// watch yields nothing. The watch ends with one of these errors:
///
/// - [`Error::Compacted`]: the events to continue with are compacted. List again, and watch from
///   there.
/// - [`Error::RevisionWentBack`]: etcd was wiped or restored from a backup. List again.
/// - [`Error::Closed`]: the client was closed.
/// - [`Error::Rpc`]: no retry can help, because a permission is missing or a message exceeds
///   [`Config::max_call_recv_msg_size`](crate::Config::max_call_recv_msg_size).
///
/// All work is done while the watch is polled: if it is not polled, events stay at the server.
/// Dropping it cancels the watch at the server.
///
/// A wipe goes unnoticed if etcd grows past the old revision before the watch is reopened.
#[must_use = "a watch does nothing unless polled, and is cancelled when dropped"]
pub struct Watch {
    responses: BoxStream<'static, Result<WatchResponse>>,
}

impl Client {
    /// Watches a key, or with options a range of keys. Returns once etcd has created the watch, and
    /// yields all changes after that.
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`]: etcd did not create the watch within
    ///   [`Config::request_timeout`](crate::Config::request_timeout).
    /// - [`Error::NotConnected`]: no member was connected.
    /// - [`Error::Rpc`]: etcd refuses the watch, or the connection failed.
    /// - [`Error::Closed`]: the client was closed.
    ///
    /// A compacted start revision is an item of the stream.
    ///
    /// ```no_run
    /// # async fn example(client: goo_etcd::Client) -> goo_etcd::Result<()> {
    /// use futures::StreamExt;
    /// use goo_etcd::WatchOptions;
    ///
    /// let mut watch = client.watch("config/", WatchOptions::new().with_prefix()).await?;
    /// while let Some(response) = watch.next().await {
    ///     for event in response?.events() {
    ///         println!("{:?} {:?}", event.event_type(), event.kv());
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn watch(
        &self,
        key: impl Into<Vec<u8>>,
        options: impl Into<Option<WatchOptions>>,
    ) -> Result<Watch> {
        let key = key.into();
        let options = options.into().unwrap_or_default();
        let raw = self.open_watch(key.as_slice(), &options).await?;
        let resuming = ResumingWatch {
            client: self.clone(),
            key,
            next_revision: options.start_revision().unwrap_or(raw.revision() + 1),
            highest_seen: raw.revision(),
            options,
            stream: StreamState::open(raw),
            backoff: Backoff::for_etcd(),
        };
        let responses = unfold(Some(resuming), |state| async {
            let mut resuming = state?;
            match resuming.next().await {
                Ok(response) => Some((Ok(response), Some(resuming))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Watch {
            responses: responses.boxed(),
        })
    }
}

struct ResumingWatch {
    client: Client,
    key: Vec<u8>,
    options: WatchOptions,
    /// The first revision whose events were not yielded yet.
    next_revision: i64,
    /// The highest revision that etcd has reported.
    highest_seen: i64,
    stream: StreamState,
    backoff: Backoff,
}

enum StreamState {
    Open { raw: Box<RawWatch>, since: Instant },
    Lost,
}

impl StreamState {
    fn open(raw: RawWatch) -> Self {
        StreamState::Open {
            raw: Box::new(raw),
            since: Instant::now(),
        }
    }
}

impl ResumingWatch {
    async fn next(&mut self) -> Result<WatchResponse> {
        loop {
            let StreamState::Open { raw, since } = &mut self.stream else {
                self.try_resume().await?;
                continue;
            };
            match raw.next().await {
                Ok(response) => {
                    if let Some(response) = self.filter(response) {
                        return Ok(response);
                    }
                }
                Err(error) if ends_watch(&error) => return Err(error),
                Err(error) => {
                    if since.elapsed() >= BACKOFF_RESET_AFTER {
                        self.backoff.reset();
                    }
                    tracing::debug!(%error, next = self.next_revision, "watch lost, resuming");
                    self.stream = StreamState::Lost;
                }
            }
        }
    }

    /// Removes the events that were yielded before; `None` if the user gets nothing of the
    /// response.
    fn filter(&mut self, mut response: WatchResponse) -> Option<WatchResponse> {
        let is_progress = response.is_progress();
        self.highest_seen = self.highest_seen.max(response.revision());
        response.skip_before(self.next_revision);
        if response.events().is_empty() && !is_progress {
            return None;
        }
        self.next_revision = self.next_revision.max(response.next_revision());
        (!is_progress || self.options.wants_progress()).then_some(response)
    }

    /// Tries once to reopen the stream, after a pause. An error ends the watch.
    async fn try_resume(&mut self) -> Result<()> {
        let pause = sleep(self.backoff.next());
        let pause = async {
            pause.await;
            Ok(())
        };
        self.client.or_closed(pause).await?;
        match self.reopen().await {
            Ok(raw) => {
                self.highest_seen = self.highest_seen.max(raw.revision());
                self.stream = StreamState::open(raw);
                Ok(())
            }
            // A refusal is final here, because opening a watch renews an expired token.
            Err(error) if ends_watch(&error) || EtcdError::of(&error).is_auth_refusal() => {
                Err(error)
            }
            Err(error) => {
                tracing::debug!(%error, "cannot resume a watch yet");
                Ok(())
            }
        }
    }

    /// Opens a stream at the next revision and checks that etcd's history did not go back. One
    /// member may lag behind, but a quorum cannot.
    async fn reopen(&mut self) -> Result<RawWatch> {
        let options = self.options.clone().with_start_revision(self.next_revision);
        let raw = self
            .client
            .open_watch(self.key.as_slice(), &options)
            .await?;
        if raw.revision() < self.highest_seen {
            let now = self.client.current_revision(&self.key).await?;
            if now < self.highest_seen {
                return Err(Error::RevisionWentBack {
                    seen: self.highest_seen,
                    now,
                });
            }
        }
        Ok(raw)
    }
}

/// Whether a new stream would fail in the same way.
fn ends_watch(error: &Error) -> bool {
    match error {
        Error::Compacted { .. }
        | Error::RevisionWentBack { .. }
        | Error::Closed { .. }
        | Error::RuntimeEnded { .. }
        | Error::NoRuntime { .. }
        | Error::Invalid { .. } => true,
        Error::Rpc { status, .. } => matches!(
            status.code(),
            Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented
        ),
        _ => false,
    }
}

impl Stream for Watch {
    type Item = Result<WatchResponse>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.responses.poll_next_unpin(cx)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
