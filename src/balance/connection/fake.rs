//! A scripted connector for unit tests, without network.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::DuplexStream;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::carried::Carried;
use super::connect::{Connect, Connection, Ended};
use super::sender::Sender;
use super::state::ConnectionState;
use super::target::Target;

/// The result of connecting to an address.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Script {
    Accept,
    /// Fails after a time.
    Refuse {
        after: Duration,
    },
    /// Fails when the connect timeout is over.
    Hang,
    Panic,
}

/// Accepts connections unless scripted otherwise, and records the attempts.
///
/// The connections are real to their callers: a stream can be reserved and a call sent. No call
/// gets a response.
#[derive(Default)]
pub(crate) struct FakeConnector {
    endpoints: Mutex<HashMap<String, FakeEndpoint>>,
}

#[derive(Default)]
struct FakeEndpoint {
    script: Option<Script>,
    attempts: Vec<Instant>,
    connections: Vec<FakeConnection>,
}

struct FakeConnection {
    state: Weak<ConnectionState>,
    close: Option<oneshot::Sender<String>>,
    /// Keeps h2's handles valid.
    _h2: h2::client::Connection<DuplexStream, Bytes>,
    _peer: DuplexStream,
}

/// The streams that each fake connection allows.
pub(crate) const STREAM_LIMIT: usize = 100;

impl FakeConnector {
    pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

    pub(crate) fn script(&self, address: &str, script: Script) {
        self.with(address, |endpoint| endpoint.script = Some(script));
    }

    /// When the attempts to connect to an address began.
    pub(crate) fn attempts(&self, address: &str) -> Vec<Instant> {
        self.with(address, |endpoint| endpoint.attempts.clone())
    }

    /// How many connections to an address are held by a sender or a call.
    pub(crate) fn open_connections(&self, address: &str) -> usize {
        self.with(address, |endpoint| {
            let open = |connection: &&FakeConnection| connection.state.strong_count() > 0;
            endpoint.connections.iter().filter(open).count()
        })
    }

    /// Breaks all connections to an address.
    pub(crate) fn disconnect(&self, address: &str, reason: &str) {
        self.with(address, |endpoint| {
            for connection in &mut endpoint.connections {
                if let Some(state) = connection.state.upgrade() {
                    state.close_reason.set(|| reason.to_owned());
                    state.stop_accepting();
                }
                if let Some(close) = connection.close.take() {
                    let _ = close.send(format!("connection lost: {reason}"));
                }
            }
        });
    }

    /// Records a request on all connections to an address.
    pub(crate) fn send_request(&self, address: &str) {
        self.for_each_state(address, |state| state.record_written(1));
    }

    /// Records a response on all connections to an address.
    pub(crate) fn respond(&self, address: &str) {
        self.for_each_state(address, ConnectionState::record_served);
    }

    /// Changes the limit on streams of all connections to an address.
    pub(crate) fn set_stream_limit(&self, address: &str, limit: usize) {
        self.for_each_state(address, |state| state.set_stream_limit(limit));
    }

    fn for_each_state(&self, address: &str, f: impl Fn(&ConnectionState)) {
        self.with(address, |endpoint| {
            let states = endpoint.connections.iter().map(|c| &c.state);
            states.filter_map(Weak::upgrade).for_each(|state| f(&state));
        });
    }

    fn with<T>(&self, address: &str, f: impl FnOnce(&mut FakeEndpoint) -> T) -> T {
        f(self.endpoints.lock().entry(address.to_owned()).or_default())
    }
}

/// Frees the streams of cancelled calls, as the driver of a connection does.
async fn release_cancelled(state: Weak<ConnectionState>) -> Infallible {
    std::future::poll_fn(|cx| {
        if let Some(state) = state.upgrade() {
            state.register_driver(cx.waker());
            let cancelled = state.take_cancelled();
            if cancelled > 0 {
                state.release_streams(cancelled);
            }
        }
        Poll::Pending
    })
    .await
}

impl Connect for FakeConnector {
    fn is_tls(&self) -> bool {
        false
    }

    fn connect_timeout(&self) -> Duration {
        Self::CONNECT_TIMEOUT
    }

    async fn connect(&self, target: &Target) -> Result<Connection, String> {
        let script = self.with(&target.address, |endpoint| {
            endpoint.attempts.push(Instant::now());
            endpoint.script.unwrap_or(Script::Accept)
        });
        match script {
            Script::Accept => {}
            Script::Refuse { after } => {
                tokio::time::sleep(after).await;
                return Err("connection refused".to_owned());
            }
            Script::Panic => panic!("no route to {}", target.address),
            Script::Hang => {
                tokio::time::sleep(Self::CONNECT_TIMEOUT).await;
                return Err("connecting took more than 5s".to_owned());
            }
        }
        let (io, peer) = tokio::io::duplex(64 * 1024);
        let handshake = h2::client::handshake(io).await;
        let (h2, connection) = handshake.map_err(|error| error.to_string())?;
        let state = ConnectionState::new();
        state.set_stream_limit(STREAM_LIMIT);
        let driven = Arc::downgrade(&state);
        let (close, closed) = oneshot::channel();
        let fake = FakeConnection {
            state: Arc::downgrade(&state),
            close: Some(close),
            _h2: connection,
            _peer: peer,
        };
        self.with(&target.address, |endpoint| endpoint.connections.push(fake));
        let carried = Carried::of(&state);
        Ok(Connection {
            sender: Sender::new(h2, state),
            ended: Box::pin(async move {
                let reason = tokio::select! {
                    reason = closed => reason.unwrap_or_default(),
                    never = release_cancelled(driven) => match never {},
                };
                Ended { reason, carried }
            }),
        })
    }
}
