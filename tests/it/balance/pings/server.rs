//! A server that counts pings.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::SECOND;
use crate::support::frames::{
    ACK, ENHANCE_YOUR_CALM, FrameConnection, HEADERS, MAX_HEADER_LIST_SIZE, PING, RST_STREAM,
    SETTINGS,
};

/// The answer to a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    Ok,
    /// The head of a response, and then nothing.
    Head,
    Nothing,
    /// NOT_FOUND, without a message.
    NotFound,
    /// RST_STREAM, which frees no ping.
    Reset,
    /// A response, and GOAWAY with this code and debug data.
    GoAway(u32, &'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    Ping,
    Call,
    TooManyPings,
}

/// The events of a connection, with the times since it was accepted.
pub(super) type Seen = Vec<(Event, Duration)>;

/// A server that counts pings as grpc-go's `http2Server.handlePing` does with default settings.
pub(super) struct Server {
    answer: Mutex<Answer>,
    seen: Mutex<Vec<Seen>>,
    /// Connections with a lower index answer nothing any more, not even pings.
    frozen: AtomicUsize,
    /// Whether new connections wait.
    pub(super) is_full: AtomicBool,
    /// Whether the response to a ping takes 2 s.
    pub(super) slow: AtomicBool,
}

impl Server {
    pub(super) fn new(answer: Answer) -> Arc<Self> {
        Arc::new(Self {
            answer: Mutex::new(answer),
            seen: Mutex::default(),
            frozen: AtomicUsize::new(0),
            is_full: AtomicBool::new(false),
            slow: AtomicBool::new(false),
        })
    }

    pub(super) fn accepted(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    pub(super) fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    /// Freezes the present connections. New ones work.
    pub(super) fn freeze(&self) {
        self.frozen.store(self.accepted(), Ordering::SeqCst);
    }

    pub(super) fn seen(&self, connection: usize) -> Seen {
        self.seen.lock().unwrap()[connection].clone()
    }

    pub(super) fn events(&self, connection: usize) -> Vec<Event> {
        let seen = self.seen(connection);
        seen.into_iter().map(|(event, _)| event).collect()
    }

    /// The pauses before each ping of a connection, in seconds.
    pub(super) fn ping_pauses(&self, connection: usize) -> Vec<u64> {
        let mut last = Duration::ZERO;
        let seen = self.seen(connection).into_iter();
        let pings = seen.filter(|(event, _)| *event == Event::Ping);
        pings
            .map(|(_, at)| (at - std::mem::replace(&mut last, at)).as_secs())
            .collect()
    }

    pub(super) fn calls(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        let events = seen.iter().flatten();
        events.filter(|(event, _)| *event == Event::Call).count()
    }

    pub(super) fn assert_never_too_many_pings(&self) {
        for connection in 0..self.accepted() {
            let seen = self.seen(connection);
            let too_many = |(event, _): &(Event, Duration)| *event == Event::TooManyPings;
            assert!(!seen.iter().any(too_many), "{seen:?}");
        }
    }

    pub(super) fn accept(self: &Arc<Self>, io: tokio::io::DuplexStream) {
        let mut seen = self.seen.lock().unwrap();
        let connection = FrameConnection::new(io, seen.len());
        seen.push(Vec::new());
        tokio::spawn(Arc::clone(self).serve(connection));
    }

    async fn serve(self: Arc<Self>, mut connection: FrameConnection) -> io::Result<()> {
        let index = connection.index;
        let accepted = Instant::now();
        let record = |event| self.seen.lock().unwrap()[index].push((event, accepted.elapsed()));
        let mut policy = Policy::default();
        connection
            .handshake(&[(MAX_HEADER_LIST_SIZE, 8192)])
            .await?;
        loop {
            let frame = connection.read_frame().await?;
            if index < self.frozen.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            match frame.kind {
                SETTINGS if frame.flags & ACK == 0 => {
                    connection.write_frame(SETTINGS, ACK, 0, &[]).await?;
                }
                PING if frame.flags & ACK == 0 => {
                    record(Event::Ping);
                    if self.slow.load(Ordering::SeqCst) {
                        sleep(2 * SECOND).await;
                    }
                    let pong = connection.write_frame(PING, ACK, 0, &frame.payload);
                    pong.await?;
                    if !policy.accepts_ping(Instant::now()) {
                        record(Event::TooManyPings);
                        let last_stream = policy.last_stream;
                        let code = ENHANCE_YOUR_CALM;
                        let goaway = connection.send_go_away(last_stream, code, "too_many_pings");
                        goaway.await?;
                        return connection.close().await;
                    }
                }
                HEADERS => {
                    record(Event::Call);
                    policy.streams.insert(frame.stream);
                    policy.last_stream = frame.stream;
                }
                RST_STREAM => {
                    policy.streams.remove(&frame.stream);
                }
                _ => {}
            }
            if frame.is_end_stream() {
                let answer = *self.answer.lock().unwrap();
                self.answer_call(&mut connection, &mut policy, frame.stream, answer)
                    .await?;
            }
        }
    }

    async fn answer_call(
        &self,
        connection: &mut FrameConnection,
        policy: &mut Policy,
        stream: u32,
        answer: Answer,
    ) -> io::Result<()> {
        let head: [(&str, &[u8]); 2] = [(":status", b"200"), ("content-type", b"application/grpc")];
        match answer {
            Answer::Nothing => {}
            Answer::Ok => {
                policy.streams.remove(&stream);
                policy.is_reset = true;
                connection.respond_ok(stream).await?;
            }
            Answer::NotFound => {
                policy.streams.remove(&stream);
                policy.is_reset = true;
                connection.respond_status(stream, "5").await?;
            }
            Answer::Head => {
                policy.is_reset = true;
                connection.send_headers(stream, &head, false).await?;
            }
            Answer::Reset => {
                policy.streams.remove(&stream);
                connection.reset_stream(stream, 0x8).await?;
            }
            Answer::GoAway(code, debug_data) => {
                policy.streams.remove(&stream);
                connection.respond_ok(stream).await?;
                connection.send_go_away(stream, code, debug_data).await?;
            }
        }
        Ok(())
    }
}

/// grpc-go's count of pings (`internal/transport/http2_server.go`).
#[derive(Debug, Default)]
struct Policy {
    streams: BTreeSet<u32>,
    last_stream: u32,
    /// Whether HEADERS or DATA were sent since the last ping.
    is_reset: bool,
    last_ping: Option<Instant>,
    strikes: u32,
}

impl Policy {
    /// `EnforcementPolicy.MinTime` and `defaultPingTimeout`.
    const WITH_STREAM: Duration = Duration::from_secs(5 * 60);
    const WITHOUT_STREAM: Duration = Duration::from_secs(2 * 60 * 60);

    fn accepts_ping(&mut self, now: Instant) -> bool {
        let last_ping = self.last_ping.replace(now);
        if std::mem::take(&mut self.is_reset) {
            self.strikes = 0;
            return true;
        }
        let pause = if self.streams.is_empty() {
            Self::WITHOUT_STREAM
        } else {
            Self::WITH_STREAM
        };
        if last_ping.is_some_and(|last| last + pause > now) {
            self.strikes += 1;
        }
        self.strikes <= 2
    }
}
