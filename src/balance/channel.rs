//! The channel as a generated client sees it, and the state of its endpoints.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures::Stream;
use http::{Request, Response};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::WatchStream;
use tonic::Status;
use tonic::body::Body;
use tower_service::Service;

use super::call::{CallContext, Dispatcher};
use super::pool::{EndpointStatus, PoolStatus, View};

/// A channel over a changing set of endpoints, for any generated tonic client.
///
/// Clones are cheap and share the connections. Dropping the last clone closes each connection once
/// the calls in flight on it have ended.
///
/// # Runtimes
///
/// The endpoints are kept connected by tasks on the Tokio runtime on which the channel was built.
/// Calls may be made on any runtime. When the channel's own runtime ends, all calls fail at once
/// with `UNAVAILABLE` and a message that says so, those that wait or are in flight included. A
/// channel in a `static` that one `#[tokio::test]` builds is therefore of no use to the next one,
/// because each such test has a runtime of its own: build a channel in each test.
///
/// A call fails with `FAILED_PRECONDITION` if it needs a timer or a task and the caller's runtime
/// has none, or there is no runtime: the call has a deadline or a stream of requests, or it has to
/// wait.
///
/// # Paused time
///
/// Real sockets do not work with `#[tokio::test(start_paused = true)]` or `tokio::time::pause`. The
/// paused clock jumps to the next timer whenever all tasks wait, and it does not know that a packet
/// is on its way. Handshakes, keep-alive and
/// [`ready_timeout`](super::BalancedChannelBuilder::ready_timeout) time out at once, and no call
/// succeeds. Instead, do one of these:
///
/// - Leave the clock running, and set short timeouts.
/// - Connect in memory: a [`connector`](super::BalancedChannelBuilder::connector) that returns one
///   end of a `tokio::io::duplex`, whose other end a server of the same test gets through tonic's
///   `serve_with_incoming`. All waits are then waits for tasks, which the paused clock knows.
/// - Test the code around the client with a `tower::service_fn` in the channel's place. Generated
///   clients take any service.
#[derive(Clone)]
#[must_use = "dropping the last clone of a channel closes its connections"]
pub struct BalancedChannel {
    inner: Arc<Inner>,
}

struct Inner {
    dispatcher: Dispatcher,
    /// Keeps the endpoints connected.
    pool: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.dispatcher.view.close();
        self.pool.abort();
    }
}

impl BalancedChannel {
    pub(super) fn new(dispatcher: Dispatcher, pool: JoinHandle<()>) -> Self {
        Self {
            inner: Arc::new(Inner { dispatcher, pool }),
        }
    }

