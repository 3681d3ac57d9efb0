//! A tonic server that says who it is.

use std::time::Duration;

use helloworld::greeter::greeter_client::GreeterClient;
use helloworld::greeter::greeter_server::{Greeter, GreeterServer};
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
pub struct GreeterProcess {
    address: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl GreeterProcess {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let service = GreeterServer::new(Named(address.clone()));
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

    /// Finishes what is in flight, and ends.
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

/// A call through a channel: the address of the server that answered. One that waits for long, as
/// tonic's channel does without endpoints, is `DEADLINE_EXCEEDED`.
pub async fn who_answers<C>(channel: &C) -> Result<String, Status>
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
        Ok(answer) => Ok(answer?.into_inner().server),
        Err(_) => Err(Status::deadline_exceeded("no answer within 5 s")),
    }
}
