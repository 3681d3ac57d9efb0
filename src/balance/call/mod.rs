//! One call: wait for an endpoint, pick one, send, and send again what reached none.

mod attempted;
mod grpc_timeout;
mod in_flight;
mod response_body;
mod retry;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::uri::{PathAndQuery, Scheme, Uri};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::body::Body;
use tonic::{Code, Status};

use super::connection::{Fate, Reserved, SendError};
use super::grpc_status::{self, is_failure, status_of_head};
use super::pool::{Endpoint, ReadyEndpoint, View};
use super::replay::Replay;
pub(crate) use attempted::Tried;
use grpc_timeout::GRPC_TIMEOUT;
use in_flight::InFlight;
use response_body::{AnsweredCall, ResponseBody};
pub use retry::RetryPolicy;

/// The wait after a call came back unsent for the third time and more: several connections closing at
/// once is usual, a server that refuses everything must not be asked in a tight loop.
const UNSENT_WAIT: Duration = Duration::from_millis(10);
const UNSENT_FREE: u32 = 3;

/// Headers of HTTP/1 that HTTP/2 does not allow (RFC 9113, section 8.2.2). A gateway that copies
/// what it got into metadata should not fail for them.
const CONNECTION_SPECIFIC: [&str; 5] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "upgrade",
];

/// How a channel makes its calls.
#[derive(Debug)]
pub(super) struct Calls {
    pub(super) view: Arc<View>,
    pub(super) ready_timeout: Duration,
    pub(super) wait_for_ready: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) retry: Option<RetryPolicy>,
    pub(super) concurrency: Option<Arc<Semaphore>>,
    pub(super) user_agent: HeaderValue,
    pub(super) origin: Option<Uri>,
}

/// The request's head, from which each attempt gets its own.
struct Head {
    method: Method,
    path: Option<PathAndQuery>,
    headers: HeaderMap,
    /// When the call's time is over, and how much it was.
    deadline: Option<(Instant, Duration)>,
    begun: Instant,
}

impl Head {
    /// The status of a call that its server has ended because its time was over.
    fn late(&self, status: &Status) -> Option<Status> {
        let (_, limit) = self
            .deadline
            .filter(|(at, _)| grpc_timeout::is_late(status, *at))?;
        Some(grpc_status::deadline_exceeded(limit, "without an answer"))
    }
}

impl Calls {
    /// Makes one call. Dropping the future gives it up: the server sees its stream reset.
    pub(super) async fn call(
        &self,
        request: Request<Body>,
        tried: Option<&Tried>,
    ) -> Result<Response<Body>, Status> {
        let begun = Instant::now();
        let (head, body) = self.prepare(request, begun);
        let seeks = AtomicBool::new(false);
        let Some((at, limit)) = head.deadline else {
            return self.attempts(head, body, tried, &seeks).await;
        };
        match timeout_at(at, self.attempts(head, body, tried, &seeks)).await {
            Ok(result) => result,
            Err(_) if seeks.load(Ordering::Relaxed) => Err(grpc_status::deadline_exceeded(
                limit,
                &self.view.describe_unavailable(),
            )),
            Err(_) => Err(grpc_status::deadline_exceeded(limit, "without an answer")),
        }
    }

    fn prepare(&self, request: Request<Body>, begun: Instant) -> (Head, Body) {
        let (mut parts, body) = request.into_parts();
        let own = grpc_timeout::of(&parts.headers);
        let limit = match (own, self.timeout) {
            (Some(own), Some(ours)) => Some(own.min(ours)),
            (own, ours) => own.or(ours),
        };
        let agent = match parts.headers.get(header::USER_AGENT) {
            Some(own) => joined(own, &self.user_agent),
            None => self.user_agent.clone(),
        };
        parts.headers.insert(header::USER_AGENT, agent);
        for name in CONNECTION_SPECIFIC {
            parts.headers.remove(name);
        }
        let head = Head {
            method: parts.method,
            path: parts.uri.into_parts().path_and_query,
            headers: parts.headers,
            deadline: limit.map(|limit| (begun + limit, limit)),
            begun,
        };
        (head, body)
    }

