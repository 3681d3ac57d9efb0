//! Calls a service through tonic's own balanced channel, once per instance.
//!
//! ```text
//! cargo run --example balance_channel -- localhost:2379 greeter
//! ```
//!
//! `BalancedChannel` (see `greeter_client`) does more. tonic's channel picks at random, calls dead
//! servers until they have left the directory, and waits without limit while there is no server.

use std::error::Error;
use std::time::Duration;

use goo_etcd::{Client, Config, Directory};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let etcd = args.next().unwrap_or_else(|| "localhost:2379".to_owned());
    let service = args.next().unwrap_or_else(|| "greeter".to_owned());

    let client = Client::connect("example", Config::builder().endpoints([etcd]).build()?).await?;
    let directory = Directory::watch(&client, service).await?;
    // The closure configures the endpoint of each instance.
    let channel =
        directory.balance_channel(|_, endpoint| endpoint.connect_timeout(Duration::from_secs(1)));
    let mut greeter = GreeterClient::new(channel);
    for _ in 0..directory.snapshot().len().max(1) {
        let name = "example".to_owned();
        // The channel's own timeout does not include the wait for an endpoint.
        let call = greeter.say_hello(HelloRequest { name });
        let reply = tokio::time::timeout(Duration::from_secs(2), call).await??;
        println!("{}", reply.into_inner().message);
    }
    Ok(())
}
