//! Every kind of call gives the same result as on tonic's own channel.

use std::fmt::Debug;
use std::future::Future;
use std::time::{Duration, Instant};

use crate::support::PATIENCE;
use crate::support::balanced::{hello, in_flight, static_channel, status_of, wait_until_ready};
use crate::support::echo::EchoServer;
use crate::support::raw::RawServer;
use futures::channel::mpsc;
use futures::{StreamExt, stream};
use h2::Reason;
use helloworld::echo::echo_client::EchoClient;
use helloworld::echo::{EchoReply, EchoRequest};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::Endpoint;
use tonic::{Code, Request, Response, Status, Streaming};
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

/// tonic's channel or ours.
type EitherChannel = BoxCloneSyncService<
    http::Request<tonic::body::Body>,
    http::Response<tonic::body::Body>,
    tonic::codegen::StdError,
>;

async fn tonic_channel(address: &str) -> EitherChannel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    let channel = endpoint.connect().await.unwrap();
    BoxCloneSyncService::new(channel.map_err(Into::into))
}

async fn our_channel(address: &str) -> EitherChannel {
    let channel = static_channel([address], |builder| builder);
    wait_until_ready(&channel, 1).await;
    BoxCloneSyncService::new(channel.map_err(Into::into))
}

/// The metadata that a caller sees, except for values that differ between any two calls.
fn describe_metadata(metadata: &MetadataMap) -> String {
    let mut headers = metadata.clone().into_headers();
    for varying in ["date", "seen-user-agent"] {
        headers.remove(varying);
    }
    let mut lines: Vec<_> = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value:?}"))
        .collect();
    lines.sort();
    lines.join("\n")
}

fn describe_status(status: &Status) -> String {
    format!(
        "{:?} {:?} {:?} {}",
        status.code(),
        status.message(),
        status.details(),
        describe_metadata(status.metadata())
    )
}

fn describe_response<T: Debug>(result: Result<Response<T>, Status>) -> String {
    match result {
        Ok(response) => {
            let seen = describe_metadata(response.metadata());
            format!("{seen} {:?}", response.into_inner())
        }
        Err(status) => describe_status(&status),
    }
}

async fn describe_stream(result: Result<Response<Streaming<EchoReply>>, Status>) -> String {
    let response = match result {
        Ok(response) => response,
        Err(status) => return format!("without response: {}", describe_status(&status)),
    };
    let mut all = vec![describe_metadata(response.metadata())];
    let mut replies = response.into_inner();
    loop {
        match replies.message().await {
            Ok(Some(reply)) => all.push(format!("{} of {}", reply.index, reply.payload.len())),
            Ok(None) => {
                let trailers = replies.trailers().await.unwrap();
                all.push(format!("{:?}", trailers.as_ref().map(describe_metadata)));
                break;
            }
            Err(status) => {
                all.push(describe_status(&status));
                break;
            }
        }
    }
    all.join("\n")
}

fn failing(code: Code) -> EchoRequest {
    EchoRequest {
        fail_with: code as u32,
        ..hello()
    }
}

fn of_size(size: usize) -> EchoRequest {
    EchoRequest {
        payload: vec![0xa5; size],
        ..EchoRequest::default()
    }
}

/// Makes the same calls on both channels and compares the results.
async fn assert_same<F>(what: &str, address: &str, calls: impl Fn(EchoClient<EitherChannel>) -> F)
where
    F: Future<Output = String>,
{
    let expected = calls(EchoClient::new(tonic_channel(address).await)).await;
    let got = calls(EchoClient::new(our_channel(address).await)).await;
    let short = |text: &str| text.chars().take(2_000).collect::<String>();
    assert!(
        got == expected,
        "{what}:\n{}\ninstead of\n{}",
        short(&got),
        short(&expected)
    );
}

#[tokio::test]
async fn metadata_is_the_same() {
    let server = EchoServer::start();
    assert_same("metadata", server.address(), |mut client| async move {
        let with_metadata = |message| {
            let mut request = Request::new(message);
            let text = "m".repeat(1_000).parse().unwrap();
            request.metadata_mut().insert("x-echo", text);
            request
                .metadata_mut()
                .append("x-echo", "again".parse().unwrap());
            let bytes: Vec<u8> = (0..1_000).map(|byte| byte as u8).collect();
            let bytes = MetadataValue::from_bytes(&bytes);
            request.metadata_mut().insert_bin("x-echo-bin", bytes);
            request
        };
        let response = describe_response(client.unary(with_metadata(hello())).await);
        assert!(response.contains(&"m".repeat(1_000)), "{response}");
        let many = EchoRequest {
            count: 2,
            ..hello()
        };
        response + &describe_stream(client.server_stream(with_metadata(many)).await).await
    })
    .await;
}

