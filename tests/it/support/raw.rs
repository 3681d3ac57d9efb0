//! HTTP/2 servers that handle requests as no gRPC server would.

use std::future::Future;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, Request, Response};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// A server that passes each request to a closure.
pub struct RawServer {
    address: String,
    _accepting: AbortOnDropHandle<()>,
}

impl RawServer {
    pub async fn start<H, F>(handle: H) -> Self
    where
        H: Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let accepting = tokio::spawn(async move {
            while let Ok((io, _)) = listener.accept().await {
                let handle = handle.clone();
                tokio::spawn(async move {
                    let Ok(mut connection) = h2::server::handshake(io).await else {
                        return;
                    };
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        tokio::spawn(handle(request, respond));
                    }
                });
            }
        });
        Self {
            address,
            _accepting: AbortOnDropHandle::new(accepting),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }
}

/// Sends a complete response: an empty message and the status OK.
pub fn respond_ok(respond: SendResponse<Bytes>) {
    respond_with(respond, &[]);
}

/// Sends a complete response: this message, of fewer than 256 bytes, and the status OK.
pub fn respond_with(mut respond: SendResponse<Bytes>, message: &[u8]) {
    let head = Response::builder().header("content-type", "application/grpc");
    let Ok(mut body) = respond.send_response(head.body(()).unwrap(), false) else {
        return;
    };
    let length = u8::try_from(message.len()).unwrap();
    let frame = [&[0, 0, 0, 0, length], message].concat();
    body.send_data(frame.into(), false).ok();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    body.send_trailers(trailers).ok();
}
