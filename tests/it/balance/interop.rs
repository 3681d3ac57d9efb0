//! gRPC's interoperability test cases through a channel, against a tonic server
//! (grpc/grpc, doc/interop-test-descriptions.md).
//!
//! Each test has the name of its case. The cases about compression, credentials and load reports
//! are left out, because the channel has no part in them.

use std::time::Duration;

use futures::channel::mpsc;
use futures::stream;
use goo_etcd::BalancedChannel;
use helloworld::interop::test_service_client::TestServiceClient;
use helloworld::interop::unimplemented_service_client::UnimplementedServiceClient;
use helloworld::interop::{
    EchoStatus, Empty, ResponseParameters, SimpleRequest, StreamingInputCallRequest,
    StreamingOutputCallRequest, StreamingOutputCallResponse,
};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Server;
use tonic::{Code, Request, Status, Streaming};

use crate::support::balanced::{in_flight, static_channel};
use crate::support::interop::{ECHO_INITIAL, ECHO_TRAILING, InteropServer, payload};
use crate::support::{wait_for, wait_until};

type TestClient = TestServiceClient<BalancedChannel>;

/// A server, the channel to it, and a client on the channel.
struct Case {
    server: InteropServer,
    channel: BalancedChannel,
    client: TestClient,
}

impl Case {
    async fn new() -> Self {
        let server = InteropServer::start(Server::builder()).await;
        let channel = static_channel([server.address()], |builder| builder);
        Self {
            client: TestServiceClient::new(channel.clone()),
            server,
            channel,
        }
    }
}

/// The body's size in a response of a stream; `None` at the end.
async fn next_size(responses: &mut Streaming<StreamingOutputCallResponse>) -> Option<usize> {
    let next = wait_for("a response", responses.message()).await;
    Some(next.unwrap()?.payload.unwrap().body.len())
}

/// A request for one response of this size.
fn output_request(response_size: i32, size: usize) -> StreamingOutputCallRequest {
    StreamingOutputCallRequest {
        response_parameters: vec![ResponseParameters {
            size: response_size,
            interval_us: 0,
        }],
        payload: Some(payload(size)),
        response_status: None,
    }
}

#[tokio::test]
async fn empty_unary() {
    let mut case = Case::new().await;
    let response = case.client.empty_call(Empty {}).await.unwrap();
    assert_eq!(response.into_inner(), Empty {});
}

#[tokio::test]
async fn large_unary() {
    let mut case = Case::new().await;
    let request = SimpleRequest {
        response_size: 314_159,
        payload: Some(payload(271_828)),
        response_status: None,
    };
    let response = case.client.unary_call(request).await.unwrap();
    assert_eq!(response.into_inner().payload, Some(payload(314_159)));
}

#[tokio::test]
async fn client_streaming() {
    let mut case = Case::new().await;
    let requests = [27_182, 8, 1_828, 45_904].map(|size| StreamingInputCallRequest {
        payload: Some(payload(size)),
    });
    let call = case.client.streaming_input_call(stream::iter(requests));
    let response = wait_for("a response", call).await.unwrap();
    assert_eq!(response.into_inner().aggregated_payload_size, 74_922);
}

#[tokio::test]
async fn server_streaming() {
    let mut case = Case::new().await;
    let sizes = [31_415, 9, 2_653, 58_979];
    let request = StreamingOutputCallRequest {
        response_parameters: sizes
            .map(|size| ResponseParameters {
                size,
                interval_us: 0,
            })
            .to_vec(),
        payload: None,
        response_status: None,
    };
    let responses = case.client.streaming_output_call(request).await.unwrap();
    let mut responses = responses.into_inner();
    for size in sizes {
        assert_eq!(next_size(&mut responses).await, Some(size as usize));
    }
    assert_eq!(next_size(&mut responses).await, None);
}

#[tokio::test]
async fn ping_pong() {
    let mut case = Case::new().await;
    let (sender, requests) = mpsc::unbounded();
    let call = case.client.full_duplex_call(requests);
    let mut responses = wait_for("headers", call).await.unwrap().into_inner();
    for (response_size, size) in [(31_415, 27_182), (9, 8), (2_653, 1_828), (58_979, 45_904)] {
        let request = output_request(response_size, size);
        sender.unbounded_send(request).unwrap();
        let received = next_size(&mut responses).await;
        assert_eq!(received, Some(response_size as usize));
    }
    drop(sender);
    assert_eq!(next_size(&mut responses).await, None);
}

#[tokio::test]
async fn empty_stream() {
    let mut case = Case::new().await;
    let call = case.client.full_duplex_call(stream::empty());
    let mut responses = wait_for("headers", call).await.unwrap().into_inner();
    assert_eq!(next_size(&mut responses).await, None);
}

