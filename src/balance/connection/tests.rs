//! Connections over an in-memory pipe, in paused time.

use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::io::BoxIo;
use super::keep_alive::KeepAliveSettings;
use super::ping_budget::PingPolicy;
use super::*;
use crate::balance::replay::AttemptBody;
use crate::instance::Instance;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

const NOT_SENT: SendErrorKind = SendErrorKind::Unprocessed(Unprocessed::NotSent);

const KEEP_ALIVE: KeepAliveSettings = KeepAliveSettings {
    interval: Some(Duration::from_secs(10)),
    timeout: Duration::from_secs(3),
    while_idle: true,
    policy: PingPolicy::DEFAULT,
};

/// A connector whose connections are pipes, and the servers' ends of them.
fn pipes(keep_alive: KeepAliveSettings) -> (Connector, mpsc::UnboundedReceiver<DuplexStream>) {
    let (accept, accepted) = mpsc::unbounded_channel();
    let open: CustomConnector = Arc::new(move |_| {
        let (client, server) = tokio::io::duplex(64 * 1024);
        let _ = accept.send(server);
        Box::pin(async move { Ok(Box::new(client) as BoxIo) })
    });
    let settings = ConnectionSettings {
        keep_alive,
        ..ConnectionSettings::default()
    };
    (Connector::new(settings, None, Some(open)), accepted)
}

fn target() -> Target {
    Target::new(&Instance::new("a", "a:1"), false).unwrap()
}

/// Changes the behaviour of a [`Server`].
enum Command {
    /// Stops reading and writing, but keeps the pipe open.
    Freeze,
    /// Sends GOAWAY.
    ShutDown,
}

/// An HTTP/2 server that sends an empty response to each call. Dropping it closes the pipe.
struct Server {
    commands: mpsc::UnboundedSender<Command>,
    /// Aborted on drop.
    _task: tokio::task::JoinSet<()>,
}

impl Server {
    fn new(io: DuplexStream, max_concurrent_streams: u32) -> Self {
        let (commands, received) = mpsc::unbounded_channel();
        let mut task = tokio::task::JoinSet::new();
        task.spawn(serve(io, max_concurrent_streams, received));
        Self {
            commands,
            _task: task,
        }
    }

    fn send(&self, command: Command) {
        self.commands.send(command).ok().unwrap();
    }
}

async fn serve(
    io: DuplexStream,
    max_concurrent_streams: u32,
    mut commands: mpsc::UnboundedReceiver<Command>,
) {
    let mut h2 = h2::server::Builder::new();
    h2.max_concurrent_streams(max_concurrent_streams);
    let mut connection: h2::server::Connection<_, bytes::Bytes> = h2.handshake(io).await.unwrap();
    loop {
        tokio::select! {
            biased;
            Some(command) = commands.recv() => match command {
                Command::Freeze => std::future::pending().await,
                Command::ShutDown => connection.graceful_shutdown(),
            },
            call = connection.accept() => match call {
                Some(Ok((_, mut respond))) => {
                    respond.send_response(Response::new(()), true).unwrap();
                }
                _ => return,
            },
        }
    }
}

/// A connection and its server.
async fn connect(keep_alive: KeepAliveSettings) -> (Connection, Server) {
    let (connector, mut accepted) = pipes(keep_alive);
    let serving = async { Server::new(accepted.recv().await.unwrap(), 1) };
    let target = target();
    let (connection, server) = tokio::join!(connector.connect(&target), serving);
    (connection.ok().unwrap(), server)
}

/// Starts a call; the stream is in use until the result is dropped.
async fn call(sender: &Sender) -> Result<Response<Incoming>, SendError> {
    let stream = sender.reserve().expect("a free stream");
    let request = Request::builder().uri("http://a/").body(()).unwrap();
    stream.send(request, AttemptBody::Whole(None)).await
}

