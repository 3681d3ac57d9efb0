//! The head of a call's request, and of each attempt's.

use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};
use tokio::time::Instant;
use tonic::body::Body;

use super::grpc_timeout::{self, Deadline, GRPC_TIMEOUT};
use crate::balance::connection::Target;

/// The only value of `te` that HTTP/2 allows (RFC 9113, section 8.2.2).
const TRAILERS: HeaderValue = HeaderValue::from_static("trailers");

/// The head of a call's request, from which each attempt gets its own.
#[derive(Debug)]
pub(super) struct CallHead {
    method: Method,
    path: PathAndQuery,
    headers: HeaderMap,
}

/// Splits a request into the head that attempts are made from, and the body.
///
/// `user_agent` is appended to the request's own.
pub(super) fn split_request(request: Request<Body>, user_agent: &HeaderValue) -> (CallHead, Body) {
    let (mut parts, body) = request.into_parts();
    remove_http1_headers(&mut parts.headers);
    let user_agent = match parts.headers.get(header::USER_AGENT) {
        Some(own) => append_user_agent(own, user_agent),
        None => user_agent.clone(),
    };
    parts.headers.insert(header::USER_AGENT, user_agent);
    let path = parts.uri.into_parts().path_and_query;
    let head = CallHead {
        method: parts.method,
        path: path.unwrap_or_else(|| PathAndQuery::from_static("/")),
        headers: parts.headers,
    };
    (head, body)
}

impl CallHead {
    /// The timeout that the request sets for itself.
    pub(super) fn timeout(&self) -> Option<Duration> {
        grpc_timeout::parse(&self.headers)
    }

    /// The head of an attempt at `target`. `origin` replaces the target's scheme and authority.
    ///
    /// `None` if no time is left until the deadline, because an attempt without time is not sent.
    pub(super) fn for_attempt(
        &mut self,
        target: &Target,
        origin: Option<&Uri>,
        deadline: Option<&Deadline>,
    ) -> Option<Request<()>> {
        if let Some(deadline) = deadline {
            // The server gets the time that is left, which is less than the request's own timeout
            // after a wait for an endpoint or an earlier attempt.
            let left = deadline.at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            if let Some(value) = grpc_timeout::format(left) {
                self.headers.insert(GRPC_TIMEOUT, value);
            }
        }
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = self.headers.clone();
        let (scheme, authority) = match origin {
            Some(origin) => (
                origin.scheme().unwrap_or(&Scheme::HTTP),
                origin.authority().unwrap_or(&target.authority),
            ),
            None => (&target.scheme, &target.authority),
        };
        *request.uri_mut() = uri(scheme, authority, &self.path);
        Some(request)
    }
}

/// Removes the headers that an HTTP/1 connection has and a gRPC request has not.
///
/// Gateways copy the headers of HTTP/1 requests into metadata (grpc#29216). Such a request is sent
/// without these headers, and not refused.
fn remove_http1_headers(headers: &mut HeaderMap) {
    let mut has_any = false;
    let mut is_te_valid = true;
    for (name, value) in &*headers {
        has_any |= is_http1_only(name);
        is_te_valid &= name != header::TE || value == TRAILERS;
    }
    if !is_te_valid {
        headers.insert(header::TE, TRAILERS);
    }
    if !has_any {
        return;
    }
    let names = headers.keys();
    let mut removed: Vec<_> = names.filter(|name| is_http1_only(name)).cloned().collect();
    for value in headers.get_all(header::CONNECTION) {
        let options = value.as_bytes().split(|byte| *byte == b',');
        let names = options.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok());
        removed.extend(names.filter(|name| !is_required(name)));
    }
    for name in removed {
        headers.remove(name);
    }
}

/// Whether a header belongs to a connection or a message of HTTP/1.
fn is_http1_only(name: &HeaderName) -> bool {
    match name.as_str() {
        // HTTP/2 forbids them (RFC 9113, section 8.2.2).
        "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" => true,
        // The length of another message than this one, which servers refuse as malformed.
        "content-length" => true,
        // gRPC servers discard it in favour of `:authority` (gRFC A41); proxies refuse it if the
        // two differ.
        "host" => true,
        _ => false,
    }
}

