//! The channel, and its place in a generated client.

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

use super::call::{Calls, Tried};
use super::pool::EndpointStatus;
use crate::error::Result;

/// A channel over a changing set of endpoints, for any generated tonic client. Cheap to clone;
/// clones share the connections.
///
/// Dropping the last clone closes the connections, each after the calls in flight on it.
#[derive(Clone)]
pub struct BalancedChannel {
    inner: Arc<Inner>,
}

struct Inner {
    calls: Calls,
    task: JoinHandle<()>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl BalancedChannel {
    /// A channel whose endpoints `task` keeps connected.
    pub(super) fn new(calls: Calls, task: JoinHandle<()>) -> Self {
        Self {
            inner: Arc::new(Inner { calls, task }),
        }
    }

    /// What is known of each endpoint now.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        self.inner.calls.view.endpoints()
    }

    /// Makes a call that avoids where others were sent, and notes where it is sent itself.
    pub(crate) async fn call_beside(
        &self,
        request: Request<Body>,
        tried: Option<&Tried>,
    ) -> Result<Response<Body>, Status> {
        self.inner.calls.call(request, tried).await
    }
}

/// Resolves to the response's head; its body follows.
///
/// Dropping it gives the call up.
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

    /// Always ready: a call waits for its endpoint itself, bounded by its own time-out.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> ResponseFuture {
        let inner = Arc::clone(&self.inner);
        ResponseFuture(Box::pin(
            async move { inner.calls.call(request, None).await },
        ))
    }
}

impl fmt::Debug for BalancedChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalancedChannel")
            .field("endpoints", &self.endpoints())
            .finish_non_exhaustive()
    }
}

/// What a generated client needs, checked when this is compiled.
const _: () = {
    const fn is_channel<T>()
    where
        T: tonic::client::GrpcService<Body> + Clone + Send + Sync + 'static,
        T::Future: Send + 'static,
    {
    }
    is_channel::<BalancedChannel>();
};
