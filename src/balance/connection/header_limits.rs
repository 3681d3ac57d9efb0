//! The limits of headers: what the peer accepts, and what this side accepts.
//!
//! h2 knows one number for what it advertises and what it enforces, and it ends the connection, and
//! with it the other calls, above four times that number. So h2 gets [`READABLE`], the peer is told
//! the user's limit (see [`AdvertisedLimit`](super::advertised_limit::AdvertisedLimit)), and each
//! call checks its own response against that.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use http::{HeaderMap, Request};
use tonic::Status;

/// The size of headers that h2 reads at least, in bytes: 1 MiB, and something for the other headers
/// beside one of that size. Larger headers may end the connection. Bounds the memory of a
/// connection, because h2 reads the headers of one stream at a time.
const READABLE: u32 = (1 << 20) + (1 << 16);

/// Headers that take more bytes than this on the wire are remembered with their stream, because h2
/// does not say which stream's headers were too large. Those that are, over [`READABLE`] or in more
/// CONTINUATION frames than h2 takes, are far above, unless they repeat themselves or come in frames
/// of a few hundred bytes.
pub(super) const LARGE_BLOCK: usize = 1 << 16;

/// The bytes that each header adds to a list beside its name and value (RFC 9113, section 6.5.2).
const ENTRY: usize = 32;

/// The size of `:status`.
const STATUS: usize = ":status".len() + "200".len() + ENTRY;

/// The limits of one connection.
#[derive(Debug)]
pub(crate) struct HeaderLimits {
    /// The largest header list of a response that a call accepts.
    own: u32,
    /// The peer's `SETTINGS_MAX_HEADER_LIST_SIZE`.
    peer: AtomicU32,
    /// The stream with the latest headers of more than [`LARGE_BLOCK`] bytes; 0 before the first.
    large: AtomicU32,
    /// Whether h2 has not shown yet that it could read those.
    is_reading_large: AtomicBool,
    /// The stream with the latest headers of that size that end their stream, as all trailers do; 0
    /// before the first.
    large_trailers: AtomicU32,
}

/// Headers that are larger than a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadersTooLarge {
    Request {
        size: usize,
        limit: u32,
    },
    /// The size is not known if h2 did not read the headers to their end.
    Response {
        size: Option<usize>,
        limit: u32,
    },
}

/// The number for h2, if calls accept headers of `own` bytes.
pub(super) fn readable(own: u32) -> u32 {
    own.max(READABLE)
}

impl HeaderLimits {
    pub(super) fn new(own: u32) -> Self {
        Self {
            own,
            peer: AtomicU32::new(u32::MAX),
            large: AtomicU32::new(0),
            is_reading_large: AtomicBool::new(false),
            large_trailers: AtomicU32::new(0),
        }
    }

    pub(super) fn set_peer(&self, limit: u32) {
        self.peer.store(limit, Ordering::Relaxed);
    }

    pub(super) fn record_large(&self, stream: u32, ends_stream: bool) {
        self.large.store(stream, Ordering::Relaxed);
        if ends_stream {
            self.large_trailers.store(stream, Ordering::Relaxed);
        }
        self.is_reading_large.store(true, Ordering::Relaxed);
    }

    /// Records that h2 asks for more after the end of large headers, so that these have not ended
    /// the connection.
    pub(super) fn record_large_read(&self) {
        self.is_reading_large.store(false, Ordering::Relaxed);
    }

    /// Whether large headers are the latest that may have ended the connection.
    pub(super) fn is_reading_large(&self) -> bool {
        self.is_reading_large.load(Ordering::Relaxed)
    }

    /// Whether any stream had large headers.
    pub(super) fn has_large(&self) -> bool {
        self.large.load(Ordering::Relaxed) != 0
    }

    /// Whether a stream had large headers, the latest of the connection.
    pub(super) fn is_large(&self, stream: u32) -> bool {
        self.large.load(Ordering::Relaxed) == stream
    }

    /// Whether a stream, whose head was read, had large trailers, the latest of the connection.
    pub(super) fn has_large_trailers(&self, stream: u32) -> bool {
        self.large_trailers.load(Ordering::Relaxed) == stream
    }

    /// Checks a request against the peer's limit.
    pub(super) fn check_request(&self, request: &Request<()>) -> Result<(), HeadersTooLarge> {
        let size = request_size(request);
        let limit = self.peer.load(Ordering::Relaxed);
        match size > limit as usize {
            true => Err(HeadersTooLarge::Request { size, limit }),
            false => Ok(()),
        }
    }

