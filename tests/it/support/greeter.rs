//! A greeter that returns its own address.

use std::time::Duration;

use helloworld::greeter::greeter_client::GreeterClient;
use helloworld::greeter::greeter_server::{Greeter, GreeterServer as Service};
use helloworld::greeter::{HelloReply, HelloRequest};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::{Body as HttpBody, Bytes, StdError};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A greeter on a free loopback port, within the test's process.
pub struct GreeterServer {
    address: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl GreeterServer {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = Service::new(Named(address.clone()));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), async {
                stopped.await.ok();
            });
        Self {
            address,
            stop,
            serving: tokio::spawn(server),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Shuts down gracefully and waits until all calls have ended.
    pub async fn stop(self) {
        self.stop.send(()).ok();
        self.serving.await.unwrap().unwrap();
    }
}

struct Named(String);

#[tonic::async_trait]
impl Greeter for Named {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        Ok(Response::new(HelloReply {
            message: format!("hello {}", request.into_inner().name),
            server: self.0.clone(),
        }))
    }
}

/// Calls the greeter and returns the address of the server that responded. After 5 s without a
/// response the call fails with `DEADLINE_EXCEEDED`, because tonic's own channel waits for ever
/// without endpoints.
pub async fn call_greeter<C>(channel: &C) -> Result<String, Status>
where
    C: GrpcService<Body> + Clone,
    C::Error: Into<StdError>,
    C::ResponseBody: HttpBody<Data = Bytes> + Send + 'static,
    <C::ResponseBody as HttpBody>::Error: Into<StdError> + Send,
{
    let mut client = GreeterClient::new(channel.clone());
    let request = HelloRequest {
        name: "test".to_owned(),
    };
    let call = client.say_hello(request);
    match tokio::time::timeout(Duration::from_secs(5), call).await {
        Ok(response) => Ok(response?.into_inner().server),
        Err(_) => Err(Status::deadline_exceeded("no response within 5 s")),
    }
}
