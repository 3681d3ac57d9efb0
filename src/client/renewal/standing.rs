//! The record of how a member responds to renewals, kept from one stream to the next.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

/// The longest pause before a member that refused a stream is asked again. A cluster that elects a
/// leader refuses at once, and the renewal of a lease of 2 s has 1.3 s.
const MAX_PAUSE: Duration = Duration::from_millis(400);

/// The last response of a member, and its silence and refusals since then.
#[derive(Debug)]
pub(super) struct Standing {
    /// Whether a stream to the member was given up because the member owed a response.
    is_silent: bool,
    /// When a member that refused a new stream may be asked again.
    retry_at: Option<Instant>,
    pauses: Backoff,
    last: Option<Response>,
}

/// When a member last responded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Response {
    pub(super) at: Instant,
    /// How long the member took for the latest renewal that waited for no other. Zero before that.
    pub(super) round_trip: Duration,
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            is_silent: false,
            retry_at: None,
            pauses: Backoff::with_jitter(Duration::from_millis(50), MAX_PAUSE, 0.5..1.0),
            last: None,
        }
    }
}

impl Standing {
    /// Records a response, unless a later one is known. The response ends silence and refusals.
    pub(super) fn on_response(&mut self, response: Response) {
        if self.last.is_none_or(|last| last.at < response.at) {
            *self = Self {
                last: Some(response),
                ..Self::default()
            };
        }
    }

    /// Records that the member ended a stream on which it had not responded.
    pub(super) fn on_refused(&mut self, now: Instant) {
        self.retry_at = Some(now + self.pauses.next());
        self.is_silent = false;
    }

    /// Records that a stream was given up because the member owed a response. The earlier round
    /// trip is forgotten, because it no longer predicts the next one.
    pub(super) fn on_silent(&mut self) {
        self.is_silent = true;
        if let Some(last) = &mut self.last {
            last.round_trip = Duration::ZERO;
        }
    }

    pub(super) fn is_silent(&self) -> bool {
        self.is_silent
    }

    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    pub(super) fn responded_at(&self) -> Option<Instant> {
        self.last.map(|last| last.at)
    }

    pub(super) fn round_trip(&self) -> Duration {
        self.last.map_or(Duration::ZERO, |last| last.round_trip)
    }
}
