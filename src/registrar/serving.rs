//! Follows a server's own health service (feature `health`).

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use tokio::time::{Instant, sleep};
use tonic::transport::Endpoint;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::backoff::Backoff;

/// A watch that lasted this long is reopened without a pause.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// Whether a server reports itself as serving: the responses of its `grpc.health.v1.Health/Watch`,
/// for [`Registrar::register_while_ready`](crate::Registrar::register_while_ready). Needs the
/// feature `health`.
///
/// `service` is the name that the health service is asked about; an empty name stands for the
/// server as a whole. The stream watches only while it is polled.
///
/// The stream yields `false` when the server cannot be reached, and when the watch ends twice in a
/// row without a response. A lost watch is reopened: at once if it lasted for 10 s, otherwise after
/// a backoff of up to 1 s. A server without a health service counts as ready, as gRFC A17
/// specifies; the stream then yields `true` and ends. To detect a server that accepts connections
/// but does not respond, set `http2_keep_alive_interval` on `endpoint`.
///
/// ```no_run
/// # async fn example(registrar: goo_etcd::Registrar) -> Result<(), Box<dyn std::error::Error>> {
/// use goo_etcd::Instance;
/// use tonic::transport::Endpoint;
///
/// let own = Endpoint::from_static("http://127.0.0.1:50051");
/// let instance = Instance::new("greeter", "10.0.0.5:50051");
/// // The server may start later: until it serves, the instance is held back.
/// let registration = registrar.register_while_ready(instance, goo_etcd::serving(own, ""))?;
/// # Ok(())
/// # }
/// ```
pub fn serving(endpoint: Endpoint, service: impl Into<String>) -> Serving {
    let watch = HealthWatch::new(endpoint, service.into());
    let reports = stream::unfold(Some(watch), |watch| async move { watch?.next().await });
    Serving(reports.boxed())
}

/// The stream that [`serving`] returns. Its items say whether the server reports itself as serving.
///
/// Dropping the stream ends the watch.
#[must_use = "a stream does nothing unless it is polled"]
pub struct Serving(BoxStream<'static, bool>);

impl Stream for Serving {
    type Item = bool;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<bool>> {
        self.0.poll_next_unpin(cx)
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").finish_non_exhaustive()
    }
}

/// Watches a server's health service, and reopens the watch after a loss.
struct HealthWatch {
    endpoint: Endpoint,
    service: String,
    open: Option<OpenWatch>,
    /// The number of watches that have ended since the last response.
    ended: u32,
    backoff: Backoff,
}

struct OpenWatch {
    responses: Streaming<HealthCheckResponse>,
    opened_at: Instant,
}

/// The result of one attempt to learn the server's health.
enum Report {
    Serving(bool),
    /// The server has no health service.
    Unimplemented,
    /// The watch was opened, or has ended; nothing is known yet.
    Unknown,
}

impl HealthWatch {
    fn new(endpoint: Endpoint, service: String) -> Self {
        Self {
            endpoint,
            service,
            open: None,
            ended: 0,
            backoff: Backoff::for_etcd(),
        }
    }

    /// Whether the server serves, and the watch to continue with.
    async fn next(mut self) -> Option<(bool, Option<Self>)> {
        loop {
            let report = match self.open.take() {
                Some(watch) => self.read(watch).await,
                None => self.open().await,
            };
            match report {
                Report::Serving(is_serving) => return Some((is_serving, Some(self))),
                Report::Unimplemented => return Some((true, None)),
                Report::Unknown => {}
            }
        }
    }

    async fn open(&mut self) -> Report {
        let service = self.service.clone();
        let mut client = HealthClient::new(self.endpoint.connect_lazy());
        match client.watch(HealthCheckRequest { service }).await {
            Ok(response) => {
                self.open = Some(OpenWatch {
                    responses: response.into_inner(),
                    opened_at: Instant::now(),
                });
                Report::Unknown
            }
            Err(status) if is_unimplemented(&status) => Report::Unimplemented,
            Err(error) => {
                tracing::debug!(%error, "the health service cannot be reached");
                sleep(self.backoff.next()).await;
                Report::Serving(false)
            }
        }
    }

    async fn read(&mut self, mut watch: OpenWatch) -> Report {
        match watch.responses.next().await {
            Some(Ok(response)) => {
                self.ended = 0;
                self.open = Some(watch);
                Report::Serving(response.status() == ServingStatus::Serving)
            }
            Some(Err(status)) if is_unimplemented(&status) => Report::Unimplemented,
            Some(Err(_)) | None => self.on_ended(watch.opened_at).await,
        }
    }

    async fn on_ended(&mut self, opened_at: Instant) -> Report {
        if opened_at.elapsed() >= STABLE_AFTER {
            self.backoff.reset();
        } else {
            sleep(self.backoff.next()).await;
        }
        self.ended = self.ended.saturating_add(1);
        if self.ended > 1 {
            Report::Serving(false)
        } else {
            Report::Unknown
        }
    }
}

fn is_unimplemented(status: &Status) -> bool {
    status.code() == Code::Unimplemented
}
