//! Calls that wait for an endpoint, over a pool with a scripted connector, in paused time.

mod fairness;

use std::sync::Arc;
use std::time::Duration;

use futures::channel::mpsc;
use futures::stream;
use http::{HeaderValue, Request, Response};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep};
use tonic::body::Body;
use tonic::{Code, Status};

use super::call::{CallContext, Dispatcher};
use super::connection::{FakeConnector, STREAM_LIMIT, Script};
use super::pick::BalancePolicy;
use super::pool::{ConnectPlan, DEFAULT_WINDOW, EndpointState, MassDeletionGuard, Pool, View};
use super::source::Source;
use crate::instance::Instance;

const SECOND: Duration = Duration::from_secs(1);
const READY_TIMEOUT: Duration = Duration::from_secs(5);
const REFUSE: Script = Script::Refuse {
    after: Duration::ZERO,
};

/// A channel to `a:1` without network. Its calls get no response.
struct Channel {
    connector: Arc<FakeConnector>,
    dispatcher: Arc<Dispatcher>,
    /// Aborted on drop.
    _pool: JoinSet<()>,
}

impl Channel {
    /// Also lets the pool make its first attempt to connect.
    async fn new(script: Script, wait_for_ready: bool) -> Self {
        let source = Source::fixed([Instance::new("echo", "a:1")]);
        Self::with_source(source, script, wait_for_ready).await
    }

    async fn with_source(source: Source, script: Script, wait_for_ready: bool) -> Self {
        let connector = Arc::new(FakeConnector::default());
        connector.script("a:1", script);
        let view = Arc::new(View::new("services/echo/".into()));
        let pool = Pool::new(
            Arc::clone(&view),
            Arc::clone(&connector),
            ConnectPlan::default(),
            BalancePolicy::default(),
            MassDeletionGuard::new(Duration::ZERO, DEFAULT_WINDOW),
        );
        let mut task = JoinSet::new();
        task.spawn(pool.run(source));
        sleep(Duration::from_millis(1)).await;
        let dispatcher = Arc::new(Dispatcher {
            view,
            ready_timeout: READY_TIMEOUT,
            wait_for_ready,
            timeout: None,
            retry: None,
            concurrency: None,
            user_agent: HeaderValue::from_static("test"),
            origin: None,
        });
        Self {
            connector,
            dispatcher,
            _pool: task,
        }
    }

    /// Starts a call, with a `grpc-timeout` if one is given.
    fn call(&self, timeout: Option<&'static str>) -> JoinHandle<Result<Response<Body>, Status>> {
        let mut request = Request::new(Body::empty());
        if let Some(timeout) = timeout {
            let value = HeaderValue::from_static(timeout);
            request.headers_mut().insert("grpc-timeout", value);
        }
        let dispatcher = Arc::clone(&self.dispatcher);
        tokio::spawn(async move { dispatcher.call(request, CallContext::default()).await })
    }

    /// The status that a call ends with, and how long the call took.
    async fn status_of_call(&self, timeout: Option<&'static str>) -> (Status, Duration) {
        let started = Instant::now();
        let status = self.call(timeout).await.unwrap().unwrap_err();
        (status, started.elapsed())
    }

    fn in_flight(&self) -> usize {
        self.dispatcher.view.endpoints()[0].in_flight
    }
}

