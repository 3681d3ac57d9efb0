//! The head of a call's request, and of each attempt's.

use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version, header};
use tokio::time::Instant;
use tonic::body::Body;

use super::grpc_timeout::{self, Deadline, GRPC_TIMEOUT};
use crate::balance::connection::Target;

/// Headers of HTTP/1 that HTTP/2 forbids (RFC 9113, section 8.2.2). A request that has such headers
/// is sent without them, and not refused, because gateways copy the headers of HTTP/1 requests into
/// metadata.
const CONNECTION_SPECIFIC: [HeaderName; 5] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

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
    let user_agent = match parts.headers.get(header::USER_AGENT) {
        Some(own) => append_user_agent(own, user_agent),
        None => user_agent.clone(),
    };
    parts.headers.insert(header::USER_AGENT, user_agent);
    for name in &CONNECTION_SPECIFIC {
        parts.headers.remove(name);
    }
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
    pub(super) fn for_attempt(
        &mut self,
        target: &Target,
        origin: Option<&Uri>,
        deadline: Option<&Deadline>,
    ) -> Request<()> {
        if let Some(deadline) = deadline {
            // The server gets the time that is left, which is less than the request's own timeout
            // after a wait for an endpoint or an earlier attempt.
            let left = deadline.at.saturating_duration_since(Instant::now());
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
        request
    }
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
        head.for_attempt(&target, origin, deadline)
    }

    #[test]
    fn user_agent_follows_the_request_s_own() {
        let own = split(Request::builder().header("user-agent", "mine/2"));
        assert_eq!(own.headers["user-agent"], "mine/2 goo-etcd/1");
        let none = split(Request::builder());
        assert_eq!(none.headers["user-agent"], "goo-etcd/1");
    }

    #[test]
    fn connection_specific_headers_are_removed() {
        let head = split(
            Request::builder()
                .header("connection", "keep-alive")
                .header("keep-alive", "timeout=5")
                .header("x-id", "7"),
        );
        assert!(!head.headers.contains_key("connection"));
        assert!(!head.headers.contains_key("keep-alive"));
        assert_eq!(head.headers["x-id"], "7");
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
}
