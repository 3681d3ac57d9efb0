//! Pings to servers that police them, as gRPC servers in Go, C++ and Java do by default.
//!
//! The servers are hand-written frames over pipes, and time is paused, so that hours pass at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use goo_etcd::BalancedChannel;
use goo_etcd::balance::BalancedChannelBuilder;
use helloworld::echo::echo_client::EchoClient;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Streaming};

use crate::support::balanced::{
    call, call_with_timeout, hello, is_ready, static_channel, status_of, wait_until_ready,
};
use crate::support::frames::{
    ACK, ENHANCE_YOUR_CALM, FrameConnection, HEADERS, MAX_HEADER_LIST_SIZE, NO_ERROR, PING,
    RST_STREAM, SETTINGS,
};
use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::wait_until;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// What a server answers to a call.
#[derive(Debug, Clone, Copy)]
enum Answer {
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
enum Event {
    Ping,
    Call,
    TooManyPings,
}

/// What the server saw on a connection, with the times since the connection was accepted.
type Seen = Vec<(Event, Duration)>;

/// A server that counts pings as grpc-go's `http2Server.handlePing` does with default settings.
struct Server {
    answer: Mutex<Answer>,
    seen: Mutex<Vec<Seen>>,
    /// Connections with a lower index answer nothing any more, not even pings.
    frozen: AtomicUsize,
    /// Whether new connections wait.
    is_full: AtomicBool,
    /// Whether the response to a ping takes 2 s.
    slow: AtomicBool,
}

impl Server {
    fn new(answer: Answer) -> Arc<Self> {
        Arc::new(Self {
            answer: Mutex::new(answer),
            seen: Mutex::default(),
            frozen: AtomicUsize::new(0),
            is_full: AtomicBool::new(false),
            slow: AtomicBool::new(false),
        })
    }

    fn accepted(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
    }

    /// Freezes the present connections. New ones work.
    fn freeze(&self) {
        self.frozen.store(self.accepted(), Ordering::SeqCst);
    }

    fn seen(&self, connection: usize) -> Seen {
        self.seen.lock().unwrap()[connection].clone()
    }

    fn events(&self, connection: usize) -> Vec<Event> {
        let seen = self.seen(connection);
        seen.into_iter().map(|(event, _)| event).collect()
    }

    /// The pauses before each ping of a connection, in seconds.
    fn ping_pauses(&self, connection: usize) -> Vec<u64> {
        let mut last = Duration::ZERO;
        let seen = self.seen(connection).into_iter();
        let pings = seen.filter(|(event, _)| *event == Event::Ping);
        pings
            .map(|(_, at)| (at - std::mem::replace(&mut last, at)).as_secs())
            .collect()
    }

    fn calls(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        let events = seen.iter().flatten();
        events.filter(|(event, _)| *event == Event::Call).count()
    }

    fn assert_never_too_many_pings(&self) {
        for connection in 0..self.accepted() {
            let seen = self.seen(connection);
            let too_many = |(event, _): &(Event, Duration)| *event == Event::TooManyPings;
            assert!(!seen.iter().any(too_many), "{seen:?}");
        }
    }

    fn accept(self: &Arc<Self>, io: tokio::io::DuplexStream) {
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

/// A channel to servers behind pipes, of which the first has the address `s0:1`.
async fn channel(
    servers: &[&Arc<Server>],
    settings: impl FnOnce(BalancedChannelBuilder) -> BalancedChannelBuilder,
) -> BalancedChannel {
    let named = servers.iter().enumerate();
    let named: BTreeMap<String, Arc<Server>> = named
        .map(|(index, server)| (address(index), Arc::clone(server)))
        .collect();
    let addresses: Vec<String> = named.keys().cloned().collect();
    let connector = tower::service_fn(move |uri: Uri| {
        let server = Arc::clone(&named[uri.authority().unwrap().as_str()]);
        async move {
            while server.is_full.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(1)).await;
            }
            let (client, io) = tokio::io::duplex(64 * 1024);
            server.accept(io);
            Ok::<_, io::Error>(TokioIo::new(client))
        }
    });
    let addresses = addresses.iter().map(String::as_str);
    let channel = static_channel(addresses, |builder| settings(builder.connector(connector)));
    wait_until_ready(&channel, servers.len()).await;
    channel
}

fn address(index: usize) -> String {
    format!("s{index}:1")
}

async fn open_stream(channel: &BalancedChannel) -> Streaming<helloworld::echo::EchoReply> {
    let mut client = EchoClient::new(channel.clone());
    client.server_stream(hello()).await.unwrap().into_inner()
}

mod streams {
    use super::*;