mod ready_timeout {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn call_fails_with_the_error_of_each_endpoint() {
        let channel = Channel::new(REFUSE, true).await;
        let (status, waited) = channel.status_of_call(None).await;
        assert_eq!(status.code(), Code::Unavailable);
        let message = status.message();
        assert!(
            message.contains("a:1 (backing off: connection refused)"),
            "{message}"
        );
        assert!(message.ends_with("(waited 5s)"), "{message}");
        let expected = READY_TIMEOUT..READY_TIMEOUT + SECOND / 10;
        assert!(expected.contains(&waited), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn call_is_sent_once_an_endpoint_is_ready() {
        let channel = Channel::new(REFUSE, true).await;
        let call = channel.call(None);
        sleep(SECOND / 10).await;
        assert_eq!(channel.in_flight(), 0);
        channel.connector.script("a:1", Script::Accept);
        // The next attempt to connect is made about a second after the first.
        sleep(2 * SECOND).await;
        assert_eq!(channel.in_flight(), 1);
        // The ready timeout does not limit the wait for a response.
        sleep(2 * READY_TIMEOUT).await;
        assert!(!call.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn earlier_deadline_ends_the_wait() {
        let channel = Channel::new(REFUSE, true).await;
        let (status, waited) = channel.status_of_call(Some("1S")).await;
        assert_eq!(status.code(), Code::DeadlineExceeded);
        let message = status.message();
        assert!(
            message.contains("a:1 (backing off: connection refused)"),
            "{message}"
        );
        assert!((SECOND..SECOND * 11 / 10).contains(&waited), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn call_that_does_not_wait_fails_at_once() {
        let channel = Channel::new(REFUSE, false).await;
        let (status, waited) = channel.status_of_call(None).await;
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(waited, Duration::ZERO);
    }
}

/// Calls that do not wait for endpoints that fail.
mod fail_fast {
    use super::*;

    const SLOW: Script = Script::Refuse { after: SECOND };

    #[tokio::test(start_paused = true)]
    async fn calls_wait_for_the_first_attempt() {
        let channel = Channel::new(SLOW, false).await;
        let calls = [channel.call(None), channel.call(None)];
        sleep(SECOND * 9 / 10).await;
        assert!(calls.iter().all(|call| !call.is_finished()));
        sleep(SECOND / 2).await;
        assert!(calls.iter().all(JoinHandle::is_finished));
        for call in calls {
            let status = call.await.unwrap().unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            let message = status.message();
            assert!(message.contains("connection refused"), "{message}");
            assert!(!message.contains("waited"), "{message}");
        }
        // The second attempt runs. As long as no attempt succeeds, calls fail at once.
        let (status, waited) = channel.status_of_call(None).await;
        let expected = "is ready: a:1 (connecting: connection refused)";
        assert!(status.message().ends_with(expected), "{status:?}");
        assert_eq!(waited, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn call_waits_while_a_lost_connection_is_replaced() {
        let channel = Channel::new(Script::Accept, false).await;
        sleep(2 * SECOND).await;
        channel.connector.script("a:1", SLOW);
        channel.connector.disconnect("a:1", "reset");
        let calls = [channel.call(None), channel.call(None)];
        sleep(SECOND / 2).await;
        assert!(calls.iter().all(|call| !call.is_finished()));
        sleep(SECOND).await;
        for call in calls {
            let status = call.await.unwrap().unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn call_gets_an_attempt_where_connections_ended_unused() {
        let channel = Channel::new(Script::Accept, false).await;
        for _ in 0..3 {
            channel.connector.disconnect("a:1", "idle");
            sleep(Duration::from_millis(1)).await;
        }
        let state = channel.dispatcher.view.endpoints()[0].state;
        assert_eq!(state, EndpointState::Backoff);
        let call = channel.call(None);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(channel.in_flight(), 1);
        assert!(!call.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn call_waits_for_the_set() {
        let (sets, received) = mpsc::unbounded::<Vec<Instance>>();
        let source = Source::new("services/echo/", received);
        let channel = Channel::with_source(source, SLOW, false).await;
        let call = channel.call(None);
        sleep(SECOND).await;
        assert!(!call.is_finished());
        sets.unbounded_send(vec![]).unwrap();
        sleep(SECOND / 100).await;
        assert!(call.is_finished());
        let status = call.await.unwrap().unwrap_err();
        assert_eq!(status.message(), "no instances under services/echo/");
    }

    #[tokio::test(start_paused = true)]
    async fn call_does_not_wait_for_the_set_of_a_source_that_panicked() {
        let sets = stream::once(async {
            sleep(SECOND).await;
            panic!("bad file")
        });
        let source = Source::new("services/echo/", sets);
        let channel = Channel::with_source(source, SLOW, false).await;
        let (status, waited) = channel.status_of_call(None).await;
        assert_eq!(status.code(), Code::Unavailable);
        let message = status.message();
        assert!(
            message.contains("the source panicked: bad file"),
            "{message}"
        );
        assert!(waited <= SECOND, "{waited:?}");
    }
}

mod stream_limit {
    use super::*;

    /// A channel whose only endpoint allows one stream, which a call uses.
    async fn full(wait_for_ready: bool) -> Channel {
        let channel = Channel::new(Script::Accept, wait_for_ready).await;
        channel.connector.set_stream_limit("a:1", 1);
        drop(channel.call(None));
        sleep(SECOND / 10).await;
        assert_eq!(channel.in_flight(), 1);
        channel
    }

    #[tokio::test(start_paused = true)]
    async fn call_beyond_the_limit_waits_for_a_stream() {
        for wait_for_ready in [true, false] {
            let channel = full(wait_for_ready).await;
            let calls = [channel.call(None), channel.call(None)];
            sleep(SECOND).await;
            assert_eq!(channel.in_flight(), 1);
            // One notification of capacity is enough for both calls.
            channel.connector.set_stream_limit("a:1", 3);
            sleep(SECOND / 10).await;
            assert_eq!(channel.in_flight(), 3);
            assert!(calls.iter().all(|call| !call.is_finished()));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn wait_for_a_stream_ends_with_the_ready_timeout() {
        for wait_for_ready in [true, false] {
            let channel = full(wait_for_ready).await;
            let (status, waited) = channel.status_of_call(None).await;
            assert_eq!(status.code(), Code::Unavailable);
            let message = status.message();
            let limit = "a:1 (ready, its limit of 1 streams is reached)";
            assert!(message.contains(limit), "{message}");
            let expected = READY_TIMEOUT..READY_TIMEOUT + SECOND / 10;
            assert!(expected.contains(&waited), "{waited:?}");
        }
    }
}

mod lost_connection {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn call_waits_for_the_next_connection() {
        let channel = Channel::new(Script::Accept, true).await;
        sleep(SECOND).await;
        channel
            .connector
            .script("a:1", Script::Refuse { after: SECOND });
        channel.connector.disconnect("a:1", "reset");
        let call = channel.call(None);
        sleep(SECOND / 2).await;
        assert_eq!(channel.in_flight(), 0);
        channel.connector.script("a:1", Script::Accept);
        sleep(2 * SECOND).await;
        assert_eq!(channel.in_flight(), 1);
        assert!(!call.is_finished());
    }
}
