//! Calls per second at a server that ends connections, relative to a plain tonic channel.

use std::time::Duration;

use helloworld::echo::echo_client::EchoClient;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::{channel, recycling_server};
use crate::support::alone;
use crate::support::balanced::hello;

/// How long each channel makes calls before the other one has its turn. Both then meet the same
/// load of other tests.
const TURN: Duration = Duration::from_millis(250);

const TURNS: usize = 10;

/// Successful calls of 16 tasks.
async fn count<S>(client: &EchoClient<S>) -> u64
where
    S: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<tonic::codegen::StdError>,
    S::ResponseBody: tonic::transport::Body<Data = bytes::Bytes> + Send + 'static,
    <S::ResponseBody as tonic::transport::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    let mut tasks = JoinSet::new();
    let until = Instant::now() + TURN;
    for _ in 0..16 {
        let mut client = client.clone();
        tasks.spawn(async move {
            let mut succeeded = 0;
            while Instant::now() < until {
                // Bounded, because tonic's channel has been seen to hang.
                let call = timeout(Duration::from_secs(1), client.unary(hello()));
                succeeded += u64::from(matches!(call.await, Ok(Ok(_))));
            }
            succeeded
        });
    }
    tasks.join_all().await.into_iter().sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_least_0_7_times_that_of_a_plain_channel() {
    let _alone = alone().await;
    let server = recycling_server(100).await;
    let ours = channel([&server]);
    let uri = format!("http://{}", server.address());
    let plain = tonic::transport::Endpoint::new(uri).unwrap().connect_lazy();
    let (ours, plain) = (EchoClient::new(ours), EchoClient::new(plain));
    let (mut our_calls, mut plain_calls) = (0, 0);
    for _ in 0..TURNS {
        plain_calls += count(&plain).await;
        our_calls += count(&ours).await;
    }
    assert!(
        our_calls * 10 >= plain_calls * 7,
        "{our_calls} and {plain_calls}"
    );
}