#[tokio::test]
async fn statuses_are_the_same() {
    let server = EchoServer::start();
    assert_same("statuses", server.address(), |mut client| async move {
        let mut all = String::new();
        for code in 1..=16 {
            let code = Code::from_i32(code);
            // The first two fail with trailers only, the others after some messages.
            all += &describe_response(client.unary(failing(code)).await);
            all += &describe_stream(client.server_stream(failing(code)).await).await;
            let later = EchoRequest {
                count: 3,
                ..failing(code)
            };
            all += &describe_stream(client.server_stream(later).await).await;
            let requests = stream::iter([hello(), failing(code), hello()]);
            all += &describe_response(client.client_stream(requests).await);
            let requests = stream::iter([hello(), failing(code), hello()]);
            all += &describe_stream(client.bidi(requests).await).await;
        }
        assert!(all.contains("as asked"), "{all}");
        all
    })
    .await;
}

#[tokio::test]
async fn streams_of_any_length_are_the_same() {
    let server = EchoServer::start();
    assert_same("streams", server.address(), |mut client| async move {
        let mut all = String::new();
        for count in [0, 1, 2, 1_000] {
            let many = EchoRequest { count, ..hello() };
            all += &describe_stream(client.server_stream(many).await).await;
            let requests = stream::iter(vec![hello(); count as usize]);
            all += &describe_response(client.client_stream(requests).await);
            let requests = stream::iter(vec![hello(); count as usize]);
            all += &describe_stream(client.bidi(requests).await).await;
        }
        all += &describe_response(client.unary(EchoRequest::default()).await);
        all
    })
    .await;
}

#[tokio::test]
async fn bidirectional_messages_alternate() {
    let server = EchoServer::start();
    assert_same("ping-pong", server.address(), |mut client| async move {
        let (requests, receiver) = mpsc::unbounded();
        requests.unbounded_send(hello()).unwrap();
        let replies = client.bidi(receiver).await.unwrap();
        let mut replies = replies.into_inner();
        for index in 0..200 {
            let reply = replies.message().await.unwrap().unwrap();
            assert_eq!(reply.index, index);
            requests.unbounded_send(hello()).unwrap();
        }
        requests.close_channel();
        replies.count().await.to_string()
    })
    .await;
}

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_are_the_same() {
    let server = EchoServer::start();
    assert_same("sizes", server.address(), |client| async move {
        let mut client = client.max_decoding_message_size(64 * MIB);
        let mut all = String::new();
        // Around the sizes of a frame, the flow-control window and the replay buffer, and larger.
        for size in [16_384, 65_530, 65_536, 65_537, 4 * MIB, 16 * MIB] {
            let reply = client.unary(of_size(size)).await.unwrap().into_inner();
            assert!(reply.payload == of_size(size).payload);
            let several = EchoRequest {
                count: 3,
                ..of_size(size)
            };
            all += &describe_stream(client.server_stream(several).await).await;
            let requests = stream::iter(vec![of_size(size); 3]);
            all += &describe_response(client.client_stream(requests).await);
            let requests = stream::iter(vec![of_size(size); 3]);
            all += &describe_stream(client.bidi(requests).await).await;
        }
        all
    })
    .await;
}

#[tokio::test]
async fn messages_over_a_limit_are_the_same() {
    let server = EchoServer::start();
    assert_same("limits", server.address(), |client| async move {
        let mut receives = client.clone().max_decoding_message_size(1_000);
        let mut all = describe_response(receives.unary(of_size(1_001)).await);
        let several = EchoRequest {
            count: 3,
            ..of_size(1_001)
        };
        all += &describe_stream(receives.server_stream(several).await).await;
        // A message over the server's own limit.
        all += &describe_response(receives.unary(of_size(65 * MIB)).await);
        all
    })
    .await;

    // tonic's channel reports "h2 protocol error" instead of the limit of a sent message.
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let started = Instant::now();
    let mut sends = EchoClient::new(channel.clone()).max_encoding_message_size(1_000);
    let error = sends.unary(of_size(1_001)).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange);
    assert!(error.message().contains("the limit is: 1000"), "{error:?}");
    let requests = stream::iter([of_size(1), of_size(1_001)]);
    let error = sends.client_stream(requests).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error:?}");
    let later = stream::iter([of_size(1), of_size(1_001)]).then(|request| async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        request
    });
    let error = sends.client_stream(later).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error:?}");
    // The same after the response has begun.
    let (requests, receiver) = mpsc::unbounded();
    requests.unbounded_send(of_size(1)).unwrap();
    let mut replies = sends.bidi(receiver).await.unwrap().into_inner();
    replies.message().await.unwrap().unwrap();
    requests.unbounded_send(of_size(1_001)).unwrap();
    let error = replies.message().await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error:?}");
    assert!(error.message().contains("the limit is: 1000"), "{error:?}");
    drop(replies);
    assert_eq!(in_flight(&channel), 0);
    // None of these is a failure of the server, which would count as a latency of one second.
    let latency = status_of(&channel, server.address()).unwrap().latency;
    assert!(latency.unwrap() <= started.elapsed(), "{latency:?}");
}