#[tokio::test]
async fn timeout_on_sleeping_server() {
    let mut case = Case::new().await;
    let (sender, requests) = mpsc::unbounded();
    let mut request = Request::new(requests);
    request.set_timeout(Duration::from_millis(1));
    let asked = StreamingOutputCallRequest {
        payload: Some(payload(27_182)),
        ..StreamingOutputCallRequest::default()
    };
    sender.unbounded_send(asked).unwrap();
    let call = async {
        let responses = case.client.full_duplex_call(request).await?;
        responses.into_inner().message().await
    };
    let status = wait_for("the deadline", call).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
}

#[tokio::test]
async fn cancel_after_begin() {
    let Case {
        server,
        channel,
        mut client,
    } = Case::new().await;
    let (sender, requests) = mpsc::unbounded::<StreamingInputCallRequest>();
    let call = tokio::spawn(async move { client.streaming_input_call(requests).await });
    wait_until("the call has begun", async || server.active() == 1).await;
    call.abort();
    wait_until("the server sees the end", async || server.active() == 0).await;
    assert_eq!(in_flight(&channel), 0);
    drop(sender);
}

#[tokio::test]
async fn cancel_after_first_response() {
    let mut case = Case::new().await;
    let (sender, requests) = mpsc::unbounded();
    sender
        .unbounded_send(output_request(31_415, 27_182))
        .unwrap();
    let call = case.client.full_duplex_call(requests);
    let mut responses = wait_for("headers", call).await.unwrap().into_inner();
    assert_eq!(next_size(&mut responses).await, Some(31_415));
    assert_eq!(case.server.active(), 1);
    drop(responses);
    wait_until("the server sees the end", async || {
        case.server.active() == 0
    })
    .await;
    assert_eq!(in_flight(&case.channel), 0);
}

const INITIAL: &str = "test_initial_metadata_value";
const TRAILING: &[u8] = &[0xab, 0xab, 0xab];

fn with_metadata<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert(ECHO_INITIAL, INITIAL.parse().unwrap());
    metadata.insert_bin(ECHO_TRAILING, MetadataValue::from_bytes(TRAILING));
    request
}

fn assert_trailing(metadata: &MetadataMap) {
    let trailing = metadata.get_bin(ECHO_TRAILING).unwrap();
    assert_eq!(trailing.to_bytes().unwrap(), TRAILING);
}

#[tokio::test]
async fn custom_metadata() {
    let mut case = Case::new().await;
    let request = SimpleRequest {
        response_size: 314_159,
        payload: Some(payload(271_828)),
        response_status: None,
    };
    let response = case
        .client
        .unary_call(with_metadata(request))
        .await
        .unwrap();
    // tonic adds the trailers to the headers.
    assert_eq!(response.metadata().get(ECHO_INITIAL).unwrap(), INITIAL);
    assert_trailing(response.metadata());

    let requests = stream::iter([output_request(314_159, 271_828)]);
    let call = case.client.full_duplex_call(with_metadata(requests));
    let response = wait_for("headers", call).await.unwrap();
    assert_eq!(response.metadata().get(ECHO_INITIAL).unwrap(), INITIAL);
    let mut responses = response.into_inner();
    assert_eq!(next_size(&mut responses).await, Some(314_159));
    assert_eq!(next_size(&mut responses).await, None);
    let trailers = responses.trailers().await.unwrap();
    assert_trailing(&trailers.unwrap());
}

/// The statuses of a unary call and of a stream that ask for `asked`.
async fn statuses(asked: EchoStatus) -> [Status; 2] {
    let mut case = Case::new().await;
    let request = SimpleRequest {
        response_status: Some(asked.clone()),
        ..SimpleRequest::default()
    };
    let unary = case.client.unary_call(request).await.unwrap_err();
    let request = StreamingOutputCallRequest {
        response_status: Some(asked),
        ..StreamingOutputCallRequest::default()
    };
    let call = async {
        let responses = case
            .client
            .full_duplex_call(stream::iter([request]))
            .await?;
        responses.into_inner().message().await
    };
    let streamed = wait_for("the status", call).await.unwrap_err();
    [unary, streamed]
}

#[tokio::test]
async fn status_code_and_message() {
    let message = "test status message";
    let asked = EchoStatus {
        code: 2,
        message: message.to_owned(),
    };
    for status in statuses(asked).await {
        assert_eq!((status.code(), status.message()), (Code::Unknown, message));
    }
}

#[tokio::test]
async fn special_status_message() {
    let message = "\t\ntest with whitespace\r\nand Unicode BMP \u{263a} and non-BMP \u{1f608}\t\n";
    let asked = EchoStatus {
        code: 2,
        message: message.to_owned(),
    };
    for status in statuses(asked).await {
        assert_eq!((status.code(), status.message()), (Code::Unknown, message));
    }
}

#[tokio::test]
async fn unimplemented_method() {
    let mut case = Case::new().await;
    let status = case.client.unimplemented_call(Empty {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
}

#[tokio::test]
async fn unimplemented_service() {
    let case = Case::new().await;
    let mut client = UnimplementedServiceClient::new(case.channel);
    let status = client.unimplemented_call(Empty {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
}