    async fn attempts(
        &self,
        mut head: Head,
        mut body: Body,
        tried: Option<&Tried>,
        seeks: &AtomicBool,
    ) -> Result<Response<Body>, Status> {
        let permit = self.permit(&head).await?;
        let replay = std::future::poll_fn(|cx| Replay::poll_new(&mut body, cx)).await?;
        let mut waits = None;
        let mut attempts = 0;
        let mut unsent = 0;
        let mut failed = None;
        // When the call began to look for a server; the time that servers had it until they refused it does not
        // count.
        let mut seeking = head.begun;
        let mut avoid: Option<Arc<Endpoint>> = None;
        loop {
            let acquired = self.acquire(seeking, avoid.as_ref(), tried, seeks);
            // Whichever time was over first, where both are.
            let (endpoint, stream) = acquired.await.map_err(|status| match head.deadline {
                Some((at, limit)) if at <= Instant::now() => {
                    grpc_status::deadline_exceeded(limit, status.message())
                }
                _ => status,
            })?;
            if let Some(tried) = tried {
                tried.add(&endpoint.target.address);
            }
            let Some(body) = replay.attempt() else {
                // More of it was sent in the meantime than is kept.
                return Err(failed.unwrap_or_else(|| Status::unavailable("too much was sent")));
            };
            let request = self.request(&mut head, &endpoint);
            let deadline = head.deadline.map(|(at, _)| at);
            let sent = Instant::now();
            let mut in_flight = InFlight::begin(endpoint, deadline, sent);
            let status = match stream.send(request, body).await {
                Ok(response) => {
                    let over = status_of_head(&response);
                    if let Some(late) = over.as_ref().and_then(|status| head.late(status)) {
                        in_flight.observe(true);
                        return Err(late);
                    }
                    in_flight.observe(over.as_ref().is_some_and(|s| is_failure(s.code())));
                    match over {
                        Some(status) if self.retries(status.code(), attempts + 1, &replay) => {
                            status
                        }
                        over => {
                            replay.release();
                            let call = AnsweredCall {
                                is_over: over.is_some(),
                                deadline: head.deadline,
                                in_flight,
                                permit,
                                own_failure: replay.own_failure(),
                            };
                            return Ok(response
                                .map(|incoming| Body::new(ResponseBody::new(incoming, call))));
                        }
                    }
                }
                Err(error) if error.fate == Fate::Rejected => {
                    // The request's own fault.
                    in_flight.says_nothing();
                    return Err(Status::internal(format!(
                        "the request cannot be sent: {}",
                        error.error
                    )));
                }
                Err(error) if error.fate == Fate::Unsent => {
                    let status = status_of_error(in_flight.endpoint(), &error);
                    avoid = Some(Arc::clone(in_flight.endpoint()));
                    in_flight.says_nothing();
                    unsent += 1;
                    seeking += sent.elapsed();
                    // The first is free, whatever the time-out.
                    let late = unsent > 1 && seeking.elapsed() > self.ready_timeout;
                    if late || !replay.is_repeatable() {
                        return Err(status);
                    }
                    failed = Some(status);
                    if unsent > UNSENT_FREE {
                        sleep(UNSENT_WAIT).await;
                    }
                    continue;
                }
                Err(error) => {
                    if let Some(own) = replay.own_failure().and_then(|own| own.get()) {
                        // The caller's to know, and no fault of the endpoint.
                        in_flight.says_nothing();
                        return Err(own);
                    }
                    let status = status_of_error(in_flight.endpoint(), &error);
                    in_flight.observe(true);
                    if let Some(late) = head.late(&status) {
                        return Err(late);
                    }
                    if !self.retries(status.code(), attempts + 1, &replay) {
                        return Err(status);
                    }
                    status
                }
            };
            attempts += 1;
            tracing::debug!(
                address = %in_flight.endpoint().target.address,
                code = ?status.code(),
                attempts,
                "sent again"
            );
            avoid = Some(Arc::clone(in_flight.endpoint()));
            drop(in_flight);
            unsent = 0;
            failed = Some(status);
            if let Some(policy) = &self.retry {
                let wait = waits.get_or_insert_with(|| policy.waits()).next();
                if head
                    .deadline
                    .is_some_and(|(at, _)| Instant::now() + wait >= at)
                {
                    // There is no time for another attempt.
                    return Err(failed.unwrap_or_else(|| Status::unavailable("no time left")));
                }
                sleep(wait).await;
            }
            seeking = Instant::now();
        }
    }

    fn retries(&self, code: Code, attempts: u32, replay: &Replay) -> bool {
        self.retry
            .as_ref()
            .is_some_and(|policy| policy.allows(code, attempts))
            && replay.is_repeatable()
    }

