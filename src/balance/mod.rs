//! Client-side load balancing that sends calls to connected endpoints only.
//!
//! A [`BalancedChannel`] is a channel for generated tonic clients. The channel keeps a connection
//! to every endpoint of a changing set, with or without calls, and picks a connected endpoint for
//! each call.
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
//! A call consists of four parts:
//!
//! - **Waiting.** If no endpoint is ready, or all ready endpoints have as many streams as their
//!   servers allow, the call waits until its deadline or for
//!   [`ready_timeout`](BalancedChannelBuilder::ready_timeout). Then it fails with the state of each
//!   endpoint. Waiting calls are served in the order in which they started.
//! - **Picking.** A [`BalancePolicy`] picks the endpoint. Every policy honours weights. An instance
//!   that is draining or has weight 0 gets no new calls.
//! - **Retrying.** A call that provably reached no server application is sent to another endpoint
//!   without the caller's notice (a transparent retry, gRFC A6): until `ready_timeout` after
//!   GOAWAY(NO_ERROR), at most 5 times after REFUSED_STREAM, and once after GOAWAY with an error,
//!   because the call may be the reason. A call that a server may have seen is repeated only by a
//!   [`RetryPolicy`].
//! - **Ending.** A call is in flight until the body of its response ends or is dropped. An endpoint
//!   that leaves the set, and a connection whose server is shutting down, get no new calls and
//!   finish the calls in flight on them. The connection closes after the last of these calls, and
//!   in a channel of a directory not before the
//!   [`mass_deletion_window`](BalancedChannelBuilder::mass_deletion_window) has passed.
//!
//! # Layers
//!
//! Each layer uses only the layers below:
//!
//! - the channel and its builder: settings, and the place in a generated client;
//! - `call`: one call, from the wait for an endpoint to the end of its response;
//! - `pool`: the endpoints of the set, and the picker made from the ready ones;
//! - `pick` and `connection`: the policies, and one HTTP/2 connection;
//! - `replay`, `grpc_status`, `response_head` and `status_headers`: request bodies that can be sent
//!   again, and what failures and responses mean.
//!
//! This module knows nothing of etcd. A [`Directory`](crate::Directory) becomes a [`Source`] in the
//! directory's own module.

mod builder;
mod call;
mod channel;
mod connection;
mod grpc_status;
mod pick;
mod pool;
mod replay;
mod response_head;
mod source;
mod status_headers;
#[cfg(test)]
mod tests;

pub use builder::BalancedChannelBuilder;
pub(crate) use call::{AttemptRecord, AttemptedEndpoints, CallContext};
pub use call::{RetryPolicy, ServedBy};
pub use channel::{BalancedChannel, EndpointStatuses, ResponseFuture};
pub(crate) use connection::PingPolicy;
pub use pick::{BalancePolicy, ParseBalancePolicyError};
pub use pool::{EndpointState, EndpointStatus};
pub(crate) use replay::Replay;
pub(crate) use response_head::is_not_grpc;
pub use source::Source;
