//! The task that drives a connection.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::Connection;
use tokio::sync::oneshot;

use super::first_response::PauseTimer;
use super::io::BoxIo;
use super::keep_alive::{KeepAlive, KeepAliveSettings};
use super::monitor::MonitoredIo;
use super::state::ConnectionState;
use crate::error::chain;

/// How long to keep reading after a write error. Only bytes that have already arrived are read, so
/// no network round trip has to fit in.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a connection closes whose task is dropped.
const RUNTIME_ENDED: &str = "the Tokio runtime of the channel has ended";

/// Spawns the task that drives a connection. The receiver gets the reason when the task ends: the
/// peer closed the connection, a ping timed out, or no sender and no call is left.
pub(crate) fn spawn(
    connection: Connection<MonitoredIo<BoxIo>, Bytes>,
    state: Arc<ConnectionState>,
    keep_alive: KeepAliveSettings,
    write_failed: oneshot::Receiver<String>,
) -> oneshot::Receiver<String> {
    let (closed_tx, closed) = oneshot::channel();
    tokio::spawn(async move {
        let reason = drive(connection, &state, keep_alive, write_failed).await;
        let _ = closed_tx.send(reason);
    });
    closed
}

async fn drive(
    mut connection: Connection<MonitoredIo<BoxIo>, Bytes>,
    state: &ConnectionState,
    settings: KeepAliveSettings,
    write_failed: oneshot::Receiver<String>,
) -> String {
    // Dropped before the connection, so that no call sees the connection end without a reason.
    let mut closing = CloseOnDrop(Some(state));
    let mut keep_alive = KeepAlive::new(connection.ping_pong(), state, settings);
    let mut pause = PauseTimer::default();
    let mut poll = |cx: &mut Context<'_>| {
        let polled = poll_connection(&mut connection, state, cx);
        pause.poll(&state.first_response, cx);
        polled
    };
    let result = tokio::select! {
        biased;
        result = std::future::poll_fn(&mut poll) => result,
        () = std::future::poll_fn(|cx| poll_keep_alive(&mut keep_alive, cx)) => {
            state.close_reason.set(|| "keep-alive ping timed out".to_owned());
            Ok(())
        }
        error = drain_reads(write_failed) => {
            state.close_reason.set(|| error);
            Ok(())
        }
    };
    // The reason is set before the connection stops accepting calls, so that it is known to every
    // call that finds the connection closed.
    if let Err(error) = result {
        state.close_reason.set(|| chain(&error));
    }
    state.stop_accepting();
    closing.0 = None;
    state.describe_close()
}

/// Closes the state of a connection whose task is dropped, which happens only when its runtime
/// ends.
struct CloseOnDrop<'a>(Option<&'a ConnectionState>);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(state) = self.0 {
            state.close_reason.set(|| RUNTIME_ENDED.to_owned());
            state.stop_accepting();
        }
    }
}

/// Polls the connection and updates the count of its streams.
fn poll_connection(
    connection: &mut Connection<MonitoredIo<BoxIo>, Bytes>,
    state: &ConnectionState,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    state.register_driver(cx.waker());
    let cancelled = state.take_cancelled();
    let polled = Pin::new(&mut *connection).poll(cx);
    if cancelled > 0 {
        // The poll above has reset them.
        state.release_streams(cancelled);
    }
    if !state.liveness.is_suspect() {
        state.set_stream_limit(connection.max_concurrent_send_streams());
    }
    polled
}

fn poll_keep_alive(keep_alive: &mut Option<KeepAlive<'_>>, cx: &mut Context<'_>) -> Poll<()> {
    keep_alive
        .as_mut()
        .map_or(Poll::Pending, |keep_alive| keep_alive.poll(cx))
}

/// Resolves [`DRAIN_TIMEOUT`] after a write failed, with the write's error. By then the bytes that
/// the peer had sent are read, and with them the peer's own reason for closing, if it gave one.
async fn drain_reads(write_failed: oneshot::Receiver<String>) -> String {
    let Ok(error) = write_failed.await else {
        return std::future::pending().await;
    };
    tokio::time::sleep(DRAIN_TIMEOUT).await;
    error
}