    async fn permit(&self, head: &Head) -> Result<Option<OwnedSemaphorePermit>, Status> {
        let Some(semaphore) = &self.concurrency else {
            return Ok(None);
        };
        let at = head.begun + self.ready_timeout;
        match timeout_at(at, Arc::clone(semaphore).acquire_owned()).await {
            Ok(permit) => Ok(permit.ok()),
            Err(_) => Err(Status::unavailable(format!(
                "the channel's concurrency limit was reached for {:?}",
                self.ready_timeout
            ))),
        }
    }

    /// An endpoint that is ready and a stream to it, waiting for one if need be. `seeks` says whether it
    /// waits.
    async fn acquire(
        &self,
        since: Instant,
        avoid: Option<&Arc<Endpoint>>,
        tried: Option<&Tried>,
        seeks: &AtomicBool,
    ) -> Result<(Arc<Endpoint>, Reserved), Status> {
        let unavailable =
            |how: &str| Status::unavailable(format!("{}{how}", self.view.describe_unavailable()));
        if let Some(picked) = self.pick(avoid, tried) {
            return Ok(picked);
        }
        let at = since + self.ready_timeout;
        seeks.store(true, Ordering::Relaxed);
        loop {
            let (ready, freed) = (self.view.ready.notified(), self.view.freed.notified());
            tokio::pin!(ready, freed);
            // Registered before looking, so that nothing is missed in between.
            ready.as_mut().enable();
            freed.as_mut().enable();
            if let Some(picked) = self.pick(avoid, tried) {
                seeks.store(false, Ordering::Relaxed);
                // There may be room for the next as well.
                self.view.freed.notify_one();
                return Ok(picked);
            }
            // One that has no room is ready.
            if !self.wait_for_ready && !self.view.is_full() {
                return Err(unavailable(""));
            }
            let changed = async {
                tokio::select! {
                    () = ready => {}
                    () = freed => {}
                }
            };
            if timeout_at(at, changed).await.is_err() {
                let waited = format!(" (waited {:?})", self.ready_timeout);
                return Err(unavailable(&waited));
            }
        }
    }

    fn pick(
        &self,
        avoid: Option<&Arc<Endpoint>>,
        tried: Option<&Tried>,
    ) -> Option<(Arc<Endpoint>, Reserved)> {
        let picker = self.view.picker.load();
        let avoided = |ready: &ReadyEndpoint| {
            avoid.is_some_and(|avoid| Arc::ptr_eq(avoid, &ready.endpoint))
                || tried.is_some_and(|tried| tried.contains(&ready.endpoint.target.address))
        };
        loop {
            let ready = picker.pick(Instant::now(), avoided)?;
            // Otherwise another call has taken the last stream in between, or the connection has closed.
            if let Some(stream) = ready.reserve() {
                return Some((Arc::clone(&ready.endpoint), stream));
            }
        }
    }

    fn request(&self, head: &mut Head, endpoint: &Endpoint) -> Request<()> {
        if let Some((at, _)) = head.deadline {
            // The server is told what is left, not what there was before the wait for an endpoint.
            let left = at.saturating_duration_since(Instant::now());
            if let Some(value) = grpc_timeout::value_of(left) {
                head.headers.insert(GRPC_TIMEOUT, value);
            }
        }
        let mut request = Request::new(());
        *request.method_mut() = head.method.clone();
        *request.version_mut() = Version::HTTP_2;
        *request.headers_mut() = head.headers.clone();
        *request.uri_mut() = self.uri(head, endpoint);
        request
    }

    fn uri(&self, head: &Head, endpoint: &Endpoint) -> Uri {
        let target = &endpoint.target;
        let (scheme, authority) = match &self.origin {
            Some(origin) => (
                origin.scheme().unwrap_or(&Scheme::HTTP),
                origin.authority().unwrap_or(&target.authority),
            ),
            None => (&target.scheme, &target.authority),
        };
        let mut parts = http::uri::Parts::default();
        parts.scheme = Some(scheme.clone());
        parts.authority = Some(authority.clone());
        let path = head.path.clone();
        parts.path_and_query = Some(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
        // All three parts are there and valid by themselves, which makes a valid URI.
        Uri::from_parts(parts).unwrap_or_default()
    }
}

fn joined(own: &HeaderValue, ours: &HeaderValue) -> HeaderValue {
    let joined = [own.as_bytes(), b" ", ours.as_bytes()].concat();
    HeaderValue::from_bytes(&joined).unwrap_or_else(|_| own.clone())
}

fn status_of_error(endpoint: &Endpoint, error: &SendError) -> Status {
    let address = &endpoint.target.address;
    grpc_status::status_of_error(address, &error.error, error.ending.as_deref())
}
