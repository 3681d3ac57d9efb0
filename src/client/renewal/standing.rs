//! What is known of a member between its streams.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

/// The longest pause before a member that refused a stream is asked again. A cluster that elects a
/// leader refuses at once, and the renewal of a lease of 2 s has 1.3 s.
const MAX_PAUSE: Duration = Duration::from_millis(400);

/// What is known of a member, since its last response.
#[derive(Debug)]
pub(super) struct Standing {
    /// A stream to the member was closed because the member owed a response.
    is_silent: bool,
    /// How many silent streams in a row were replaced.
    replaced: u32,
    /// The member refused a new stream, and is not asked before.
    retry_at: Option<Instant>,
    pauses: Backoff,
    responded_at: Option<Instant>,
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            is_silent: false,
            replaced: 0,
            retry_at: None,
            pauses: Backoff::with_jitter(Duration::from_millis(50), MAX_PAUSE, 0.5..1.0),
            responded_at: None,
        }
    }
}

impl Standing {
    pub(super) fn on_response(&mut self, now: Instant) {
        *self = Self {
            responded_at: Some(now),
            ..Self::default()
        };
    }

    /// The member ended a stream on which it had not responded.
    pub(super) fn on_refused(&mut self, now: Instant) {
        self.retry_at = Some(now + self.pauses.next());
        self.is_silent = false;
    }

    /// A stream was closed because the member owed a response.
    pub(super) fn on_silent(&mut self) {
        self.is_silent = true;
    }

    pub(super) fn on_replaced(&mut self) {
        self.replaced += 1;
    }

    pub(super) fn is_silent(&self) -> bool {
        self.is_silent
    }

    pub(super) fn replaced(&self) -> u32 {
        self.replaced
    }

    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    pub(super) fn responded_at(&self) -> Option<Instant> {
        self.responded_at
    }
}
