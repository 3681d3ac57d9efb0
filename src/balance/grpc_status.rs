//! gRPC statuses of exchanges that failed, and which of them count against an endpoint.

use h2::Reason;
use tonic::{Code, Status};

use crate::error::chain;

/// Whether the server reset the stream because the request is malformed (RFC 9113, section 8.1.1),
/// which is no failure of the endpoint.
pub(super) fn is_malformed_request(error: &h2::Error) -> bool {
    error.is_remote() && error.is_reset() && error.reason() == Some(Reason::PROTOCOL_ERROR)
}

/// The status of a call whose exchange with `address` failed with `error`. `close_reason` is the
/// cause that the connection's I/O has seen.
pub(super) fn status_of_error(
    address: &str,
    error: &h2::Error,
    close_reason: Option<&str>,
) -> Status {
    match (error.reason(), close_reason) {
        (Some(reason), _) if error.is_reset() => Status::new(
            code_of_reset(reason),
            format!("{address}: {}", chain(error)),
        ),
        // More exact than h2's own "broken pipe".
        (_, Some(cause)) => Status::unavailable(format!("{address}: connection lost: {cause}")),
        (_, None) => Status::unavailable(format!("{address}: {}", chain(error))),
    }
}

/// The status of a call of which nothing was sent to `address`. `reason` is why the connection takes
/// no calls, if that is known.
pub(super) fn status_of_unsent(address: &str, reason: Option<&str>) -> Status {
    let reason = reason.unwrap_or("the connection accepts no more calls");
    Status::unavailable(format!("{address}: the request was not sent: {reason}"))
}

/// gRPC's code for a stream that was reset ("gRPC over HTTP2", Errors).
fn code_of_reset(reason: Reason) -> Code {
    match reason {
        Reason::REFUSED_STREAM => Code::Unavailable,
        Reason::CANCEL => Code::Cancelled,
        Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    }
}

/// Whether a status counts as a failure of the endpoint, as opposed to a fault of the call.
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
