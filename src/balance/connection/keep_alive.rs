//! HTTP/2 keep-alive: finding a peer that has stopped responding.
//!
//! ```text
//!   Watching --interval without traffic--> Waiting --no response within the timeout--> lost
//!    ^ ^  |                                 ^    |
//!    | |  +--the budget is used up--+       |    +--response--> Watching
//!    | |                            v       |
//!    | +-------traffic---------- Throttled -+ the budget allows a ping, or a call waits for one
//!    +--- the budget allows none, and a call waits: the connection takes no more calls
//! ```
//!
//! Servers count pings, and [`ping_budget`](super::ping_budget) says when one is allowed.

use std::future::Future as _;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep_until};

use super::ping_budget::{PingBudget, PingPolicy, Purpose};
use super::state::ConnectionState;

/// A time that no connection lives to see.
const NEVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The part of the timeout after which the response to a ping before a call is late. The call, and
/// those after it, then use other connections, or wait for the first that is free. So several
/// servers that hang do not cost a call the timeout one after the other.
const LATE: u32 = 8;

/// HTTP/2 keep-alive: ping after `interval` without traffic, give up `timeout` later.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeepAliveSettings {
    /// `None` sends no pings.
    pub(crate) interval: Option<Duration>,
    pub(crate) timeout: Duration,
    /// Whether to ping a connection without calls.
    pub(crate) while_idle: bool,
    /// How many pings the servers accept.
    pub(crate) policy: PingPolicy,
}

/// The keep-alive of one connection. The task that drives the connection polls it.
pub(super) struct KeepAlive<'a> {
    pings: PingPong,
    state: &'a ConnectionState,
    interval: Duration,
    settings: KeepAliveSettings,
    budget: PingBudget,
    /// Whether the response to a ping is outstanding. h2 sends one ping at a time.
    awaits_pong: bool,
    phase: Phase,
    timer: Pin<Box<Sleep>>,
}

/// The event that the keep-alive waits for. `heard` is the time of the last sign of life at the
/// start of a phase.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// The timer fires when a ping is due, or earlier if there was traffic in the meantime.
    Watching,
    /// A ping is due, and the timer fires when the budget allows one for this purpose.
    Throttled { purpose: Purpose, heard: Instant },
    /// A ping was sent, and the timer fires at the deadline, or before a call already when the
    /// response is late.
    Waiting { heard: Instant, deadline: Instant },
}

impl<'a> KeepAlive<'a> {
    /// `None` if the settings ask for no pings.
    pub(super) fn new(
        pings: Option<PingPong>,
        state: &'a ConnectionState,
        settings: KeepAliveSettings,
    ) -> Option<Self> {
        let (pings, interval) = (pings?, settings.interval?);
        Some(Self {
            pings,
            state,
            interval,
            settings,
            budget: PingBudget::new(settings.policy),
            awaits_pong: false,
            phase: Phase::Watching,
            timer: Box::pin(sleep_until(state.last_activity() + interval)),
        })
    }

