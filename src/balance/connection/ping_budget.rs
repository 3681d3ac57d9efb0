//! How many pings a server accepts.
//!
//! Servers treat pings without traffic as abuse. grpc-go (`internal/transport/http2_server.go`),
//! gRPC Core (`ping_abuse_policy.cc`, for C++, Python and Ruby) and grpc-java
//! (`KeepAliveEnforcer`) count a *strike* for each ping that follows the one before too soon, and
//! end the connection with GOAWAY "too_many_pings" at the third. Whenever the server sends HEADERS
//! or DATA, it forgets the strikes. The next ping is then no strike in grpc-go and gRPC Core;
//! grpc-java compares it with the start of the connection. The budget does Java's count, which is
//! the strictest, on the client's side and stops before the third strike.

use std::time::Duration;

use tokio::time::Instant;

/// The strikes that a server forgives: `maxPingStrikes` of grpc-go and
/// `GRPC_ARG_HTTP2_MAX_PING_STRIKES` of gRPC Core, 2 in both.
const MAX_STRIKES: u32 = 2;

/// The strikes that an idle connection takes. One is left for the ping before the next call.
const MAX_IDLE_STRIKES: u32 = MAX_STRIKES - 1;

/// How much later than permitted a ping is sent. A ping that arrives a moment early is a strike,
/// and the network does not delay all pings alike.
const MARGIN: Duration = Duration::from_secs(10);

/// The pause between pings while a stream is open: 5 minutes in grpc-go
/// (`EnforcementPolicy.MinTime`), gRPC Core (`min_recv_ping_interval_without_data`), and gRFC A8.
const WITH_STREAM: Duration = Duration::from_secs(5 * 60).saturating_add(MARGIN);

/// The pause between pings without a stream: 2 hours where the server does not permit pings then
/// (`EnforcementPolicy.PermitWithoutStream`, false by default), with a margin.
pub(super) const WITHOUT_STREAM: Duration = Duration::from_secs(2 * 60 * 60 + 60);

/// The same margin for servers that permit a ping every few seconds.
const SHORT_MARGIN: Duration = Duration::from_millis(500);

/// How often a server permits pings while a stream is open. Without one the default applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PingPolicy {
    /// The pause after which a ping is no strike.
    pause: Duration,
    /// The strikes that keep-alive takes.
    strikes: u32,
}

impl PingPolicy {
    /// The policy of gRPC servers with default settings.
    pub(crate) const DEFAULT: Self = Self {
        pause: WITH_STREAM,
        strikes: MAX_STRIKES,
    };

    /// The policy of servers that permit a ping every `min_time`. The connection pings as often,
    /// and takes no strike for it.
    pub(crate) const fn of_min_time(min_time: Duration) -> Self {
        Self {
            pause: min_time.saturating_add(SHORT_MARGIN),
            strikes: 0,
        }
    }
}

/// The purpose of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Keep-alive while a stream is open.
    Stream,
    /// Keep-alive without a stream.
    Idle,
    /// Making sure that the connection works before the first call after an idle time.
    BeforeCall,
}

/// When a connection may send its next ping.
#[derive(Debug)]
pub(super) struct PingBudget {
    policy: PingPolicy,
    /// When the connection was made.
    begun: Instant,
    /// The latest ping since the server sent HEADERS or DATA; without one, `begun`.
    last_ping: Instant,
    strikes: u32,
}

impl PingBudget {
    /// The budget of a connection that begins now.
    pub(super) fn new(policy: PingPolicy) -> Self {
        let begun = Instant::now();
        Self {
            policy,
            begun,
            last_ping: begun,
            strikes: 0,
        }
    }

    /// From when a ping is allowed; `None` means at any time.
    pub(super) fn allowed_from(&self, purpose: Purpose) -> Option<Instant> {
        let max_strikes = match purpose {
            Purpose::Stream => self.policy.strikes,
            Purpose::Idle => MAX_IDLE_STRIKES,
            Purpose::BeforeCall => MAX_STRIKES,
        };
        (self.strikes >= max_strikes).then(|| self.last_ping + self.pause(purpose))
    }

    /// Records a ping that is sent now.
    pub(super) fn on_ping(&mut self, purpose: Purpose, now: Instant) {
        let pause = self.pause(purpose);
        if now < self.last_ping + pause {
            self.strikes += 1;
        }
        self.last_ping = now;
    }

