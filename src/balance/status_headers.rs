//! The headers of a gRPC status, made safe for tonic's parser.
//!
//! tonic 0.14 panics on `grpc-status-details-bin` that is not base64, and loses the code when
//! `grpc-message` is not UTF-8. The peer chooses both headers.

use http::{HeaderMap, HeaderName, HeaderValue};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode, utf8_percent_encode};
use tonic::Code;
use tonic::metadata::MetadataMap;

pub(super) const GRPC_STATUS: &str = "grpc-status";
const GRPC_MESSAGE: &str = "grpc-message";
const GRPC_STATUS_DETAILS: &str = "grpc-status-details-bin";

/// The bytes that a `grpc-message` must encode besides bytes that are not ASCII ("gRPC over HTTP2",
/// Responses).
const ENCODED: &AsciiSet = &CONTROLS.add(b'%');

/// Removes details that are not base64, and replaces what is not UTF-8 in the message. Returns the
/// code of the status. `None` if the headers have no status; tonic then parses neither of the
/// others.
pub(super) fn sanitize(headers: &mut HeaderMap) -> Option<Code> {
    let (mut code, mut has_details, mut has_message) = (None, false, false);
    // One pass, because this runs for every response, which has few headers: looking three names up
    // costs five times as much.
    for (name, value) in &*headers {
        match name.as_str() {
            GRPC_STATUS => code = code.or_else(|| Some(Code::from_bytes(value.as_bytes()))),
            GRPC_STATUS_DETAILS => has_details = true,
            GRPC_MESSAGE => has_message = true,
            _ => {}
        }
    }
    let code = code?;
    if has_details
        && let Some(details) = headers.get(GRPC_STATUS_DETAILS)
        && !is_base64(details)
    {
        headers.remove(GRPC_STATUS_DETAILS);
    }
    if has_message
        && let Some(message) = headers.get(GRPC_MESSAGE)
        && let Some(replaced) = replace_invalid_utf8(message)
    {
        headers.insert(GRPC_MESSAGE, replaced);
    }
    Some(code)
}

/// Whether tonic can decode the value. tonic decodes metadata with the same decoder as details.
fn is_base64(value: &HeaderValue) -> bool {
    let name = HeaderName::from_static(GRPC_STATUS_DETAILS);
    let alone = HeaderMap::from_iter([(name, value.clone())]);
    let details = MetadataMap::from_headers(alone);
    details
        .get_bin(GRPC_STATUS_DETAILS)
        .is_some_and(|value| value.to_bytes().is_ok())
}

/// The message with U+FFFD for each part that is not UTF-8. `None` if all of the message is.
fn replace_invalid_utf8(message: &HeaderValue) -> Option<HeaderValue> {
    let decoded = percent_decode(message.as_bytes());
    if decoded.clone().decode_utf8().is_ok() {
        return None;
    }
    let encoded = utf8_percent_encode(&decoded.decode_utf8_lossy(), ENCODED).to_string();
    // The encoded text is printable ASCII, so this always succeeds.
    Some(HeaderValue::try_from(encoded).unwrap_or(HeaderValue::from_static("")))
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    /// The status that tonic reads from the headers.
    fn parse(headers: &[(&'static str, &[u8])]) -> Status {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_bytes(value).unwrap());
        }
        sanitize(&mut map);
        Status::from_header_map(&map).unwrap()
    }

    #[test]
    fn details_that_are_not_base64_are_removed() {
        for details in ["%%%", "AAA,BBB", "A", "AB", "a_-b", "AA==A", "\u{e9}", " "] {
            let headers: [(&str, &[u8]); 3] = [
                ("grpc-status", b"9"),
                ("grpc-message", b"not now"),
                ("grpc-status-details-bin", details.as_bytes()),
            ];
            let status = parse(&headers);
            assert_eq!(status.code(), Code::FailedPrecondition, "{details}");
            assert_eq!(status.message(), "not now");
            assert!(status.details().is_empty());
        }
    }

    #[test]
    fn details_in_base64_are_kept_with_and_without_padding() {
        for details in [b"aGk=".as_slice(), b"aGk"] {
            let status = parse(&[("grpc-status", b"9"), ("grpc-status-details-bin", details)]);
            assert_eq!(status.details(), b"hi");
        }
    }

    #[test]
    fn message_is_decoded_lossily() {
        for (message, decoded) in [
            (b"caf\xe9 50%25".as_slice(), "caf\u{fffd} 50%"),
            (b"%ff%zz%", "\u{fffd}%zz%"),
            (b"%E2%82", "\u{fffd}"),
            // Valid messages stay as they are.
            (b"%E2%82%AC", "\u{20ac}"),
            ("\u{20ac}".as_bytes(), "\u{20ac}"),
            (b"100% sure", "100% sure"),
        ] {
            let status = parse(&[("grpc-status", b"14"), ("grpc-message", message)]);
            assert_eq!(status.code(), Code::Unavailable, "{decoded}");
            assert_eq!(status.message(), decoded);
        }
    }
}