mod keep_alive {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn frozen_peer_is_lost_after_interval_and_timeout() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        server.send(Command::Freeze);
        let frozen_at = Instant::now();
        let reason = connection.ended.await.reason;
        assert_eq!(reason, "connection lost: keep-alive ping timed out");
        let waited = frozen_at.elapsed();
        assert!((13 * SECOND..14 * SECOND).contains(&waited), "{waited:?}");
        assert!(!connection.sender.is_open());
    }

    #[tokio::test(start_paused = true)]
    async fn responding_peer_is_kept() {
        let (connection, _server) = connect(KEEP_ALIVE).await;
        let sender = &connection.sender;
        timeout(HOUR, connection.ended).await.unwrap_err();
        assert!(sender.is_open());
        assert!(call(sender).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_gets_no_pings_unless_configured() {
        let keep_alive = KeepAliveSettings {
            while_idle: false,
            ..KEEP_ALIVE
        };
        let (mut connection, server) = connect(keep_alive).await;
        server.send(Command::Freeze);
        timeout(HOUR, &mut connection.ended).await.unwrap_err();
        // The call is not sent before the ping has a response, and does not wait for a late one.
        let called_at = Instant::now();
        let error = call(&connection.sender).await.err().unwrap();
        assert_eq!(called_at.elapsed(), 3 * SECOND / 8);
        assert_eq!(error.kind, NOT_SENT);
        assert!(connection.sender.reserve().is_none());
        let reason = connection.ended.await.reason;
        assert_eq!(reason, "connection lost: keep-alive ping timed out");
    }

    #[tokio::test(start_paused = true)]
    async fn close_ends_the_wait_for_a_ping() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        timeout(HOUR, connection.ended).await.unwrap_err();
        server.send(Command::Freeze);
        let closing = async {
            tokio::time::sleep(SECOND / 4).await;
            drop(server);
        };
        let (call, ()) = tokio::join!(call(&connection.sender), closing);
        let error = call.err().unwrap();
        assert_eq!(error.kind, NOT_SENT);
        assert_eq!(error.close_reason.as_deref(), Some("closed by the peer"));
    }

    #[tokio::test(start_paused = true)]
    async fn disabled_keep_alive_waits_forever() {
        let keep_alive = KeepAliveSettings {
            interval: None,
            ..KEEP_ALIVE
        };
        let (connection, server) = connect(keep_alive).await;
        server.send(Command::Freeze);
        timeout(HOUR, connection.ended).await.unwrap_err();
    }
}

mod connecting {
    use super::*;

    /// The error of connecting through a connector, and how long it took.
    async fn error_of(connector: Connector) -> (String, Duration) {
        let started = Instant::now();
        let error = connector.connect(&target()).await.err().unwrap();
        (error, started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn timeout_names_the_step_that_hangs() {
        let open: CustomConnector = Arc::new(|_| Box::pin(std::future::pending()));
        let hung = Connector::new(ConnectionSettings::default(), None, Some(open));
        let (error, waited) = error_of(hung).await;
        assert_eq!(error, "connecting took more than 5s");
        assert!((5 * SECOND..6 * SECOND).contains(&waited), "{waited:?}");

        // The peer accepts and says nothing.
        let (silent, _accepted) = pipes(KEEP_ALIVE);
        let (error, waited) = error_of(silent).await;
        assert_eq!(error, "the HTTP/2 handshake took more than 5s");
        assert!((5 * SECOND..6 * SECOND).contains(&waited), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn closed_pipe_is_no_http2_server() {
        let (closing, accepted) = pipes(KEEP_ALIVE);
        drop(accepted);
        let (error, waited) = error_of(closing).await;
        let expected = "the peer did not answer as an HTTP/2 server";
        assert!(error.starts_with(expected), "{error}");
        assert_eq!(waited, Duration::ZERO);
    }
}

mod ending {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn goaway_is_noticed_without_a_call() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        server.send(Command::ShutDown);
        let reason = connection.ended.await.reason;
        assert_eq!(reason, "GOAWAY NO_ERROR");
        assert!(connection.sender.reserve().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn closed_connection_says_who_closed_it() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        drop(server);
        let reason = connection.ended.await.reason;
        assert_eq!(reason, "connection lost: closed by the peer");
        let close_reason = connection.sender.close_reason();
        assert_eq!(close_reason, Some(reason));
    }
}

mod streams {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn cancelled_call_frees_its_stream() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        let sender = &connection.sender;
        let capacity = Arc::<Capacity>::default();
        capacity.set_waiting(1);
        sender.set_capacity(&capacity);
        server.send(Command::Freeze);
        // The server allows one stream.
        timeout(SECOND, call(sender)).await.unwrap_err();
        timeout(SECOND, capacity.notified()).await.unwrap();
        assert_eq!(sender.limit_reached(), None);

        let unsent = sender.reserve().expect("a free stream");
        assert_eq!(sender.limit_reached(), Some(1));
        assert!(sender.reserve().is_none());
        drop(unsent);
        timeout(SECOND, capacity.notified()).await.unwrap();
        assert!(sender.reserve().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn finished_body_frees_its_stream_while_it_is_held() {
        let (connection, _server) = connect(KEEP_ALIVE).await;
        let sender = &connection.sender;
        let mut response = call(sender).await.ok().unwrap();
        assert!(response.body().is_at_end());
        assert_eq!(sender.limit_reached(), Some(1));
        response.body_mut().finish();
        assert!(sender.reserve().is_some());
    }
}

mod unsent {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn call_on_a_connection_that_the_server_has_closed() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        // The task that drives the connection has not run since.
        drop(server);
        let error = call(&connection.sender).await.unwrap_err();
        let unsent = SendErrorKind::Unprocessed(Unprocessed::NotSent);
        assert_eq!(error.kind, unsent, "{error:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn call_that_was_written_before_the_end_may_have_been_processed() {
        let (connection, server) = connect(KEEP_ALIVE).await;
        server.send(Command::Freeze);
        let (result, ()) = tokio::join!(call(&connection.sender), async {
            tokio::time::sleep(SECOND).await;
            drop(server);
        });
        assert_eq!(result.unwrap_err().kind, SendErrorKind::Unknown);
    }
}