    /// Records the response to the latest ping. The server received the ping at most now.
    pub(super) fn on_pong(&mut self, now: Instant) {
        self.last_ping = now;
    }

    /// Records that HEADERS or DATA of the peer arrived. `awaits_pong` says whether the response to
    /// a ping is outstanding. The server may have received that ping after it sent the frame, and
    /// then the ping counts.
    pub(super) fn on_data(&mut self, awaits_pong: bool) {
        self.strikes = u32::from(awaits_pong);
        if !awaits_pong {
            self.last_ping = self.begun;
        }
    }

    /// The shortest pause after which a ping is no strike.
    fn pause(&self, purpose: Purpose) -> Duration {
        match purpose {
            Purpose::Stream => self.policy.pause,
            // The server has not seen the call that waits for the ping.
            Purpose::Idle | Purpose::BeforeCall => WITHOUT_STREAM,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const INTERVAL: Duration = Duration::from_secs(10);
    const ETCD: PingPolicy = PingPolicy::of_min_time(Duration::from_secs(5));

    /// Sends pings at the interval, later where the budget says so. Returns the pauses in between.
    async fn pauses(budget: &mut PingBudget, purpose: Purpose, pings: usize) -> Vec<u64> {
        let mut pauses = Vec::new();
        for _ in 0..pings {
            let started = Instant::now();
            let due = started + INTERVAL;
            let allowed = budget.allowed_from(purpose).unwrap_or(due);
            advance(due.max(allowed) - started).await;
            budget.on_ping(purpose, Instant::now());
            pauses.push(started.elapsed().as_secs());
        }
        pauses
    }

    #[tokio::test(start_paused = true)]
    async fn open_stream_gets_two_pings_at_the_interval() {
        let mut budget = PingBudget::new(PingPolicy::DEFAULT);
        let seen = pauses(&mut budget, Purpose::Stream, 5).await;
        assert_eq!(seen, [10, 10, 310, 310, 310]);
        // The connection is old enough that the first ping is no strike in any server.
        budget.on_data(false);
        let seen = pauses(&mut budget, Purpose::Stream, 4).await;
        assert_eq!(seen, [10, 10, 10, 310]);
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_gets_one_and_one_before_a_call() {
        let mut budget = PingBudget::new(PingPolicy::DEFAULT);
        let seen = pauses(&mut budget, Purpose::Idle, 4).await;
        assert_eq!(seen, [10, 7260, 7260, 7260]);
        let idle_from = budget.allowed_from(Purpose::Idle).unwrap();
        assert_eq!(budget.allowed_from(Purpose::BeforeCall), None);
        budget.on_ping(Purpose::BeforeCall, Instant::now());
        assert_eq!(budget.allowed_from(Purpose::BeforeCall), Some(idle_from));
    }

    #[tokio::test(start_paused = true)]
    async fn pings_with_a_stream_count_while_idle() {
        let mut budget = PingBudget::new(PingPolicy::DEFAULT);
        pauses(&mut budget, Purpose::Stream, 1).await;
        let idle = budget.allowed_from(Purpose::Idle).unwrap();
        assert_eq!(idle - Instant::now(), 7260 * SECOND);
        assert_eq!(budget.allowed_from(Purpose::BeforeCall), None);
    }

    #[tokio::test(start_paused = true)]
    async fn pings_that_the_policy_permits_never_end() {
        let mut budget = PingBudget::new(ETCD);
        let seen = pauses(&mut budget, Purpose::Stream, 1000).await;
        assert_eq!(seen, [10; 1000]);
        advance(SECOND).await;
        let next = budget.allowed_from(Purpose::Stream).unwrap();
        assert_eq!(next - Instant::now(), Duration::from_millis(4500));
        assert_eq!(
            pauses(&mut budget, Purpose::Idle, 3).await,
            [10, 7260, 7260]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn data_during_a_ping_does_not_free_the_next_one() {
        let mut budget = PingBudget::new(PingPolicy::DEFAULT);
        pauses(&mut budget, Purpose::Stream, 3).await;
        budget.on_data(true);
        let seen = pauses(&mut budget, Purpose::Stream, 3).await;
        assert_eq!(seen, [10, 310, 310]);
    }

    #[tokio::test(start_paused = true)]
    async fn pause_counts_from_the_response_to_a_ping() {
        let mut budget = PingBudget::new(PingPolicy::DEFAULT);
        pauses(&mut budget, Purpose::Stream, 3).await;
        advance(7 * SECOND).await;
        budget.on_pong(Instant::now());
        let next = budget.allowed_from(Purpose::Stream).unwrap();
        assert_eq!(next - Instant::now(), 310 * SECOND);
    }

    /// The pause that a server demands.
    fn pause(min_time: Duration, has_stream: bool) -> Duration {
        match has_stream {
            true => min_time,
            false => Duration::from_secs(2 * 60 * 60),
        }
    }

    /// The count of grpc-go's `handlePing`.
    #[derive(Default)]
    struct GoServer {
        is_reset: bool,
        last_ping: Option<Instant>,
        strikes: u32,
    }

    impl GoServer {
        fn on_ping(&mut self, pause: Duration, now: Instant) {
            let last_ping = self.last_ping.replace(now);
            if std::mem::take(&mut self.is_reset) {
                self.strikes = 0;
                return;
            }
            if last_ping.is_some_and(|last| last + pause > now) {
                self.strikes += 1;
            }
            assert!(self.strikes <= 2, "too_many_pings");
        }
    }

    /// The count of grpc-java's `KeepAliveEnforcer`.
    struct JavaServer {
        begun: Instant,
        last_valid: Instant,
        strikes: u32,
    }

    impl JavaServer {
        fn new(begun: Instant) -> Self {
            Self {
                begun,
                last_valid: begun,
                strikes: 0,
            }
        }

        fn reset(&mut self) {
            self.last_valid = self.begun;
            self.strikes = 0;
        }

        fn on_ping(&mut self, pause: Duration, now: Instant) {
            if self.last_valid + pause <= now {
                self.last_valid = now;
            } else {
                self.strikes += 1;
            }
            assert!(self.strikes <= 2, "too_many_pings");
        }
    }

    /// A connection with servers of both kinds.
    struct Model {
        min_time: Duration,
        budget: PingBudget,
        go: GoServer,
        java: JavaServer,
    }

    impl Model {
        fn new(policy: PingPolicy, min_time: Duration) -> Self {
            Self {
                min_time,
                budget: PingBudget::new(policy),
                go: GoServer::default(),
                java: JavaServer::new(Instant::now()),
            }
        }

        /// The servers send HEADERS or DATA.
        fn reset(&mut self) {
            self.go.is_reset = true;
            self.java.reset();
        }

        /// Sends a ping if the budget allows it. `crossing` says whether data of the servers
        /// crosses the ping.
        fn ping(&mut self, purpose: Purpose, now: Instant, crossing: bool) {
            let allowed_from = self.budget.allowed_from(purpose);
            if allowed_from.is_some_and(|from| from > now) {
                return;
            }
            self.budget.on_ping(purpose, now);
            if crossing {
                self.reset();
            }
            let pause = pause(self.min_time, purpose == Purpose::Stream);
            self.go.on_ping(pause, now);
            self.java.on_ping(pause, now);
            if crossing {
                self.budget.on_data(true);
                self.budget.on_pong(now);
            }
        }
    }

    /// Whatever happens on a connection, a ping that the budget allows is never the third strike.
    fn check(policy: PingPolicy, min_time: Duration, steps: &[(u8, u64)]) {
        let mut now = Instant::now();
        let mut model = Model::new(policy, min_time);
        for (what, seconds) in steps {
            now += Duration::from_secs(*seconds);
            match what {
                0 => model.ping(Purpose::Stream, now, false),
                1 => model.ping(Purpose::Idle, now, false),
                2 => model.ping(Purpose::BeforeCall, now, false),
                3 => {
                    model.reset();
                    model.budget.on_data(false);
                }
                _ => model.ping(Purpose::Idle, now, true),
            }
        }
    }

    proptest! {
        #[test]
        fn no_sequence_of_pings_is_too_many(
            steps in proptest::collection::vec((0u8..5, 0u64..400), 0..200),
        ) {
            check(PingPolicy::DEFAULT, Duration::from_secs(300), &steps);
            check(ETCD, Duration::from_secs(5), &steps);
        }
    }
}
