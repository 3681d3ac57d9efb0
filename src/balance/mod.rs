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

mod builder;
mod call;
mod channel;
mod connection;
mod grpc_status;
mod pick;
mod pool;
mod replay;
mod source;

pub use builder::BalancedChannelBuilder;
pub use call::RetryPolicy;
pub(crate) use call::Tried;
pub use channel::{BalancedChannel, ResponseFuture};
pub(crate) use grpc_status::status_of_head;
pub use pick::BalancePolicy;
pub use pool::{EndpointState, EndpointStatus};
pub use source::Source;