    /// grpc-go#4579 and many others: "too_many_pings" on a stream without messages.
    #[tokio::test(start_paused = true)]
    async fn silent_stream_stays_open() {
        let server = Server::new(Answer::Head);
        let channel = channel(&[&server], |builder| builder).await;
        let mut stream = open_stream(&channel).await;
        timeout(HOUR, stream.message()).await.unwrap_err();
        server.assert_never_too_many_pings();
        assert_eq!(server.accepted(), 1);
        let pauses = server.ping_pauses(0);
        assert_eq!(pauses[..2], [10, 10], "{pauses:?}");
        assert!(pauses[2..].iter().all(|pause| *pause == 310), "{pauses:?}");
        assert!(pauses.len() > 12);
    }

    /// As grpc-go, which sends the head of a response with its first message.
    #[tokio::test(start_paused = true)]
    async fn call_without_response_stays_open() {
        let server = Server::new(Answer::Nothing);
        let channel = channel(&[&server], |builder| builder).await;
        timeout(HOUR, call(&channel)).await.unwrap_err();
        server.assert_never_too_many_pings();
        assert_eq!(server.accepted(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn short_interval_is_no_abuse() {
        let server = Server::new(Answer::Head);
        let settings =
            |builder: BalancedChannelBuilder| builder.http2_keep_alive_interval(Some(SECOND / 10));
        let channel = channel(&[&server], settings).await;
        let mut stream = open_stream(&channel).await;
        timeout(HOUR, stream.message()).await.unwrap_err();
        server.assert_never_too_many_pings();
        assert_eq!(server.accepted(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn hung_server_is_found_within_interval_and_timeout() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        for pause in [SECOND, 9 * SECOND, 25 * SECOND] {
            sleep(pause).await;
            call(&channel).await.unwrap();
        }
        server.freeze();
        let sent = Instant::now();
        let error = call(&channel).await.unwrap_err();
        let waited = sent.elapsed();
        assert_eq!(error.code(), Code::Unavailable, "{error:?}");
        assert!(error.message().contains("keep-alive"), "{error:?}");
        assert!((13 * SECOND..14 * SECOND).contains(&waited), "{waited:?}");
    }

    /// tonic drops the response without reading a body that is empty.
    #[tokio::test(start_paused = true)]
    async fn hung_server_is_found_after_a_status_without_a_message() {
        let server = Server::new(Answer::NotFound);
        let channel = channel(&[&server], |builder| builder).await;
        for _ in 0..3 {
            call(&channel).await.unwrap_err();
        }
        server.freeze();
        let sent = Instant::now();
        call(&channel).await.unwrap_err();
        let waited = sent.elapsed();
        assert!((13 * SECOND..14 * SECOND).contains(&waited), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn request_that_is_not_sent_opens_no_stream() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        let _unread = open_stream(&channel).await;
        sleep(SECOND).await;
        let mut request = tonic::Request::new(hello());
        let large = "x".repeat(20_000).parse().unwrap();
        request.metadata_mut().insert("x-large", large);
        let mut client = EchoClient::new(channel.clone());
        let error = client.unary(request).await.unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error:?}");
        sleep(HOUR).await;
        assert_eq!(server.ping_pauses(0), [10]);
        server.assert_never_too_many_pings();
    }

    /// The server has forgotten the stream, and counts pings as on an idle connection.
    #[tokio::test(start_paused = true)]
    async fn unread_response_is_no_open_stream() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        let mut unread = open_stream(&channel).await;
        sleep(HOUR).await;
        assert_eq!(server.ping_pauses(0), [10]);
        call(&channel).await.unwrap();
        assert!(unread.message().await.unwrap().is_some());
        server.assert_never_too_many_pings();
        assert_eq!(server.accepted(), 1);
    }

    /// Calls, cancelled calls, silent streams and idle times in any order.
    #[tokio::test(start_paused = true)]
    async fn no_mixture_of_calls_is_too_many_pings() {
        for seed in 0..20 {
            let server = Server::new(Answer::Ok);
            let channel = channel(&[&server], |builder| builder).await;
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..60 {
                let time = Duration::from_secs(random.u64(0..400));
                server.answer(
                    *random
                        .choice([&Answer::Ok, &Answer::Head, &Answer::Nothing])
                        .unwrap(),
                );
                match random.u8(0..3) {
                    0 => sleep(time).await,
                    1 => {
                        let _ = timeout(time, call(&channel)).await;
                    }
                    _ => {
                        let _ =
                            timeout(time, async { open_stream(&channel).await.message().await })
                                .await;
                    }
                }
            }
            server.assert_never_too_many_pings();
        }
    }
}

mod idle {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connection_gets_one_ping_and_stays() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        sleep(2 * HOUR).await;
        assert_eq!(server.ping_pauses(0), [10]);
        sleep(24 * HOUR).await;
        server.assert_never_too_many_pings();
        assert_eq!(server.accepted(), 1);
        call(&channel).await.unwrap();
        sleep(2 * HOUR).await;
        call(&channel).await.unwrap();
        server.assert_never_too_many_pings();
        assert_eq!(server.accepted(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn first_call_pays_one_ping() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        for idle in [MINUTE, HOUR, HOUR] {
            sleep(idle).await;
            let before = server.events(0).len();
            for _ in 0..3 {
                call(&channel).await.unwrap();
            }
            let events = server.events(0).split_off(before);
            assert_eq!(events, [Event::Ping, Event::Call, Event::Call, Event::Call]);
        }
        // Many at a time share the ping.
        sleep(HOUR).await;
        let before = server.events(0).len();
        let calls = (0..50).map(|_| call(&channel));
        futures::future::try_join_all(calls).await.unwrap();
        let events = server.events(0).split_off(before);
        assert_eq!(events.len(), 51);
        assert_eq!(events[..2], [Event::Ping, Event::Call]);
        assert_eq!(server.accepted(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn call_soon_after_the_pings_pays_none() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        sleep(19 * SECOND).await;
        call(&channel).await.unwrap();
        assert_eq!(server.events(0), [Event::Ping, Event::Call]);
    }

    #[tokio::test(start_paused = true)]
    async fn server_that_hung_meanwhile_costs_no_call() {
        let servers = [Server::new(Answer::Ok), Server::new(Answer::Ok)];
        let [hung, live] = &servers;
        let channel = channel(&[hung, live], |builder| builder).await;
        sleep(HOUR).await;
        hung.freeze();
        for _ in 0..100 {
            call(&channel).await.unwrap();
        }
        assert!(hung.seen(0).iter().all(|(event, _)| *event != Event::Call));
        assert!(live.calls() > 0);
    }

    /// Not one keep-alive timeout after the other: `ready_timeout` would end the call.
    #[tokio::test(start_paused = true)]
    async fn many_servers_that_hung_meanwhile_cost_no_call() {
        let servers: Vec<_> = (0..8).map(|_| Server::new(Answer::Ok)).collect();
        let channel = channel(&servers.iter().collect::<Vec<_>>(), |builder| builder).await;
        let (live, hung) = servers.split_first().unwrap();
        for _ in 0..5 {
            sleep(HOUR).await;
            hung.iter().for_each(|server| server.freeze());
            let started = Instant::now();
            for _ in 0..100 {
                call(&channel).await.unwrap();
            }
            assert!(started.elapsed() < 5 * SECOND, "{:?}", started.elapsed());
            wait_until_ready(&channel, servers.len()).await;
        }
        assert!(live.calls() > 0);
    }

    /// The response to the ping takes longer than usual, but not too long.
    #[tokio::test(start_paused = true)]
    async fn slow_response_to_the_ping_costs_no_call() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        sleep(HOUR).await;
        server.slow.store(true, Ordering::SeqCst);
        let started = Instant::now();
        let calls = (0..50).map(|_| call(&channel));
        futures::future::try_join_all(calls).await.unwrap();
        assert!((2 * SECOND..3 * SECOND).contains(&started.elapsed()));
        assert_eq!(server.accepted(), 1);
        let expected = [Event::Ping, Event::Ping, Event::Call];
        assert_eq!(server.events(0)[..3], expected);
    }

    #[tokio::test(start_paused = true)]
    async fn only_server_that_hung_meanwhile_gets_the_call_again() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        sleep(HOUR).await;
        server.freeze();
        let started = Instant::now();
        call(&channel).await.unwrap();
        assert!(started.elapsed() < 5 * SECOND, "{:?}", started.elapsed());
        assert_eq!(server.accepted(), 2);
        assert_eq!(server.calls(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn server_that_hangs_soon_is_found_without_a_call() {
        let server = Server::new(Answer::Ok);
        let channel = channel(&[&server], |builder| builder).await;
        call(&channel).await.unwrap();
        server.freeze();
        sleep(14 * SECOND).await;
        wait_until_ready(&channel, 1).await;
        assert_eq!(server.accepted(), 2);
    }

    /// The second ping was sent before a call to which the server sent nothing back.
    #[tokio::test(start_paused = true)]
    async fn call_without_a_ping_left_gets_a_new_connection() {
        for (answer, waits) in [(Answer::Nothing, true), (Answer::Reset, false)] {
            let server = Server::new(answer);
            let settings = |builder: BalancedChannelBuilder| builder.wait_for_ready(waits);
            let channel = channel(&[&server], settings).await;
            sleep(MINUTE).await;
            call_with_timeout(&channel, SECOND).await.unwrap_err();
            server.answer(Answer::Ok);
            sleep(MINUTE).await;
            let started = Instant::now();
            call(&channel).await.unwrap();
            assert!(started.elapsed() < SECOND, "{:?}", started.elapsed());
            assert_eq!(server.accepted(), 2);
            let expected = [Event::Ping, Event::Ping, Event::Call];
            assert_eq!(server.events(0), expected);
            assert!(is_ready(&channel, &address(0)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn pings_may_be_off() {
        let server = Server::new(Answer::Ok);
        let settings = |builder: BalancedChannelBuilder| builder.http2_keep_alive_interval(None);
        let channel = channel(&[&server], settings).await;
        sleep(24 * HOUR).await;
        call(&channel).await.unwrap();
        assert_eq!(server.events(0), [Event::Call]);
    }

    #[tokio::test(start_paused = true)]
    async fn pings_while_idle_may_be_off() {
        let server = Server::new(Answer::Ok);
        let settings = |builder: BalancedChannelBuilder| builder.keep_alive_while_idle(false);
        let channel = channel(&[&server], settings).await;
        sleep(24 * HOUR).await;
        assert_eq!(server.events(0), []);
        call(&channel).await.unwrap();
        assert_eq!(server.events(0), [Event::Ping, Event::Call]);
    }
}

/// gRFC A8: the server permits fewer pings than usual, and says so with code and debug data.
mod too_many_pings {
    use super::*;

    /// The pauses between the pings of an idle connection after a GOAWAY, and `last_error`.
    async fn after_go_away(code: u32, debug_data: &'static str) -> (Vec<u64>, String) {
        let server = Server::new(Answer::GoAway(code, debug_data));
        // The second endpoint takes the calls while the first one is not connected.
        let other = Server::new(Answer::Ok);
        let channel = channel(&[&server, &other], |builder| builder).await;
        server.is_full.store(true, Ordering::SeqCst);
        while server.calls() == 0 {
            call(&channel).await.unwrap();
        }
        let last_error = || status_of(&channel, &address(0)).unwrap().last_error;
        wait_until("the connection is lost", async || last_error().is_some()).await;
        let error = last_error().unwrap();
        server.answer(Answer::Ok);
        server.is_full.store(false, Ordering::SeqCst);
        sleep(HOUR).await;
        assert_eq!(server.accepted(), 2);
        assert_eq!(other.ping_pauses(0).last(), Some(&10));
        // The advice stays, although the endpoint is ready again.
        assert!(is_ready(&channel, &address(0)));
        let stays = last_error().is_some_and(|stays| stays == error);
        assert_eq!(stays, error.contains("keep_alive_interval"), "{error}");
        (server.ping_pauses(1), error)
    }

    #[tokio::test(start_paused = true)]
    async fn interval_doubles_for_this_endpoint() {
        let (pauses, error) = after_go_away(ENHANCE_YOUR_CALM, "too_many_pings").await;
        assert_eq!(pauses, [20]);
        assert!(
            error.contains("GOAWAY ENHANCE_YOUR_CALM: too_many_pings"),
            "{error}"
        );
        assert!(error.contains("http2_keep_alive_interval"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn code_or_debug_data_alone_change_nothing() {
        let (pauses, error) = after_go_away(ENHANCE_YOUR_CALM, "too much").await;
        assert_eq!(pauses, [10]);
        assert!(!error.contains("http2_keep_alive_interval"), "{error}");
        let (pauses, error) = after_go_away(NO_ERROR, "too_many_pings").await;
        assert_eq!(pauses, [10]);
        assert!(!error.contains("http2_keep_alive_interval"), "{error}");
    }

    #[tokio::test]
    async fn each_doubling_is_logged_once() {
        if !isolate("balance::pings::too_many_pings::each_doubling_is_logged_once").await {
            return;
        }
        tokio::time::pause();
        let (log, _scope) = Log::start("goo_etcd=warn");
        let answer = Answer::GoAway(ENHANCE_YOUR_CALM, "too_many_pings");
        let server = Server::new(answer);
        let settings = |builder: BalancedChannelBuilder| builder.connections_per_endpoint(2);
        let channel = channel(&[&server], settings).await;
        for _ in 0..2 {
            call(&channel).await.unwrap();
        }
        sleep(MINUTE).await;
        let text = log.text();
        let warnings: Vec<_> = text
            .lines()
            .filter(|line| line.contains("too many pings"))
            .collect();
        assert!(!warnings.is_empty(), "{text}");
        for interval in ["interval=20s", "interval=40s"] {
            let count = warnings
                .iter()
                .filter(|line| line.contains(interval))
                .count();
            assert!(count <= 1, "{text}");
        }
        assert!(warnings[0].contains("s0:1"), "{text}");
    }
}
