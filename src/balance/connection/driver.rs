//! The task that drives a connection.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection as H2Connection, SendRequest};
use h2::{Ping, PingPong};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::io::BoxIo;
use super::monitor::Observed;
use super::sender::Sender;
use super::state::Shared;
use crate::error::chain;

/// For what has arrived already: no network takes part in it.
const READ_OUT: Duration = Duration::from_secs(1);

/// When a peer counts as lost: pinged after so long without a sign of it, and given so long to answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeepAlive {
    pub(crate) interval: Option<Duration>,
    pub(crate) timeout: Duration,
    pub(crate) while_idle: bool,
}

/// A connection that was just opened, and the task that drives it.
pub(crate) struct Opened {
    pub(crate) sender: Sender,
    /// Why its task has ended.
    pub(crate) closed: oneshot::Receiver<String>,
}

/// Starts the task that drives the connection. It ends with the connection: when the peer closes it, when
/// a ping goes unanswered, or when no sender and no call is left.
pub(crate) fn start(
    h2: SendRequest<Bytes>,
    connection: H2Connection<Observed<BoxIo>, Bytes>,
    shared: Arc<Shared>,
    keep_alive: KeepAlive,
    broken: oneshot::Receiver<String>,
) -> Opened {
    let (tell, closed) = oneshot::channel();
    let task = drive(connection, Arc::clone(&shared), keep_alive, broken);
    tokio::spawn(async move {
        let _ = tell.send(task.await);
    });
    let sender = Sender::new(h2, shared);
    Opened { sender, closed }
}

async fn drive(
    mut connection: H2Connection<Observed<BoxIo>, Bytes>,
    shared: Arc<Shared>,
    keep_alive: KeepAlive,
    broken: oneshot::Receiver<String>,
) -> String {
    let pings = connection.ping_pong();
    let result = tokio::select! {
        biased;
        result = std::future::poll_fn(|cx| poll_connection(&mut connection, &shared, cx)) => result,
        () = silence(pings, &shared, keep_alive) => {
            shared.ending.set(|| "no answer to keep-alive".to_owned());
            Ok(())
        }
        why = read_out(broken) => {
            shared.ending.set(|| why);
            Ok(())
        }
    };
    // Known before it is closed, so that nobody sees it closed and not why.
    if let Err(error) = result {
        shared.ending.set(|| chain(&error));
    }
    shared.shut();
    shared.how_it_ended()
}

/// Polls the connection, and keeps the account of its streams.
fn poll_connection(
    connection: &mut H2Connection<Observed<BoxIo>, Bytes>,
    shared: &Shared,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    shared.driver.register(cx.waker());
    let given_up = shared.given_up.swap(0, Ordering::SeqCst);
    let polled = Pin::new(&mut *connection).poll(cx);
    if given_up > 0 {
        // By now they have been reset.
        shared.leave(given_up);
    }
    shared.set_limit(connection.max_concurrent_send_streams());
    polled
}

/// Resolves a while after the connection could not be written to any more, with the reason. What the
/// peer had sent is read by then, and with it how the peer itself sees the end.
async fn read_out(broken: oneshot::Receiver<String>) -> String {
    let Ok(why) = broken.await else {
        return std::future::pending().await;
    };
    tokio::time::sleep(READ_OUT).await;
    why
}

/// Resolves when the peer has not been heard of for the keep-alive interval and has not answered a ping
/// within the time-out.
async fn silence(pings: Option<PingPong>, shared: &Shared, keep_alive: KeepAlive) {
    let (Some(mut pings), Some(interval)) = (pings, keep_alive.interval) else {
        return std::future::pending().await;
    };
    loop {
        let last = shared.last_heard();
        tokio::time::sleep_until(last + interval).await;
        if shared.last_heard() != last {
            continue;
        }
        let idle = shared.calls.load(Ordering::Relaxed) == 0;
        if idle && !keep_alive.while_idle {
            tokio::time::sleep(interval).await;
            continue;
        }
        let deadline = Instant::now() + keep_alive.timeout;
        // It fails while one is unanswered, whose answer will do.
        let _ = pings.send_ping(Ping::opaque());
        let answer = std::future::poll_fn(|cx| pings.poll_pong(cx));
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(_)) => {}
            // The connection has ended, and says so itself.
            Ok(Err(_)) => return std::future::pending().await,
            // Whatever was heard counts: a peer that sends is there.
            Err(_) if shared.last_heard() != last => {}
            Err(_) => return,
        }
    }
}
