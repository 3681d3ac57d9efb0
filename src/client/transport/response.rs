//! Messages at hand from beginning to end: a request's, and an answer's.

use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use tonic::body::Body;
use tonic::{Code, Status};

use super::message::Codec;
use crate::balance::status_of_head;
use crate::client::etcd_error::OLD_TOKEN;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// The whole of an answer: a connection that breaks in the middle of one is like one that broke
/// before.
pub(super) struct Answer {
    head: response::Parts,
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl Answer {
    pub(super) async fn read(response: Response<Body>, codec: &Codec) -> Result<Self, Status> {
        not_from_etcd(&response)?;
        let (mut head, mut body) = response.into_parts();
        codec.answer(&mut head.headers)?;
        let mut data = Bytes::new();
        let mut more = BytesMut::new();
        let mut trailers = None;
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(piece) if data.is_empty() && more.is_empty() => {
                    codec.check_begun(&piece)?;
                    data = piece;
                }
                Ok(piece) => {
                    if more.is_empty() {
                        more.extend_from_slice(&std::mem::take(&mut data));
                    }
                    more.extend_from_slice(&piece);
                    codec.check_begun(&more)?;
                }
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        if !more.is_empty() {
            data = more.freeze();
        }
        Ok(Self {
            head,
            data: codec.whole(data)?,
            trailers,
        })
    }

    pub(super) fn code(&self) -> Code {
        let trailers = self.trailers.as_ref().and_then(code_in);
        trailers
            .or_else(|| code_in(&self.head.headers))
            .unwrap_or(Code::Unknown)
    }

    pub(super) fn message(&self) -> String {
        message_in(self.trailers.as_ref().unwrap_or(&self.head.headers))
    }

    /// Whether a user was refused because etcd asks for none.
    pub(super) fn is_auth_not_enabled(&self) -> bool {
        // Told apart by its text, as in etcd's own client.
        self.code() == Code::FailedPrecondition
            && self.message().contains("authentication is not enabled")
    }

    /// A token that is none, as the answer to a user whom etcd does not ask for: etcd does not look at it, and
    /// once it asks for users it refuses it as an expired one, which is then renewed.
    pub(super) fn no_token() -> Self {
        let (mut head, _) = Response::new(()).into_parts();
        let grpc = HeaderValue::from_static("application/grpc");
        head.headers.insert(http::header::CONTENT_TYPE, grpc);
        let ok = HeaderValue::from(Code::Ok as i32);
        Self {
            head,
            // A message without a field: not compressed, and of no length.
            data: Bytes::from_static(&[0; 5]),
            trailers: Some(HeaderMap::from_iter([(GRPC_STATUS, ok)])),
        }
    }

    /// Whether a member has refused a call before it looked at it, since it has no leader. Of etcd's own
    /// services only; those that call it from within (`v3lock`, `v3election`) may have done something before.
    pub(super) fn is_without_leader(&self) -> bool {
        self.code() == Code::Unavailable && self.message() == "etcdserver: no leader"
    }

    /// The same with an old token named as etcd-client knows it.
    pub(super) fn renewable(mut self) -> Self {
        let headers = self.trailers.as_mut().unwrap_or(&mut self.head.headers);
        name_old_token(headers);
        self
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let body = Whole {
            data: (!self.data.is_empty()).then_some(self.data),
            trailers: self.trailers,
        };
        Response::from_parts(self.head, Body::new(body))
    }
}

/// That what answers is something between here and etcd, which knows nothing of gRPC.
pub(super) fn not_from_etcd<B>(response: &Response<B>) -> Result<(), Status> {
    if response.headers().contains_key(GRPC_STATUS) {
        return Ok(());
    }
    if let Some(status) = status_of_head(response) {
        return Err(status);
    }
    let said = response.headers().get(http::header::CONTENT_TYPE);
    if said.is_some_and(|said| said.as_bytes().starts_with(b"application/grpc")) {
        return Ok(());
    }
    Err(Status::unavailable(format!(
        "the answer is not gRPC's: its content type is {said:?}"
    )))
}

pub(super) fn code_in(headers: &HeaderMap) -> Option<Code> {
    let status = headers.get(GRPC_STATUS)?;
    Some(Code::from_bytes(status.as_bytes()))
}

pub(super) fn message_in(headers: &HeaderMap) -> String {
    Status::from_header_map(headers).map_or_else(String::new, |status| status.message().to_owned())
}

/// etcd calls a token that is older than its users and roles (a JWT after any change of them) an invalid
/// argument, and its own client renews it even so. etcd-client does for the code that expired ones are
/// refused with. Either refusal comes before anything is done, so this holds for writes too.
pub(super) fn name_old_token(headers: &mut HeaderMap) {
    if code_in(headers) == Some(Code::InvalidArgument) && message_in(headers).contains(OLD_TOKEN) {
        let code = HeaderValue::from(Code::Unauthenticated as i32);
        headers.insert(GRPC_STATUS, code);
    }
}

/// A body that is at hand.
struct Whole {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let data = self.data.take().map(Frame::data);
        let frame = data.or_else(|| self.trailers.take().map(Frame::trailers));
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }
}

/// A request's message: tonic has it at hand, most often in one piece.
pub(super) async fn whole(mut body: Body) -> Result<Bytes, Status> {
    let mut whole = Bytes::new();
    while let Some(frame) = body.frame().await {
        if let Ok(piece) = frame?.into_data() {
            whole = if whole.is_empty() {
                piece
            } else {
                [whole, piece].concat().into()
            };
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_token_is_named_as_an_expired_one_and_nothing_else_is() {
        for (code, message, named) in [
            (
                "3",
                "etcdserver: revision of auth store is old",
                Code::Unauthenticated,
            ),
            (
                "3",
                "etcdserver:%20revision%20of%20auth%20store%20is%20old",
                Code::Unauthenticated,
            ),
            ("3", "etcdserver: user name is empty", Code::InvalidArgument),
            (
                "2",
                "etcdserver: revision of auth store is old",
                Code::Unknown,
            ),
            ("0", "", Code::Ok),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-status", HeaderValue::from_static(code));
            headers.insert("grpc-message", HeaderValue::from_static(message));
            for in_trailers in [false, true] {
                let (mut head, _) = Response::new(()).into_parts();
                let mut trailers = None;
                match in_trailers {
                    true => trailers = Some(headers.clone()),
                    false => head.headers = headers.clone(),
                }
                let data = Bytes::new();
                let answer = Answer {
                    head,
                    data,
                    trailers,
                }
                .renewable();
                assert_eq!(answer.code(), named, "{message}");
            }
        }
    }
}
