//! Which streams were handed to the system.
//!
//! h2 reads before it writes, so a call that picks a connection at the moment at which the server
//! closes it may never be written. Such a call can be sent again without harm.

use super::frames::{HEADER, HEADERS};

/// The bytes that a client sends before its first frame (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// Finds the HEADERS in the bytes that a client writes.
#[derive(Debug)]
pub(super) struct WrittenStreams {
    header: [u8; HEADER],
    header_filled: usize,
    /// Bytes before the next frame.
    skipped: usize,
}

impl WrittenStreams {
    pub(super) fn new() -> Self {
        Self {
            header: [0; HEADER],
            header_filled: 0,
            skipped: PREFACE,
        }
    }

    /// The last stream whose HEADERS are begun in `bytes`. A client opens streams in the order of
    /// their ids.
    pub(super) fn scan(&mut self, mut bytes: &[u8]) -> Option<u32> {
        let mut last = None;
        loop {
            let skipped = self.skipped.min(bytes.len());
            self.skipped -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return last;
            }
            let filled = self.header_filled;
            let taken = (HEADER - filled).min(bytes.len());
            self.header[filled..filled + taken].copy_from_slice(&bytes[..taken]);
            self.header_filled += taken;
            bytes = &bytes[taken..];
            if self.header_filled == HEADER {
                self.header_filled = 0;
                let [a, b, c, kind, _, id @ ..] = self.header;
                self.skipped = u32::from_be_bytes([0, a, b, c]) as usize;
                if kind == HEADERS {
                    last = Some(u32::from_be_bytes(id) & 0x7fff_ffff);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, stream: u8, length: u8) -> Vec<u8> {
        let mut bytes = vec![0, 0, length, kind, 0, 0, 0, 0, stream];
        // A payload that looks like the types of HEADERS.
        bytes.extend(std::iter::repeat_n(HEADERS, length.into()));
        bytes
    }

    proptest! {
        #[test]
        fn last_headers_are_found_in_pieces_of_any_size(
            frames in proptest::collection::vec((0u8..10, 1u8..250, 0u8..250), 0..20),
            cuts in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let mut bytes = vec![0; PREFACE];
            for (kind, stream, length) in &frames {
                bytes.extend(frame(*kind, *stream, *length));
            }
            let mut written = WrittenStreams::new();
            let mut last = None;
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                last = written.scan(piece).or(last);
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            let headers = frames.iter().rev().find(|(kind, ..)| *kind == HEADERS);
            prop_assert_eq!(last, headers.map(|(_, stream, _)| u32::from(*stream)));
        }
    }
}