/// Whether gRPC needs a header, even if a `connection` header names it. HTTP/1 requires that name
/// for `te` (RFC 9110, section 10.1.4).
fn is_required(name: &HeaderName) -> bool {
    let name = name.as_str();
    name == "te" || name == "content-type" || name.starts_with("grpc-")
}

fn uri(scheme: &Scheme, authority: &Authority, path: &PathAndQuery) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(scheme.clone());
    parts.authority = Some(authority.clone());
    parts.path_and_query = Some(path.clone());
    // All three parts are present and valid, so the URI is valid as well.
    Uri::from_parts(parts).unwrap_or_default()
}

fn append_user_agent(own: &HeaderValue, user_agent: &HeaderValue) -> HeaderValue {
    let joined = [own.as_bytes(), b" ", user_agent.as_bytes()].concat();
    HeaderValue::from_bytes(&joined).unwrap_or_else(|_| own.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Instance;

    fn split(request: http::request::Builder) -> CallHead {
        let user_agent = HeaderValue::from_static("goo-etcd/1");
        split_request(request.body(Body::empty()).unwrap(), &user_agent).0
    }

    fn attempt(
        head: &mut CallHead,
        origin: Option<&Uri>,
        deadline: Option<&Deadline>,
    ) -> Request<()> {
        let target = Target::new(&Instance::new("", "10.0.0.1:80"), false).unwrap();
        head.for_attempt(&target, origin, deadline).unwrap()
    }

    #[test]
    fn user_agent_follows_the_request_s_own() {
        let own = split(Request::builder().header("user-agent", "mine/2"));
        assert_eq!(own.headers["user-agent"], "mine/2 goo-etcd/1");
        let none = split(Request::builder());
        assert_eq!(none.headers["user-agent"], "goo-etcd/1");
    }

    #[test]
    fn headers_of_http1_are_removed() {
        let head = split(
            Request::builder()
                .header(
                    "connection",
                    "keep-alive, X-Hop , te,grpc-timeout, b\u{e4}d name",
                )
                .header("connection", "x-hop-2")
                .header("keep-alive", "timeout=5")
                .header("content-length", "45")
                .header("host", "gateway.example.com")
                .header("x-hop", "1")
                .header("x-hop", "2")
                .header("x-hop-2", "3")
                .header("te", "trailers")
                .header("grpc-timeout", "1S")
                .header("x-id", "7"),
        );
        let mut names: Vec<&str> = head.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["grpc-timeout", "te", "user-agent", "x-id"]);
    }

    #[test]
    fn te_other_than_trailers_is_replaced() {
        let head = split(
            Request::builder()
                .header("te", "trailers")
                .header("te", "gzip"),
        );
        let values: Vec<_> = head.headers.get_all("te").iter().collect();
        assert_eq!(values, ["trailers"]);
    }

    #[test]
    fn uri_is_the_target_s_unless_an_origin_is_set() {
        let mut head = split(Request::builder().uri("/echo.Echo/Unary"));
        let request = attempt(&mut head, None, None);
        assert_eq!(request.uri(), "http://10.0.0.1:80/echo.Echo/Unary");
        let origin = Uri::from_static("https://api.example.com");
        let request = attempt(&mut head, Some(&origin), None);
        assert_eq!(request.uri(), "https://api.example.com/echo.Echo/Unary");
    }

    #[tokio::test(start_paused = true)]
    async fn attempt_carries_the_time_that_is_left() {
        let mut head = split(Request::builder().header("grpc-timeout", "2S"));
        let deadline = Deadline::after(Instant::now(), head.timeout().unwrap());
        tokio::time::advance(Duration::from_millis(500)).await;
        let request = attempt(&mut head, None, Some(&deadline));
        let timeout = grpc_timeout::parse(request.headers()).unwrap();
        assert_eq!(timeout, Duration::from_millis(1500));
    }

    #[tokio::test(start_paused = true)]
    async fn no_attempt_without_time() {
        let mut head = split(Request::builder());
        let target = Target::new(&Instance::new("", "10.0.0.1:80"), false).unwrap();
        let deadline = Deadline::after(Instant::now(), Duration::from_millis(500));
        tokio::time::advance(Duration::from_millis(500)).await;
        let request = head.for_attempt(&target, None, Some(&deadline));
        assert!(request.is_none(), "{request:?}");
    }
}
