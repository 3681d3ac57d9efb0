//! The head of a response: whether the response is gRPC, and the status that the head decides.

use std::fmt;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use tonic::{Code, Status};

use super::status_headers;

/// The content type of gRPC, which `+` or `;` may extend ("gRPC over HTTP2", Requests).
const GRPC: &[u8] = b"application/grpc";

/// How many characters of a content type a message shows. The peer chooses the type.
const MAX_SHOWN: usize = 100;

/// The part of a call's result that the head of a response decides.
#[derive(Debug)]
pub(super) enum ResponseHead {
    /// Messages and trailers follow.
    Open,
    /// A gRPC response without messages, whose status is in the head.
    Status(Status),
    /// No gRPC response, such as the error page of a proxy. The body cannot be decoded.
    NotGrpc(Status),
}

impl ResponseHead {
    /// Reads a head that came from `address`, and removes from its headers what tonic cannot parse.
    pub(super) fn read<B>(address: &str, response: &mut Response<B>) -> Self {
        let code = status_headers::sanitize(response.headers_mut());
        let headers = response.headers();
        if code.is_some()
            && let Some(status) = Status::from_header_map(headers)
        {
            // A status of the server counts whatever else the head says (gRPC's "HTTP to gRPC
            // Status Code Mapping").
            return Self::Status(status);
        }
        let status = response.status();
        // grpc-go and grpc-java treat a missing content type like any other that is not gRPC's.
        if status == StatusCode::OK && is_grpc(headers) {
            return Self::Open;
        }
        Self::NotGrpc(not_grpc(address, status, headers.get(header::CONTENT_TYPE)))
    }
}

fn is_grpc(headers: &HeaderMap) -> bool {
    // Usually the first of few headers, so comparing names costs less than hashing one.
    let content_type = headers
        .iter()
        .find(|(name, _)| **name == header::CONTENT_TYPE);
    let Some((_, content_type)) = content_type else {
        return false;
    };
    let Some((start, rest)) = content_type.as_bytes().split_at_checked(GRPC.len()) else {
        return false;
    };
    start.eq_ignore_ascii_case(GRPC) && matches!(rest.first(), None | Some(b'+' | b';'))
}

/// The source of the status of a call whose response is not gRPC.
#[derive(Debug)]
struct NotGrpc;

impl fmt::Display for NotGrpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the response is not gRPC")
    }
}

impl std::error::Error for NotGrpc {}

/// Whether a call failed because its response was not gRPC.
pub(crate) fn is_not_grpc(status: &Status) -> bool {
    std::error::Error::source(status).is_some_and(|source| source.is::<NotGrpc>())
}

fn not_grpc(address: &str, http: StatusCode, content_type: Option<&HeaderValue>) -> Status {
    let content_type = match content_type {
        Some(value) => {
            let value = String::from_utf8_lossy(value.as_bytes());
            let shown: String = value.chars().take(MAX_SHOWN).collect();
            format!("content-type {shown:?}")
        }
        None => "no content-type".to_owned(),
    };
    let message =
        format!("{address}: expected a gRPC response, got HTTP {http} with {content_type}");
    let mut status = Status::new(code_of(http), message);
    status.set_source(Arc::new(NotGrpc));
    status
}

/// Whether an HTTP status says that the request is at fault (RFC 9110, section 15.5), which is no
/// failure of the endpoint: malformed, too large, or of a type that the server does not take.
pub(super) fn blames_request(http: StatusCode) -> bool {
    matches!(http.as_u16(), 400 | 411 | 413..=415 | 417 | 431)
}

/// gRPC's "HTTP to gRPC Status Code Mapping".
fn code_of(http: StatusCode) -> Code {
    match http.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502..=504 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(http: u16, headers: &[(&'static str, &str)]) -> ResponseHead {
        let mut response = Response::builder().status(http);
        for (name, value) in headers {
            response = response.header(*name, *value);
        }
        ResponseHead::read("10.0.0.1:80", &mut response.body(()).unwrap())
    }

    fn page(http: u16, content_type: &str) -> Status {
        match read(http, &[("content-type", content_type)]) {
            ResponseHead::NotGrpc(status) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn content_types_of_grpc_are_accepted() {
        for accepted in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc;charset=utf-8",
            "Application/GRPC",
        ] {
            let head = read(200, &[("content-type", accepted)]);
            assert!(matches!(head, ResponseHead::Open), "{accepted}: {head:?}");
        }
        for refused in ["application/grpc-web", "application/grp", "text/html", ""] {
            assert_eq!(page(200, refused).code(), Code::Unknown, "{refused}");
        }
        assert!(matches!(read(200, &[]), ResponseHead::NotGrpc(_)));
    }

    #[test]
    fn http_status_has_grpc_s_code() {
        for (http, code) in [
            (400, Code::Internal),
            (401, Code::Unauthenticated),
            (403, Code::PermissionDenied),
            (404, Code::Unimplemented),
            (429, Code::Unavailable),
            (500, Code::Unknown),
            (502, Code::Unavailable),
            (503, Code::Unavailable),
            (504, Code::Unavailable),
            (204, Code::Unknown),
            (302, Code::Unknown),
        ] {
            assert_eq!(page(http, "text/html").code(), code, "{http}");
            assert_eq!(page(http, "application/grpc").code(), code, "{http}");
        }
    }

    #[test]
    fn message_names_the_http_status_and_the_content_type() {
        let status = page(502, "text/html");
        assert_eq!(
            status.message(),
            "10.0.0.1:80: expected a gRPC response, got HTTP 502 Bad Gateway with content-type \
             \"text/html\""
        );
        assert!(is_not_grpc(&status));
        let ResponseHead::NotGrpc(status) = read(200, &[]) else {
            panic!("a response without a content type is not gRPC");
        };
        assert!(
            status
                .message()
                .ends_with("HTTP 200 OK with no content-type")
        );
        assert!(page(502, &"x".repeat(10_000)).message().len() < 300);
    }

    #[test]
    fn status_of_the_server_prevails_over_the_http_status() {
        for (http, content_type) in [(200, "text/html"), (503, "application/grpc")] {
            let headers = [("content-type", content_type), ("grpc-status", "5")];
            let ResponseHead::Status(status) = read(http, &headers) else {
                panic!("the head has a status");
            };
            assert_eq!(status.code(), Code::NotFound);
            assert!(!is_not_grpc(&status));
        }
    }
}
