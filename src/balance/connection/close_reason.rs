//! Why a connection closed.

use parking_lot::Mutex;

/// Why a connection closed. The first cause wins, because later errors only follow from it.
#[derive(Debug, Default)]
pub(crate) struct CloseReason(Mutex<Reasons>);

#[derive(Debug, Default)]
struct Reasons {
    cause: Option<String>,
    /// The peer's GOAWAY without an error. Such a connection closes when its calls have ended, or
    /// for another cause.
    graceful: Option<String>,
}

impl CloseReason {
    pub(crate) fn set(&self, cause: impl FnOnce() -> String) {
        self.0.lock().cause.get_or_insert_with(cause);
    }

    /// Records that the peer ends the connection gracefully.
    pub(super) fn set_graceful(&self, go_away: String) {
        self.0.lock().graceful.get_or_insert(go_away);
    }

    /// Whether the peer ends the connection gracefully, and nothing else has ended it.
    pub(super) fn is_graceful(&self) -> bool {
        let reasons = self.0.lock();
        reasons.graceful.is_some() && reasons.cause.is_none()
    }

    /// For example `GOAWAY ENHANCE_YOUR_CALM: too_many_pings`, or `closed by the peer after GOAWAY
    /// NO_ERROR`.
    pub(crate) fn get(&self) -> Option<String> {
        let reasons = self.0.lock();
        match (&reasons.cause, &reasons.graceful) {
            (Some(cause), Some(graceful)) => Some(format!("{cause} after {graceful}")),
            (cause, graceful) => cause.as_ref().or(graceful.as_ref()).cloned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_cause_wins() {
        let reason = CloseReason::default();
        assert_eq!(reason.get(), None);
        reason.set(|| "reset by peer".to_owned());
        reason.set(|| "broken pipe".to_owned());
        assert_eq!(reason.get().unwrap(), "reset by peer");
    }

    #[test]
    fn graceful_goaway_does_not_hide_the_cause() {
        let reason = CloseReason::default();
        assert!(!reason.is_graceful());
        reason.set_graceful("GOAWAY NO_ERROR".to_owned());
        assert_eq!(reason.get().unwrap(), "GOAWAY NO_ERROR");
        assert!(reason.is_graceful());
        reason.set(|| "closed by the peer".to_owned());
        assert!(!reason.is_graceful());
        let both = "closed by the peer after GOAWAY NO_ERROR";
        assert_eq!(reason.get().unwrap(), both);
    }
}