#[tokio::test]
async fn unknown_method_is_the_same() {
    let server = EchoServer::start();
    let mut statuses = Vec::new();
    for channel in [
        tonic_channel(server.address()).await,
        our_channel(server.address()).await,
    ] {
        let mut client = GreeterClient::new(channel);
        let response = client.say_hello(HelloRequest::default()).await;
        statuses.push(describe_status(&response.unwrap_err()));
    }
    assert!(statuses[1].starts_with("Unimplemented"), "{statuses:?}");
    assert_eq!(statuses[1], statuses[0]);
}

#[tokio::test]
async fn slow_reader_does_not_block_other_calls() {
    let server = EchoServer::start();
    let channel = static_channel([server.address()], |builder| builder);
    wait_until_ready(&channel, 1).await;
    let mut client = EchoClient::new(channel.clone()).max_decoding_message_size(64 * MIB);
    let unread = EchoRequest {
        count: 100,
        ..of_size(MIB)
    };
    let mut unread = client.server_stream(unread).await.unwrap().into_inner();
    unread.message().await.unwrap().unwrap();
    for _ in 0..20 {
        let call = client.unary(of_size(MIB));
        tokio::time::timeout(PATIENCE, call).await.unwrap().unwrap();
    }
    let rest = unread.count().await;
    assert_eq!(rest, 99);
}

const REASONS: [Reason; 7] = [
    Reason::NO_ERROR,
    Reason::PROTOCOL_ERROR,
    Reason::INTERNAL_ERROR,
    Reason::FLOW_CONTROL_ERROR,
    Reason::CANCEL,
    Reason::ENHANCE_YOUR_CALM,
    Reason::INADEQUATE_SECURITY,
];

/// Sends the broken response that the request's metadata asks for.
async fn respond_broken(
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<bytes::Bytes>,
) {
    let grpc = || http::Response::builder().header("content-type", "application/grpc");
    let metadata = |name| request.headers().get(name)?.to_str().ok()?.parse().ok();
    let reason = |which: u32| REASONS[which as usize % REASONS.len()];
    let Some(how): Option<u32> = metadata("x-how") else {
        return;
    };
    let which = metadata("x-which").unwrap_or(0);
    match how {
        // A reset before the response headers, after them, and in the middle of a message.
        0 => respond.send_reset(reason(which)),
        1 => {
            let mut body = respond
                .send_response(grpc().body(()).unwrap(), false)
                .unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            body.send_reset(reason(which));
        }
        2 => {
            let mut body = respond
                .send_response(grpc().body(()).unwrap(), false)
                .unwrap();
            body.send_data(vec![0, 0, 0, 0, 9, 1].into(), false)
                .unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            body.send_reset(reason(which));
        }
        // No status, half a message, an HTTP error, an invalid status.
        3 => drop(respond.send_response(grpc().body(()).unwrap(), true)),
        4 => {
            let mut body = respond
                .send_response(grpc().body(()).unwrap(), false)
                .unwrap();
            body.send_data(vec![0, 0, 0, 0, 9, 1].into(), true).unwrap();
        }
        5 => {
            let status = [400, 401, 403, 404, 429, 502, 503, 504][which as usize % 8];
            let head = http::Response::builder().status(status);
            drop(respond.send_response(head.body(()).unwrap(), true));
        }
        6 => {
            let head = grpc().header("grpc-status", "what");
            drop(respond.send_response(head.body(()).unwrap(), true));
        }
        // A complete response, then a reset of the unfinished request.
        _ => {
            let mut body = respond
                .send_response(grpc().body(()).unwrap(), false)
                .unwrap();
            body.send_data(vec![0; 5].into(), false).unwrap();
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            body.send_trailers(trailers).unwrap();
            respond.send_reset(Reason::NO_ERROR);
        }
    }
}

/// Responses that are not gRPC or break off: the code is tonic's, the message may be better.
#[tokio::test]
async fn broken_response_has_tonics_code() {
    let server = RawServer::start(respond_broken).await;
    for how in 0..=7 {
        for which in 0..8 {
            let what = format!("x-how {how}, x-which {which}");
            assert_same(&what, server.address(), |mut client| async move {
                let request_with = |message| {
                    let mut request = Request::new(message);
                    let metadata = request.metadata_mut();
                    metadata.insert("x-how", how.to_string().parse().unwrap());
                    metadata.insert("x-which", which.to_string().parse().unwrap());
                    request
                };
                let unary = client.unary(request_with(hello())).await.map(drop);
                let streamed = match client.server_stream(request_with(hello())).await {
                    Ok(response) => response.into_inner().message().await.map(drop),
                    Err(status) => Err(status),
                };
                [unary, streamed]
                    .map(|result| format!("{:?}", result.map_err(|status| status.code())))
                    .join(" ")
            })
            .await;
        }
    }
}
