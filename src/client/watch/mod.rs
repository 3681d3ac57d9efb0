//! A watch that resumes by itself.

mod options;
mod raw;

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{BoxStream, Stream, StreamExt, unfold};
use tokio::time::{Instant, sleep};
use tonic::Code;

use super::handle::Client;
use crate::backoff::Backoff;
use crate::error::{Error, Result};

pub use options::{WatchOptions, WatchResponse};
pub(crate) use raw::RawWatch;

/// A stream that lived this long was no part of the trouble before it; the pauses start anew.
const SETTLED: Duration = Duration::from_secs(10);

/// The events of a key or a range of keys, from [`Client::watch`].
///
/// Each event comes exactly once and in order, those of one revision together. A lost or silent
/// stream is created anew after the last event, over and over, until it holds: until then the
/// stream is merely quiet. It ends with
///
/// - [`Error::Compacted`]: the events to go on with are gone. List again, and watch from there.
/// - [`Error::RevisionWentBack`]: etcd was wiped or restored from a backup. List again.
/// - [`Error::Closed`]: the client was closed.
/// - [`Error::Rpc`] with what no repetition can mend: a permission that is missing, a
///   message over [`Config::max_call_recv_msg_size`](crate::Config::max_call_recv_msg_size).
///
/// After an error it yields nothing more. All its work is done while it is polled: not polling
/// it leaves events at the server. Dropping it cancels the watch at the server.
///
/// What cannot be noticed: a wipe after which etcd has grown past the old revision before the
/// watch is back.
#[must_use = "a watch does nothing unless polled"]
pub struct Watch {
    responses: BoxStream<'static, Result<WatchResponse>>,
}

impl Client {
    /// Watches a key, or with options a range of keys. Returns when etcd has created the watch:
    /// what happens after that is seen.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when that takes longer than
    /// [`Config::request_timeout`](crate::Config::request_timeout), [`Error::Rpc`] when etcd
    /// refuses or cannot be reached, [`Error::Closed`]. That the start is compacted is an
    /// item of the stream.
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
        let resuming = Resuming {
            client: self.clone(),
            key,
            next: options.start_revision().unwrap_or(raw.revision() + 1),
            seen: raw.revision(),
            options,
            stream: Link::Open {
                raw: Box::new(raw),
                since: Instant::now(),
            },
            pauses: Backoff::for_etcd(),
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

struct Resuming {
    client: Client,
    key: Vec<u8>,
    options: WatchOptions,
    /// The first revision that was not yielded yet.
    next: i64,
    /// The highest revision that etcd has told of.
    seen: i64,
    stream: Link,
    pauses: Backoff,
}

enum Link {
    Open { raw: Box<RawWatch>, since: Instant },
    Lost,
}

impl Resuming {
    async fn next(&mut self) -> Result<WatchResponse> {
        loop {
            match &mut self.stream {
                Link::Open { raw, since } => match raw.next().await {
                    Ok(mut response) => {
                        let progress = response.is_progress();
                        self.seen = self.seen.max(response.revision());
                        response.skip_before(self.next);
                        let empty = response.is_progress();
                        if !empty || progress {
                            self.next = self.next.max(response.next_revision());
                        }
                        if !empty || (progress && self.options.wants_progress()) {
                            return Ok(response);
                        }
                    }
                    Err(error) if is_over(&error) => return Err(error),
                    Err(error) => {
                        if since.elapsed() >= SETTLED {
                            self.pauses.reset();
                        }
                        tracing::debug!(%error, next = self.next, "watch lost, resuming");
                        self.stream = Link::Lost;
                    }
                },
                Link::Lost => self.resume().await?,
            }
        }
    }

    /// One try to get the stream back. An error ends the watch.
    async fn resume(&mut self) -> Result<()> {
        let pause = self.pauses.next();
        let client = self.client.clone();
        client
            .unless_closed(async {
                sleep(pause).await;
                Ok(())
            })
            .await?;
        let options = self.options.clone().with_start_revision(self.next);
        let raw = match client.open_watch(self.key.as_slice(), &options).await {
            Ok(raw) => raw,
            // The token was renewed on the way, so this refusal is meant.
            Err(error) if is_over(&error) || is_refusal(&error) => return Err(error),
            Err(error) => {
                tracing::debug!(%error, "watch not back yet");
                return Ok(());
            }
        };
        // A member may lag behind; the cluster as a whole may not.
        if raw.revision() < self.seen {
            match client.current_revision(&self.key).await {
                Ok(now) if now < self.seen => {
                    return Err(Error::RevisionWentBack {
                        seen: self.seen,
                        now,
                    });
                }
                Ok(_) => {}
                Err(error) if is_over(&error) || is_refusal(&error) => return Err(error),
                Err(_) => return Ok(()),
            }
        }
        self.seen = self.seen.max(raw.revision());
        self.stream = Link::Open {
            raw: Box::new(raw),
            since: Instant::now(),
        };
        Ok(())
    }
}

/// What a new stream would meet again.
fn is_over(error: &Error) -> bool {
    match error {
        Error::Compacted { .. } | Error::Closed { .. } | Error::Invalid { .. } => true,
        Error::Rpc { status, .. } => matches!(
            status.code(),
            Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented
        ),
        _ => false,
    }
}

fn is_refusal(error: &Error) -> bool {
    matches!(
        error.code(),
        Some(Code::PermissionDenied | Code::Unauthenticated)
    )
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
