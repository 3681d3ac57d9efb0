//! Calls that no server application has seen, for certain (RFC 9113, sections 6.8 and 8.7).

use h2::Reason;

/// Why no server application has seen a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unprocessed {
    /// The connection accepted no more streams or ended, so nothing was sent.
    NotSent,
    /// The server refused the stream with RST_STREAM(REFUSED_STREAM).
    Refused,
    /// The server ended the connection with GOAWAY(NO_ERROR) before it processed the stream. The
    /// call has no part in the reason.
    GoingAway,
    /// The server ended the connection with an error before it processed the stream. The first
    /// such stream is the suspect, because a server that breaks on a call usually names the stream
    /// before as its last.
    GoAwayError { is_suspect: bool },
}

impl Unprocessed {
    /// Classifies the error of a stream. `None` if a server application may have seen the call.
    /// `is_suspect` says whether the stream is the first that the peer's GOAWAY excludes.
    pub(super) fn of(error: &h2::Error, is_suspect: impl FnOnce() -> bool) -> Option<Self> {
        if !error.is_remote() {
            return None;
        }
        // h2 reports the peer's GOAWAY as a stream's error only if the stream's id is above the
        // last stream id that the peer has processed. Other streams end with the connection's
        // error.
        match (error.is_go_away(), error.reason()) {
            (true, Some(Reason::NO_ERROR)) => Some(Self::GoingAway),
            (true, _) => Some(Self::GoAwayError {
                is_suspect: is_suspect(),
            }),
            (false, Some(Reason::REFUSED_STREAM)) => Some(Self::Refused),
            (false, _) => None,
        }
    }
}
