//! gRPC's interoperability test cases through a channel, against a tonic server
//! (grpc/grpc, doc/interop-test-descriptions.md).
//!
//! Each test has the name of its case, and runs in plaintext and over TLS. The cases about
//! compression, credentials and load reports are left out, because the channel has no part in them.

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

#[cfg(feature = "_tls")]
use crate::support::authority::{Authority, choose_backend};
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
    fn new(server: InteropServer, channel: BalancedChannel) -> Self {
        Self {
            client: TestServiceClient::new(channel.clone()),
            server,
            channel,
        }
    }

    async fn plain() -> Self {
        let server = InteropServer::start(Server::builder()).await;
        let channel = static_channel([server.address()], |builder| builder);
        Self::new(server, channel)
    }

    #[cfg(feature = "_tls")]
    async fn over_tls() -> Self {
        choose_backend();
        let authority = Authority::new();
        let tls = authority.server(&["127.0.0.1"]);
        let server = Server::builder().tls_config(tls).unwrap();
        let server = InteropServer::start(server).await;
        let channel = static_channel([server.address()], |builder| {
            builder.tls(authority.client_tls())
        });
        Self::new(server, channel)
    }
}

/// The cases as tests.
macro_rules! tests {
    ($start:ident: $($case:ident)*) => {
        $(
            #[tokio::test]
            async fn $case() {
                super::$case(super::Case::$start().await).await;
            }
        )*
    };
}

/// Calls a macro with all cases.
macro_rules! for_all_cases {
    ($start:ident) => {
        tests! {
            $start:
            empty_unary
            large_unary
            client_streaming
            server_streaming
            ping_pong
            empty_stream
            timeout_on_sleeping_server
            cancel_after_begin
            cancel_after_first_response
            custom_metadata
            status_code_and_message
            special_status_message
            unimplemented_method
            unimplemented_service
        }
    };
}

mod plain {
    for_all_cases!(plain);
}

#[cfg(feature = "_tls")]
mod over_tls {
    for_all_cases!(over_tls);
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

async fn empty_unary(mut case: Case) {
    let response = case.client.empty_call(Empty {}).await.unwrap();
    assert_eq!(response.into_inner(), Empty {});
}

async fn large_unary(mut case: Case) {
    let request = SimpleRequest {
        response_size: 314_159,
        payload: Some(payload(271_828)),
        response_status: None,
    };
    let response = case.client.unary_call(request).await.unwrap();
    assert_eq!(response.into_inner().payload, Some(payload(314_159)));
}

async fn client_streaming(mut case: Case) {
    let requests = [27_182, 8, 1_828, 45_904].map(|size| StreamingInputCallRequest {
        payload: Some(payload(size)),
    });
    let call = case.client.streaming_input_call(stream::iter(requests));
    let response = wait_for("a response", call).await.unwrap();
    assert_eq!(response.into_inner().aggregated_payload_size, 74_922);
}

async fn server_streaming(mut case: Case) {
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

async fn ping_pong(mut case: Case) {
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

async fn empty_stream(mut case: Case) {
    let call = case.client.full_duplex_call(stream::empty());
    let mut responses = wait_for("headers", call).await.unwrap().into_inner();
    assert_eq!(next_size(&mut responses).await, None);
}

async fn timeout_on_sleeping_server(mut case: Case) {
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

async fn cancel_after_begin(case: Case) {
    let Case {
        server,
        channel,
        mut client,
    } = case;
    let (sender, requests) = mpsc::unbounded::<StreamingInputCallRequest>();
    let call = tokio::spawn(async move { client.streaming_input_call(requests).await });
    wait_until("the call has begun", async || server.active() == 1).await;
    call.abort();
    wait_until("the server sees the end", async || server.active() == 0).await;
    assert_eq!(in_flight(&channel), 0);
    drop(sender);
}

async fn cancel_after_first_response(mut case: Case) {
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

async fn custom_metadata(mut case: Case) {
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
async fn statuses(mut case: Case, asked: EchoStatus) -> [Status; 2] {
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

async fn status_code_and_message(case: Case) {
    let message = "test status message";
    let asked = EchoStatus {
        code: 2,
        message: message.to_owned(),
    };
    for status in statuses(case, asked).await {
        assert_eq!((status.code(), status.message()), (Code::Unknown, message));
    }
}

async fn special_status_message(case: Case) {
    let message = "\t\ntest with whitespace\r\nand Unicode BMP \u{263a} and non-BMP \u{1f608}\t\n";
    let asked = EchoStatus {
        code: 2,
        message: message.to_owned(),
    };
    for status in statuses(case, asked).await {
        assert_eq!((status.code(), status.message()), (Code::Unknown, message));
    }
}

async fn unimplemented_method(mut case: Case) {
    let status = case.client.unimplemented_call(Empty {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
}

async fn unimplemented_service(case: Case) {
    let mut client = UnimplementedServiceClient::new(case.channel);
    let status = client.unimplemented_call(Empty {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status}");
}
