//! A channel that never calls a dead endpoint.
//!
//! A [`BalancedChannel`] is what a generated tonic client takes. It keeps every endpoint of its set
//! connected, whether calls are made or not, and sends each call to one that is: an endpoint that is not
//! connected is not in the choice.
//!
//! ```no_run
//! # async fn example(client: goo_etcd::Client) -> Result<(), Box<dyn std::error::Error>> {
//! use goo_etcd::BalancedChannel;
//! use helloworld::greeter::{HelloRequest, greeter_client::GreeterClient};
//!
//! let channel = BalancedChannel::connect(&client, "greeter").await?;
//! let mut greeter = GreeterClient::new(channel);
//! let reply = greeter.say_hello(HelloRequest { name: "you".into() }).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # How it works
//!
//! ```text
//!   Source --sets--> Pool --starts, drops--> Endpoint (a task per connection:
//!                     |                        connect, hold, back off)
//!                     | ready, lost              |
//!                     +<-------------------------+
//!                     v
//!                   Picker (immutable, swapped)  <--reads-- calls
//! ```
//!
//! The parts that make up a call:
//!
//! - **Waiting.** With no endpoint ready, or with as many calls on each as its server allows streams, a
//!   call waits for one, for its own time-out or
//!   [`ready_timeout`](BalancedChannelBuilder::ready_timeout), and then says what is known of each.
//! - **Picking.** See [`BalancePolicy`]. Weights count under every policy; an instance that drains or has
//!   weight 0 gets no new calls.
//! - **Sending again.** A call that provably reached no server goes to another endpoint, unseen: its
//!   connection was closing, its stream was refused. One that a server may have seen is sent again only
//!   by a [`RetryPolicy`].
//! - **Ending.** A call is in flight until its response's body ends or is dropped. An endpoint that
//!   leaves the set, and a connection whose server is shutting down, get no new calls and finish
//!   those they have.

mod body;
mod builder;
mod call;
mod connection;
mod deadline;
mod failure;
mod pick;
mod pool;
mod replay;
mod retry;
mod source;
mod tried;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::body::Body;
use tower::Service;

pub(crate) use body::status_of_head;
pub use builder::BalancedChannelBuilder;
use call::Calls;
pub use pick::BalancePolicy;
pub use pool::{EndpointState, EndpointStatus};
pub use retry::RetryPolicy;
pub use source::Source;
pub(crate) use tried::Tried;

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
    /// A channel to a fixed list of addresses, `host:port` or `unix:/path`, without etcd.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for what is not an address.
    pub fn from_endpoints<A: Into<String>>(addresses: impl IntoIterator<Item = A>) -> Result<Self> {
        Self::builder(Source::addresses(addresses)?).build()
    }

    /// A channel with settings of its own, over a [`Directory`] or any other [`Source`].
    pub fn builder(source: impl Into<Source>) -> BalancedChannelBuilder {
        BalancedChannelBuilder::new(source.into())
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
