//! Which endpoint sent a response.

use std::sync::Arc;

/// The endpoint that sent a response, among the response's extensions.
///
/// A [`BalancedChannel`](crate::BalancedChannel) adds it to each response, after all retries.
/// Calls that fail have no response and therefore no `ServedBy`; that includes calls to which a
/// server responds with an error status alone, because tonic turns such a response into a
/// [`Status`](tonic::Status).
///
/// ```no_run
/// # async fn example(channel: goo_etcd::BalancedChannel) -> Result<(), tonic::Status> {
/// use goo_etcd::balance::ServedBy;
/// use helloworld::greeter::{HelloRequest, greeter_client::GreeterClient};
///
/// let mut greeter = GreeterClient::new(channel);
/// let response = greeter.say_hello(HelloRequest { name: "you".into() }).await?;
/// if let Some(server) = response.extensions().get::<ServedBy>() {
///     println!("served by {}", server.address());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServedBy {
    address: Arc<str>,
}

impl ServedBy {
    pub(super) fn new(address: Arc<str>) -> Self {
        Self { address }
    }

    /// The endpoint's address as its instance has it: `host:port` or `unix:/path`.
    pub fn address(&self) -> &str {
        &self.address
    }
}
