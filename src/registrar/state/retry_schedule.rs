//! When an entry is next due.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

/// An entry that no other client has changed for this long is restored without a pause at the next
/// change.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// The pauses of one entry. Other entries continue meanwhile.
#[derive(Debug, Default)]
pub(super) struct RetrySchedule {
    /// etcd refused the entry's last write or deletion.
    refusal_pause: Option<Pause>,
    /// Another client changed the entry's keys.
    conflict_pause: Option<Pause>,
    /// When an action was last started for the entry.
    last_attempt: Option<Instant>,
}

#[derive(Debug)]
struct Pause {
    retry_at: Instant,
    backoff: Backoff,
}

impl Pause {
    fn new(now: Instant) -> Self {
        Self {
            retry_at: now,
            backoff: Backoff::for_etcd(),
        }
    }

    fn extend(&mut self, now: Instant) {
        self.retry_at = now + self.backoff.next();
    }
}

impl RetrySchedule {
    /// The time before which no action is started for the entry.
    pub(super) fn not_before(&self) -> Option<Instant> {
        let pauses = [&self.refusal_pause, &self.conflict_pause];
        let times = pauses.into_iter().flatten().map(|pause| pause.retry_at);
        times.max()
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.not_before().is_none_or(|at| now >= at)
    }

    pub(super) fn last_attempt(&self) -> Option<Instant> {
        self.last_attempt
    }

    pub(super) fn record_attempt(&mut self, now: Instant) {
        self.last_attempt = Some(now);
    }

    /// Ends all pauses. Called when the desired state changes, because earlier refusals do not
    /// apply to the new one.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Ends the pause after a refusal.
    pub(super) fn clear_refusal(&mut self) {
        self.refusal_pause = None;
    }

    /// Pauses after etcd refused the entry. The entry is retried, because permissions can change.
    pub(super) fn pause_after_refusal(&mut self, now: Instant) {
        let pause = self.refusal_pause.get_or_insert_with(|| Pause::new(now));
        pause.extend(now);
    }

    /// Pauses after another client changed the entry's keys: not for the first change, and longer
    /// with each further one within [`STABLE_AFTER`]. Without the pause, the registrar and another
    /// tool that also restores the key would overwrite each other at full speed.
    pub(super) fn pause_after_conflict(&mut self, now: Instant) {
        match &mut self.conflict_pause {
            Some(pause) if now < pause.retry_at + STABLE_AFTER => pause.extend(now),
            pause => *pause = Some(Pause::new(now)),
        }
    }
}
