//! Unary messages held in memory from their first to their last byte: a request's and a response's.

use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, response};
use http_body::Frame;
use http_body_util::BodyExt as _;
use tonic::body::Body;
use tonic::{Code, Status};

use super::message::{Codec, PREFIX};
use crate::balance::{ServedBy, is_not_grpc};
use crate::client::etcd_error::EtcdError;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// A complete unary response. A connection that breaks in the middle of the response therefore has
/// the same effect as a connection that breaks before the response.
pub(super) struct UnaryResponse {
    head: response::Parts,
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl UnaryResponse {
    /// Reads the response to its end.
    pub(super) async fn read(response: Response<Body>, codec: &Codec) -> Result<Self, Status> {
        let (mut head, mut body) = response.into_parts();
        codec.take_encoding(&mut head.headers)?;
        // The first frame is kept as it is, because most responses have only one.
        let mut data = Bytes::new();
        let mut joined = BytesMut::new();
        let mut trailers = None;
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(piece) if data.is_empty() && joined.is_empty() => {
                    codec.check_prefix(&piece)?;
                    data = piece;
                }
                Ok(piece) => {
                    if joined.is_empty() {
                        joined.extend_from_slice(&std::mem::take(&mut data));
                    }
                    joined.extend_from_slice(&piece);
                    codec.check_prefix(&joined)?;
                }
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        if !joined.is_empty() {
            data = joined.freeze();
        }
        Ok(Self {
            head,
            data: codec.decode(data)?,
            trailers,
        })
    }

    /// A response to `Authenticate` with an empty token, which replaces the refusal by an etcd that
    /// has authentication disabled. Calls are sent without it. Once authentication is enabled, etcd
    /// refuses them for the lack of a user, and etcd-client fetches a token.
    pub(super) fn empty_token() -> Self {
        let (mut head, _) = Response::new(()).into_parts();
        let grpc = HeaderValue::from_static("application/grpc");
        head.headers.insert(http::header::CONTENT_TYPE, grpc);
        let ok = HeaderValue::from(Code::Ok as i32);
        Self {
            head,
            // A message without fields: not compressed, and of length 0.
            data: Bytes::from_static(&[0; 5]),
            trailers: Some(HeaderMap::from_iter([(GRPC_STATUS, ok)])),
        }
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

    /// The message without its prefix.
    pub(super) fn payload(&self) -> &[u8] {
        self.data.get(PREFIX..).unwrap_or_default()
    }

    /// Whether the response is this error.
    pub(super) fn is_error(&self, error: EtcdError) -> bool {
        // The message is decoded for failures only.
        let code = self.code();
        code != Code::Ok && EtcdError::decode(code, &self.message()) == error
    }

    /// The member that sent the response.
    pub(super) fn served_by(&self) -> Option<&ServedBy> {
        self.head.extensions.get()
    }

    /// Applies [`map_refusal`] to the response.
    pub(super) fn with_refusal_mapped(mut self, has_user: bool) -> Self {
        let headers = self.trailers.as_mut().unwrap_or(&mut self.head.headers);
        map_refusal(headers, has_user);
        self
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let body = BufferedBody {
            data: (!self.data.is_empty()).then_some(self.data),
            trailers: self.trailers,
        };
        Response::from_parts(self.head, Body::new(body))
    }
}

/// Gives a response that comes from something between this client and etcd, such as the page of a
/// proxy with HTTP status 200, the code of a member that cannot be reached, so that the call is sent
/// to another member. Not for writes: a proxy may have passed the call to a member before.
pub(super) fn map_not_grpc(status: Status) -> Status {
    if status.code() == Code::Unknown && is_not_grpc(&status) {
        return Status::unavailable(status.message());
    }
    status
}

pub(super) fn code_in(headers: &HeaderMap) -> Option<Code> {
    let status = headers.get(GRPC_STATUS)?;
    Some(Code::from_bytes(status.as_bytes()))
}

/// Whether the status in these headers is this error.
pub(super) fn is_error_in(headers: &HeaderMap, error: EtcdError) -> bool {
    // The message is decoded for failures only.
    code_in(headers).is_some_and(|code| {
        code != Code::Ok && EtcdError::decode(code, &message_in(headers)) == error
    })
}

pub(super) fn message_in(headers: &HeaderMap) -> String {
    Status::from_header_map(headers).map_or_else(String::new, |status| status.message().to_owned())
}

/// Gives a refusal the code that leads etcd-client or this client to repeat the call. etcd refuses
/// before it executes anything, so writes may be repeated as well.
///
/// - etcd refuses a token that is older than its users and roles (a JWT after any change of them)
///   as an invalid argument. etcd's own client renews such a token; etcd-client renews a token only
///   for the code of an expired one. A user's call without a token gets that code as well.
/// - A learner refuses calls from 3.6 on as a failed precondition. Another member may take them.
pub(super) fn map_refusal(headers: &mut HeaderMap, has_user: bool) {
    // The message is decoded for failures only.
    let Some(code) = code_in(headers).filter(|code| *code != Code::Ok) else {
        return;
    };
    let code = match EtcdError::decode(code, &message_in(headers)) {
        EtcdError::OldToken => Code::Unauthenticated,
        EtcdError::NoUser if has_user => Code::Unauthenticated,
        EtcdError::Learner => Code::Unavailable,
        _ => return,
    };
    headers.insert(GRPC_STATUS, HeaderValue::from(code as i32));
}

/// A body that is held in memory.
struct BufferedBody {
    data: Option<Bytes>,
    trailers: Option<HeaderMap>,
}

impl http_body::Body for BufferedBody {
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

/// The data of a request's body. tonic holds the message in memory, most often as one frame.
pub(super) async fn collect(mut body: Body) -> Result<Bytes, Status> {
    let mut data = Bytes::new();
    while let Some(frame) = body.frame().await {
        if let Ok(piece) = frame?.into_data() {
            data = if data.is_empty() {
                piece
            } else {
                [data, piece].concat().into()
            };
        }
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_get_the_code_that_says_what_helps() {
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
            ("3", "etcdserver: user name is empty", Code::Unauthenticated),
            (
                "2",
                "etcdserver: revision of auth store is old",
                Code::Unknown,
            ),
            (
                "9",
                "etcdserver: rpc not supported for learner",
                Code::Unavailable,
            ),
            (
                "9",
                "etcdserver: lease already exists",
                Code::FailedPrecondition,
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
                let response = UnaryResponse {
                    head,
                    data,
                    trailers,
                }
                .with_refusal_mapped(true);
                assert_eq!(response.code(), named, "{message}");
            }
        }
    }

    #[test]
    fn client_without_a_user_needs_no_token() {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-status", HeaderValue::from_static("3"));
        let text = HeaderValue::from_static("etcdserver: user name is empty");
        headers.insert("grpc-message", text);
        map_refusal(&mut headers, false);
        assert_eq!(code_in(&headers), Some(Code::InvalidArgument));
    }
}
