//! A server for gRPC's interoperability test cases.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use helloworld::interop::test_service_server::{TestService, TestServiceServer};
use helloworld::interop::{
    EchoStatus, Empty, Payload, ResponseParameters, SimpleRequest, SimpleResponse,
    StreamingInputCallRequest, StreamingInputCallResponse, StreamingOutputCallRequest,
    StreamingOutputCallResponse,
};
use http::HeaderName;
use http_body::Frame;
use http_body_util::BodyExt;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Request, Response, Status, Streaming};
use tower::Service;

/// Metadata that the server returns in its response's headers.
pub const ECHO_INITIAL: &str = "x-grpc-test-echo-initial";

/// Metadata that the server returns in its response's trailers.
pub const ECHO_TRAILING: &str = "x-grpc-test-echo-trailing-bin";

/// A server on the runtime of the test.
pub struct InteropServer {
    address: String,
    active: Arc<AtomicUsize>,
    _serving: AbortOnDropHandle<()>,
}

impl InteropServer {
    pub async fn start(mut server: Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let active = Arc::<AtomicUsize>::default();
        let service = TestServiceServer::new(Interop {
            active: Arc::clone(&active),
        });
        let serving = server
            .add_service(EchoMetadata(service))
            .serve_with_incoming(TcpIncoming::from(listener));
        Self {
            address,
            active,
            _serving: AbortOnDropHandle::new(tokio::spawn(async { serving.await.unwrap() })),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Streams of requests that the server is reading.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::SeqCst)
    }
}

pub fn payload(size: usize) -> Payload {
    Payload {
        body: vec![0; size],
    }
}

struct Interop {
    active: Arc<AtomicUsize>,
}

/// Counts a stream of requests as active until it is dropped.
struct Active(Arc<AtomicUsize>);

impl Interop {
    fn begin(&self) -> Active {
        self.active.fetch_add(1, Ordering::SeqCst);
        Active(Arc::clone(&self.active))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn check(status: Option<&EchoStatus>) -> Result<(), Status> {
    match status {
        Some(status) if status.code != 0 => {
            Err(Status::new(Code::from_i32(status.code), &status.message))
        }
        _ => Ok(()),
    }
}

type Outputs = BoxStream<'static, Result<StreamingOutputCallResponse, Status>>;

/// The responses to one request of a stream.
fn outputs(request: StreamingOutputCallRequest) -> Outputs {
    if let Err(status) = check(request.response_status.as_ref()) {
        return stream::iter([Err(status)]).boxed();
    }
    let respond = async |parameters: ResponseParameters| {
        let pause = u64::try_from(parameters.interval_us).unwrap_or(0);
        tokio::time::sleep(Duration::from_micros(pause)).await;
        let size = usize::try_from(parameters.size).unwrap_or(0);
        Ok(StreamingOutputCallResponse {
            payload: Some(payload(size)),
        })
    };
    let responses = stream::iter(request.response_parameters);
    responses.then(move |one| respond(one).boxed()).boxed()
}

#[tonic::async_trait]
impl TestService for Interop {
    async fn empty_call(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Ok(Response::new(Empty {}))
    }

    async fn unary_call(
        &self,
        request: Request<SimpleRequest>,
    ) -> Result<Response<SimpleResponse>, Status> {
        let request = request.into_inner();
        check(request.response_status.as_ref())?;
        let size = usize::try_from(request.response_size).unwrap_or(0);
        Ok(Response::new(SimpleResponse {
            payload: Some(payload(size)),
        }))
    }

    type StreamingOutputCallStream = Outputs;

    async fn streaming_output_call(
        &self,
        request: Request<StreamingOutputCallRequest>,
    ) -> Result<Response<Outputs>, Status> {
        Ok(Response::new(outputs(request.into_inner())))
    }

    async fn streaming_input_call(
        &self,
        request: Request<Streaming<StreamingInputCallRequest>>,
    ) -> Result<Response<StreamingInputCallResponse>, Status> {
        let _active = self.begin();
        let mut requests = request.into_inner();
        let mut size = 0;
        while let Some(request) = requests.message().await? {
            size += request.payload.map_or(0, |payload| payload.body.len());
        }
        Ok(Response::new(StreamingInputCallResponse {
            aggregated_payload_size: size as i32,
        }))
    }

    type FullDuplexCallStream = Outputs;

    async fn full_duplex_call(
        &self,
        request: Request<Streaming<StreamingOutputCallRequest>>,
    ) -> Result<Response<Outputs>, Status> {
        let active = self.begin();
        let responses = request.into_inner().flat_map(move |request| {
            // Dropped with the stream.
            let _active = &active;
            request.map_or_else(|status| stream::iter([Err(status)]).boxed(), outputs)
        });
        Ok(Response::new(responses.boxed()))
    }

    async fn unimplemented_call(&self, _: Request<Empty>) -> Result<Response<Empty>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Returns metadata of each request in the headers and trailers of its response.
#[derive(Clone)]
struct EchoMetadata(TestServiceServer<Interop>);

impl NamedService for EchoMetadata {
    const NAME: &'static str = TestServiceServer::<Interop>::NAME;
}

impl Service<http::Request<Body>> for EchoMetadata {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let initial = request.headers().get(ECHO_INITIAL).cloned();
        let trailing = request.headers().get(ECHO_TRAILING).cloned();
        let responding = self.0.call(request);
        Box::pin(async move {
            let mut response = responding.await?;
            if let Some(value) = initial {
                response.headers_mut().insert(ECHO_INITIAL, value);
            }
            let add_trailing = move |mut frame: Frame<Bytes>| {
                if let (Some(trailers), Some(value)) = (frame.trailers_mut(), &trailing) {
                    trailers.insert(HeaderName::from_static(ECHO_TRAILING), value.clone());
                }
                frame
            };
            Ok(response.map(|body| Body::new(body.map_frame(add_trailing))))
        })
    }
}