    /// Checks the head of a response against the own limit.
    pub(super) fn check_head(&self, headers: &HeaderMap) -> Result<(), HeadersTooLarge> {
        self.check_size(STATUS + size(headers))
    }

    /// Checks trailers against the own limit.
    pub(super) fn check_trailers(&self, trailers: &HeaderMap) -> Result<(), HeadersTooLarge> {
        self.check_size(size(trailers))
    }

    fn check_size(&self, size: usize) -> Result<(), HeadersTooLarge> {
        match size > self.own as usize {
            true => Err(HeadersTooLarge::Response {
                size: Some(size),
                limit: self.own,
            }),
            false => Ok(()),
        }
    }

    /// The error of a response whose headers h2 did not read to their end.
    pub(super) fn unreadable(&self) -> HeadersTooLarge {
        HeadersTooLarge::Response {
            size: None,
            limit: self.own,
        }
    }
}

impl HeadersTooLarge {
    /// The status of the call, which was sent to `address` or would have been.
    pub(crate) fn status(self, address: &str) -> Status {
        Status::resource_exhausted(match self {
            Self::Request { size, limit } => format!(
                "the request's headers of {size} bytes were not sent, because {address} accepts \
                 {limit} bytes (SETTINGS_MAX_HEADER_LIST_SIZE)"
            ),
            Self::Response {
                size: Some(size),
                limit,
            } => format!(
                "{address}: the response's headers of {size} bytes are over \
                 http2_max_header_list_size, {limit} bytes"
            ),
            Self::Response { size: None, limit } => format!(
                "{address}: the response's headers are over http2_max_header_list_size, {limit} \
                 bytes, and too large to be read"
            ),
        })
    }
}

fn size(headers: &HeaderMap) -> usize {
    let entry = |(name, value): (&http::HeaderName, &http::HeaderValue)| {
        name.as_str().len() + value.len() + ENTRY
    };
    headers.iter().map(entry).sum()
}

fn request_size(request: &Request<()>) -> usize {
    let uri = request.uri();
    let path = uri.path_and_query().map_or(0, |path| path.as_str().len());
    let authority = uri.authority().map_or(0, |host| host.as_str().len());
    let pseudo = ":method".len()
        + request.method().as_str().len()
        + ":scheme".len()
        + uri.scheme_str().map_or(0, str::len)
        + ":authority".len()
        + authority
        + ":path".len()
        + path
        + 4 * ENTRY;
    pseudo + size(request.headers())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.append("x-a", value.parse().unwrap());
        headers.append("x-a", "b".parse().unwrap());
        headers
    }

    #[test]
    fn size_is_that_of_rfc_9113() {
        assert_eq!(size(&headers("aaaa")), (3 + 4 + 32) + (3 + 1 + 32));
        let request = Request::post("http://10.0.0.1:80/echo.Echo/Unary?q");
        let request = request.body(()).unwrap();
        let pseudo = (7 + 4) + (7 + 4) + (10 + 11) + (5 + 18) + 4 * 32;
        assert_eq!(request_size(&request), pseudo);
    }

    #[test]
    fn request_is_checked_against_the_peer_s_latest_limit() {
        let limits = HeaderLimits::new(1);
        let mut request = Request::new(());
        *request.headers_mut() = headers(&"a".repeat(10_000));
        limits.check_request(&request).unwrap();
        let size = request_size(&request);
        limits.set_peer(size as u32);
        limits.check_request(&request).unwrap();
        limits.set_peer(size as u32 - 1);
        let status = limits.check_request(&request).unwrap_err().status("a:1");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(status.message().contains("SETTINGS_MAX_HEADER_LIST_SIZE"));
    }

    #[test]
    fn response_is_checked_against_the_own_limit() {
        let limits = HeaderLimits::new(75);
        limits.check_trailers(&headers("aaaa")).unwrap();
        let status = limits.check_trailers(&headers("aaaaa")).unwrap_err();
        let status = status.status("a:1");
        assert_eq!(
            status.message(),
            "a:1: the response's headers of 76 bytes are over http2_max_header_list_size, 75 bytes"
        );
        // `:status` counts as well.
        assert!(limits.check_head(&headers("aaaa")).is_err());
    }
}