    /// Returns the present state of each endpoint.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        self.view().endpoints()
    }

    /// Returns a stream of the states of all endpoints: the present ones at once, then all of them
    /// again each time one changes.
    ///
    /// Changes that follow each other quickly are merged into one item. Each item is read when the
    /// stream is polled, so the latest state is never missed. The load
    /// ([`in_flight`](EndpointStatus::in_flight) and [`latency`](EndpointStatus::latency)) is part
    /// of an item, but a change of the load alone produces no item.
    ///
    /// The stream does not keep the channel open, and ends when the last clone of the channel is
    /// dropped. When the channel's runtime ends, the stream ends after an item in which all
    /// endpoints are [`Shutdown`](super::EndpointState::Shutdown). Dropping the stream has no
    /// effect on the channel.
    ///
    /// ```no_run
    /// # async fn example(channel: goo_etcd::BalancedChannel) {
    /// use futures::StreamExt;
    ///
    /// let mut statuses = channel.endpoint_statuses();
    /// while let Some(endpoints) = statuses.next().await {
    ///     for endpoint in endpoints {
    ///         println!("{} is {}", endpoint.address, endpoint.state);
    ///     }
    /// }
    /// # }
    /// ```
    pub fn endpoint_statuses(&self) -> EndpointStatuses {
        EndpointStatuses {
            statuses: Some(WatchStream::new(self.view().watch_status())),
        }
    }

    /// Waits until at least `count` endpoints are ready, that is, connected and used for calls.
    /// Useful, for example, before a server that makes calls itself starts to accept traffic.
    ///
    /// The wait has no timeout; use [`tokio::time::timeout`]. While the source has fewer than
    /// `count` instances, the wait continues until the source adds more. An endpoint can be lost
    /// again at any time, so there is no need to wait before each call: calls wait for an endpoint
    /// themselves, see [`ready_timeout`](super::BalancedChannelBuilder::ready_timeout).
    ///
    /// The wait also ends when the runtime ends on which the channel was built. Calls then fail and
    /// say so.
    ///
    /// Dropping the future ends the wait and has no other effect.
    ///
    /// ```no_run
    /// # async fn example(channel: goo_etcd::BalancedChannel) {
    /// use std::time::Duration;
    ///
    /// let waited = tokio::time::timeout(Duration::from_secs(10), channel.ready(2)).await;
    /// if waited.is_err() {
    ///     println!("fewer than two endpoints are ready: {:?}", channel.endpoints());
    /// }
    /// # }
    /// ```
    pub async fn ready(&self, count: usize) {
        let mut statuses = self.view().watch_status();
        // Cannot fail, because the channel owns the sender.
        let _ = statuses
            .wait_for(|status| status.ready >= count || status.ended.is_some())
            .await;
    }

    /// Makes a call that is part of a larger operation.
    pub(crate) async fn call_within(
        &self,
        request: Request<Body>,
        context: CallContext<'_>,
    ) -> Result<Response<Body>, Status> {
        self.inner.dispatcher.call(request, context).await
    }

    /// Why instances of the set cannot be called, with their addresses.
    pub(crate) fn unusable(&self) -> Vec<String> {
        self.view().status().unusable.clone()
    }

    /// Whether the runtime has ended on which the channel was built.
    pub(crate) fn has_ended(&self) -> bool {
        self.view().has_ended()
    }

    fn view(&self) -> &View {
        &self.inner.dispatcher.view
    }
}

/// A stream of the states of a channel's endpoints, from [`BalancedChannel::endpoint_statuses`].
#[must_use = "streams do nothing unless polled"]
pub struct EndpointStatuses {
    /// `None` after the last status of a channel whose runtime has ended.
    statuses: Option<WatchStream<Arc<PoolStatus>>>,
}

impl Stream for EndpointStatuses {
    type Item = Vec<EndpointStatus>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(statuses) = &mut self.statuses else {
            return Poll::Ready(None);
        };
        let status = ready!(Pin::new(statuses).poll_next(cx));
        if status.as_ref().is_none_or(|status| status.ended.is_some()) {
            self.statuses = None;
        }
        Poll::Ready(status.map(|status| status.endpoints()))
    }
}

impl fmt::Debug for EndpointStatuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EndpointStatuses").finish_non_exhaustive()
    }
}

/// The future of a call. Resolves to the response's head, whose body follows as a stream.
///
/// Dropping the future cancels the call.
#[must_use = "futures do nothing unless polled"]
pub struct ResponseFuture(Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>);

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Status>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl Service<Request<Body>> for BalancedChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = ResponseFuture;

    /// Always ready. Calls themselves wait for an endpoint, within their deadlines.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> ResponseFuture {
        let inner = Arc::clone(&self.inner);
        ResponseFuture(Box::pin(async move {
            inner.dispatcher.call(request, CallContext::default()).await
        }))
    }
}

impl fmt::Debug for BalancedChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalancedChannel")
            .field("endpoints", &self.endpoints())
            .finish_non_exhaustive()
    }
}

/// Checks at compile time that generated clients accept the channel.
const _: () = {
    const fn is_channel<T>()
    where
        T: tonic::client::GrpcService<Body> + Clone + Send + Sync + 'static,
        T::Future: Send + 'static,
    {
    }
    is_channel::<BalancedChannel>();
};
