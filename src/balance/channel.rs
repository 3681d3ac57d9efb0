//! The channel as a generated client sees it, and the state of its endpoints.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::body::Body;
use tower_service::Service;

use super::call::{AttemptedEndpoints, Dispatcher};
use super::pool::{EndpointStatus, View};

/// A channel over a changing set of endpoints, for any generated tonic client.
///
/// Clones are cheap and share the connections. Dropping the last clone closes each connection once
/// the calls in flight on it have ended.
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

    /// Makes a call that avoids the endpoints in `attempted`, and adds the endpoints of its own
    /// attempts.
    pub(crate) async fn call_avoiding(
        &self,
        request: Request<Body>,
        attempted: Option<&AttemptedEndpoints>,
    ) -> Result<Response<Body>, Status> {
        self.inner.dispatcher.call(request, attempted).await
    }

    fn view(&self) -> &View {
        &self.inner.dispatcher.view
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
            inner.dispatcher.call(request, None).await
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