    /// Resolves when the peer is lost: nothing arrived for the interval, and a ping then got no
    /// response within the timeout.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.awaits_pong {
            match self.pings.poll_pong(cx) {
                Poll::Ready(Ok(_)) => self.on_pong(cx),
                // The connection has ended; polling it returns the reason.
                Poll::Ready(Err(_)) => return Poll::Pending,
                Poll::Pending => {}
            }
        }
        loop {
            match self.phase {
                Phase::Watching => {
                    ready!(self.timer.as_mut().poll(cx));
                    let due = self.state.last_activity() + self.interval;
                    if due > Instant::now() {
                        self.timer.as_mut().reset(due);
                    } else {
                        self.on_due();
                    }
                }
                Phase::Throttled { purpose, heard } => {
                    if self.state.last_activity() != heard {
                        self.decide(cx);
                        self.watch();
                    } else if purpose == Purpose::Stream && self.purpose() == Purpose::Idle {
                        self.watch();
                    } else if purpose == Purpose::Idle && self.is_needed() && self.prove() {
                        continue;
                    } else {
                        ready!(self.timer.as_mut().poll(cx));
                        self.on_due();
                    }
                }
                Phase::Waiting { heard, deadline } => {
                    ready!(self.timer.as_mut().poll(cx));
                    if self.state.last_activity() != heard {
                        // Any sign of life counts. The response may wait behind other data.
                        self.decide(cx);
                        self.watch();
                    } else if Instant::now() < deadline {
                        self.state.suspend_calls();
                        self.timer.as_mut().reset(deadline);
                    } else {
                        return Poll::Ready(());
                    }
                }
            }
        }
    }

    /// Waits until the next ping is due.
    fn watch(&mut self) {
        self.phase = Phase::Watching;
        let due = self.state.last_activity() + self.interval;
        self.timer.as_mut().reset(due);
    }

    fn purpose(&self) -> Purpose {
        if self.state.has_open_stream() {
            Purpose::Stream
        } else {
            Purpose::Idle
        }
    }

    /// Whether a connection that was idle for long is about to be used.
    fn is_needed(&self) -> bool {
        self.state.liveness.is_requested() || self.state.has_open_stream()
    }

    fn on_due(&mut self) {
        let purpose = self.purpose();
        if self.awaits_pong || self.is_allowed(purpose) {
            self.ping(purpose);
            return;
        }
        let allowed = match purpose {
            Purpose::Idle if !self.settings.while_idle => None,
            _ => self.budget.allowed_from(purpose),
        };
        if purpose == Purpose::Idle {
            self.state.liveness.set_unproven();
        }
        self.phase = Phase::Throttled {
            purpose,
            heard: self.state.last_activity(),
        };
        let allowed = allowed.unwrap_or_else(|| Instant::now() + NEVER);
        self.timer.as_mut().reset(allowed);
    }

    /// Pings before a call. Returns false if the server might not accept the ping; the connection
    /// then takes no more calls.
    fn prove(&mut self) -> bool {
        if self.awaits_pong || self.is_allowed(Purpose::BeforeCall) {
            self.ping(Purpose::BeforeCall);
            return true;
        }
        let reason = || "idle for so long that it may be broken".to_owned();
        self.state.close_reason.set(reason);
        self.state.mark_exhausted();
        self.state.liveness.decide();
        false
    }

    fn is_allowed(&mut self, purpose: Purpose) -> bool {
        if self.state.take_data_arrived() {
            self.budget.on_data(self.awaits_pong);
        }
        if purpose == Purpose::Idle && !self.settings.while_idle {
            return false;
        }
        let now = Instant::now();
        let from = self.budget.allowed_from(purpose);
        from.is_none_or(|from| from <= now)
    }

    /// Sends a ping, unless one is outstanding, whose response serves as well.
    fn ping(&mut self, purpose: Purpose) {
        let now = Instant::now();
        if self.pings.send_ping(Ping::opaque()).is_ok() {
            self.budget.on_ping(purpose, now);
        }
        self.awaits_pong = true;
        // The ping waits behind bytes of ours. The timeout grows by the longest wait of a write,
        // because the peer may take as long again to read up to the ping.
        let deadline = now + self.settings.timeout + self.state.longest_write_wait();
        self.phase = Phase::Waiting {
            heard: self.state.last_activity(),
            deadline,
        };
        self.timer.as_mut().reset(match purpose {
            Purpose::BeforeCall => now + self.settings.timeout / LATE,
            Purpose::Stream | Purpose::Idle => deadline,
        });
    }

    fn on_pong(&mut self, cx: &Context<'_>) {
        if self.state.take_data_arrived() {
            self.budget.on_data(true);
        }
        self.awaits_pong = false;
        self.budget.on_pong(Instant::now());
        self.decide(cx);
        self.watch();
    }

    /// The peer is alive: calls are sent again.
    fn decide(&self, cx: &Context<'_>) {
        if self.state.liveness.decide() {
            // The driver sets the limit on streams again.
            cx.waker().wake_by_ref();
        }
    }
}

/// Calls that wait for a ping find out that the connection has ended.
impl Drop for KeepAlive<'_> {
    fn drop(&mut self) {
        self.state.stop_accepting();
        self.state.liveness.decide();
    }
}
