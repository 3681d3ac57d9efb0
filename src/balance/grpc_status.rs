//! What a failed exchange means: whether a server can have seen the call, and which status it gets.

use std::time::Duration;

use h2::Reason;
use http::{HeaderMap, Response};
use tonic::{Code, Status};

use crate::error::chain;

/// Whether no server has acted on the call, for certain: the stream was refused, or the server went
/// away before it looked at it (RFC 9113, sections 8.7 and 6.8).
pub(super) fn is_refused(error: &h2::Error) -> bool {
    // h2 gives a stream the peer's GOAWAY as its error only if the stream's id is above the last one
    // that the peer has looked at; the others see the connection end.
    error.is_remote() && (error.is_go_away() || error.reason() == Some(Reason::REFUSED_STREAM))
}

/// The status of a call whose exchange failed, with the endpoint's address and the cause.
pub(super) fn status_of_error(address: &str, error: &h2::Error, ending: Option<&str>) -> Status {
    match (error.reason(), ending) {
        (Some(reason), _) if error.is_reset() => {
            Status::new(code_of(reason), format!("{address}: {}", chain(error)))
        }
        // Better known than h2's "broken pipe".
        (_, Some(ending)) => Status::unavailable(format!("{address}: connection lost: {ending}")),
        (_, None) => Status::unavailable(format!("{address}: {}", chain(error))),
    }
}

/// gRPC's code for a reset stream ("gRPC over HTTP2", Errors).
fn code_of(reason: Reason) -> Code {
    match reason {
        Reason::REFUSED_STREAM => Code::Unavailable,
        Reason::CANCEL => Code::Cancelled,
        Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    }
}

pub(super) fn deadline_exceeded(limit: Duration, during: &str) -> Status {
    Status::deadline_exceeded(format!("the call's time of {limit:?} is over, {during}"))
}

/// Whether a status is the endpoint's fault, as far as can be told, and not the call's.
pub(super) fn is_failure(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::Internal
            | Code::Unknown
            | Code::DataLoss
            | Code::ResourceExhausted
            | Code::DeadlineExceeded
    )
}

/// The gRPC status in headers or trailers, if it is there.
pub(super) fn status_of(headers: &HeaderMap) -> Option<Code> {
    let status = headers.get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}

/// The status of a response that is over with its head: one that says so, and one that is not
/// gRPC's at all ("HTTP to gRPC Status Code Mapping").
pub(crate) fn status_of_head<B>(response: &Response<B>) -> Option<Status> {
    Status::from_header_map(response.headers()).or_else(|| {
        let code = match response.status().as_u16() {
            200 => return None,
            400 => Code::Internal,
            401 => Code::Unauthenticated,
            403 => Code::PermissionDenied,
            404 => Code::Unimplemented,
            429 | 502..=504 => Code::Unavailable,
            _ => Code::Unknown,
        };
        let message = format!("the answer is HTTP {} and not gRPC", response.status());
        Some(Status::new(code, message))
    })
}
