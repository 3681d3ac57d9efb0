//! Finding HTTP/2 frames in the bytes that a peer sends (RFC 9113, section 4.1).
//!
//! h2 parses the same bytes afterwards. The scan finds what h2 does not report, or reports too
//! late: the peer's SETTINGS and GOAWAY, and when HEADERS and DATA arrive.

use super::go_away::GoAway;
use super::header_limits::LARGE_BLOCK;

/// Length, type, flags and stream id of a frame.
pub(super) const HEADER: usize = 9;

const DATA: u8 = 0x0;
pub(super) const HEADERS: u8 = 0x1;
const RST_STREAM: u8 = 0x3;
pub(super) const SETTINGS: u8 = 0x4;
const PING: u8 = 0x6;
const GOAWAY: u8 = 0x7;
const CONTINUATION: u8 = 0x9;

/// The flag of HEADERS and DATA that are the last of their stream.
const END_STREAM: u8 = 0x1;

/// The flag of HEADERS and CONTINUATION that are the last of their headers.
const END_HEADERS: u8 = 0x4;

/// The flag of SETTINGS and PING that acknowledge a frame of ours.
const ACK: u8 = 0x1;

/// How many bytes of a payload are kept. SETTINGS have six bytes for each setting, and the debug
/// data of GOAWAY is a short text.
const MAX_KEPT: usize = 4096;

/// `SETTINGS_MAX_HEADER_LIST_SIZE` (RFC 9113, section 6.5.2).
pub(super) const MAX_HEADER_LIST_SIZE: u16 = 0x6;

/// A frame that the peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// The header of a HEADERS frame has arrived.
    Headers,
    /// The header of a DATA frame has arrived.
    Data,
    /// The peer has ended this stream. Follows the HEADERS or DATA that end one.
    StreamEnd(u32),
    /// A whole SETTINGS frame of the peer's own settings has arrived.
    Settings(Settings),
    /// A whole PING has arrived. `ack` says whether it answers a ping of ours.
    Ping { ack: bool },
    /// A whole GOAWAY has arrived.
    GoAway(GoAway),
    /// The headers of a stream have become larger than [`LARGE_BLOCK`]: the header of that frame
    /// has arrived, HEADERS or CONTINUATION. `ends_stream` says whether they are the last of their
    /// stream.
    LargeHeaders { stream: u32, ends_stream: bool },
    /// The header of any other frame has arrived.
    Other,
}

/// The settings of a SETTINGS frame that this crate reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// The largest header list that the peer accepts, in bytes. `None` if the frame does not say.
    pub(super) max_header_list_size: Option<u32>,
}

impl Settings {
    fn parse(payload: &[u8]) -> Self {
        let mut settings = Self::default();
        for setting in payload.chunks_exact(6) {
            let id = u16::from_be_bytes([setting[0], setting[1]]);
            if id == MAX_HEADER_LIST_SIZE {
                let value = [setting[2], setting[3], setting[4], setting[5]];
                settings.max_header_list_size = Some(u32::from_be_bytes(value));
            }
        }
        settings
    }
}

/// Finds the frames in a stream of bytes that arrives in pieces of any size.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    header: [u8; HEADER],
    header_filled: usize,
    payload_left: usize,
    /// How many bytes HEADERS and the CONTINUATION frames after it take.
    header_block: usize,
    /// Whether they end their stream, which HEADERS say.
    header_block_ends_stream: bool,
    /// Whether the latest frame of them is the last.
    ends_header_block: bool,
    /// The payload of a SETTINGS, PING or GOAWAY frame so far, up to [`MAX_KEPT`] bytes.
    kept: Vec<u8>,
}

impl Scanner {
    /// Whether headers larger than [`LARGE_BLOCK`] have begun to arrive and have not ended.
    pub(super) fn is_within_large_headers(&self) -> bool {
        let is_in_payload =
            self.payload_left > 0 && matches!(self.header[3], HEADERS | CONTINUATION);
        self.header_block > LARGE_BLOCK && (is_in_payload || !self.ends_header_block)
    }

    /// Calls `found` with each frame that `bytes` completes.
    pub(super) fn scan(&mut self, mut bytes: &[u8], mut found: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                bytes = self.read_payload(bytes, &mut found);
            } else {
                bytes = self.read_header(bytes, &mut found);
            }
        }
    }

    fn read_header<'a>(&mut self, bytes: &'a [u8], found: &mut impl FnMut(Frame)) -> &'a [u8] {
        let filled = self.header_filled;
        let taken = (HEADER - filled).min(bytes.len());
        self.header[filled..filled + taken].copy_from_slice(&bytes[..taken]);
        self.header_filled += taken;
        if self.header_filled == HEADER {
            self.header_filled = 0;
            let [a, b, c, kind, flags, id @ ..] = self.header;
            let stream = u32::from_be_bytes(id) & 0x7fff_ffff;
            self.payload_left = u32::from_be_bytes([0, a, b, c]) as usize;
            match kind {
                HEADERS => {
                    self.header_block = 0;
                    self.header_block_ends_stream = flags & END_STREAM != 0;
                    found(Frame::Headers);
                    self.add_to_header_block(stream, flags, found);
                }
                CONTINUATION => {
                    found(Frame::Other);
                    self.add_to_header_block(stream, flags, found);
                }
                DATA => found(Frame::Data),
                SETTINGS | PING | GOAWAY if self.payload_left == 0 => found(self.take_kept()),
                SETTINGS | PING | GOAWAY => {}
                RST_STREAM => found(Frame::StreamEnd(stream)),
                _ => found(Frame::Other),
            }
            if matches!(kind, HEADERS | DATA) && flags & END_STREAM != 0 {
                found(Frame::StreamEnd(stream));
            }
        }
        &bytes[taken..]
    }

    /// Adds the frame whose header has arrived to the headers of its stream.
    fn add_to_header_block(&mut self, stream: u32, flags: u8, found: &mut impl FnMut(Frame)) {
        self.ends_header_block = flags & END_HEADERS != 0;
        let before = self.header_block;
        self.header_block += self.payload_left;
        if before <= LARGE_BLOCK && self.header_block > LARGE_BLOCK {
            let ends_stream = self.header_block_ends_stream;
            found(Frame::LargeHeaders {
                stream,
                ends_stream,
            });
        }
    }

    fn read_payload<'a>(&mut self, bytes: &'a [u8], found: &mut impl FnMut(Frame)) -> &'a [u8] {
        let (payload, rest) = bytes.split_at(self.payload_left.min(bytes.len()));
        self.payload_left -= payload.len();
        if matches!(self.header[3], SETTINGS | PING | GOAWAY) {
            let room = MAX_KEPT - self.kept.len();
            self.kept
                .extend_from_slice(&payload[..room.min(payload.len())]);
            if self.payload_left == 0 {
                found(self.take_kept());
            }
        }
        rest
    }

    /// The frame whose payload is complete.
    fn take_kept(&mut self) -> Frame {
        let payload = std::mem::take(&mut self.kept);
        let [_, _, _, kind, flags, ..] = self.header;
        let ack = flags & ACK != 0;
        match kind {
            SETTINGS if !ack => Frame::Settings(Settings::parse(&payload)),
            PING => Frame::Ping { ack },
            GOAWAY => Frame::GoAway(GoAway::parse(&payload)),
            _ => Frame::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use h2::Reason;
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
        let mut bytes = vec![a, b, c, kind, flags, 0, 0, 0, 0];
        bytes.extend(payload);
        bytes
    }

    fn scan(bytes: &[u8]) -> Vec<Frame> {
        let mut found = Vec::new();
        Scanner::default().scan(bytes, |frame| found.push(frame));
        found
    }

    #[test]
    fn settings_are_found_when_they_are_whole() {
        let settings = frame(
            SETTINGS,
            0,
            &[0, 3, 0, 0, 0, 100, 0, 6, 0, 0, 0x20, 0, 0, 1, 0, 0],
        );
        let (last, head) = settings.split_last().unwrap();
        let mut scanner = Scanner::default();
        let mut found = Vec::new();
        scanner.scan(head, |frame| found.push(frame));
        assert_eq!(found, []);
        scanner.scan(&[*last], |frame| found.push(frame));
        let expected = Settings {
            max_header_list_size: Some(8192),
        };
        assert_eq!(found, [Frame::Settings(expected)]);
    }

    #[test]
    fn empty_settings_and_acknowledgements_are_told_apart() {
        assert_eq!(
            scan(&frame(SETTINGS, 0, &[])),
            [Frame::Settings(Settings::default())]
        );
        assert_eq!(scan(&frame(SETTINGS, ACK, &[])), [Frame::Other]);
        assert_eq!(scan(&frame(PING, 0, &[0; 8])), [Frame::Ping { ack: false }]);
        assert_eq!(
            scan(&frame(PING, ACK, &[0; 8])),
            [Frame::Ping { ack: true }]
        );
    }

    #[test]
    fn ends_of_streams_are_found() {
        for kind in [HEADERS, DATA] {
            let mut bytes = frame(kind, END_STREAM, &[]);
            bytes[8] = 7;
            assert_eq!(scan(&bytes)[1..], [Frame::StreamEnd(7)]);
            assert_eq!(scan(&frame(kind, 0, &[])).len(), 1);
        }
        let reset = frame(RST_STREAM, 0, &[0; 4]);
        assert_eq!(scan(&reset), [Frame::StreamEnd(0)]);
    }

    #[test]
    fn large_headers_are_found_once_with_their_stream() {
        let piece = |kind, flags, length: usize| {
            let mut bytes = frame(kind, flags, &vec![0; length]);
            bytes[8] = 5;
            bytes
        };
        for (flags, ends_stream) in [(0, false), (END_STREAM, true)] {
            let mut bytes = piece(HEADERS, flags, LARGE_BLOCK - 1);
            bytes.extend(piece(CONTINUATION, 0, 1));
            let is_large = |found: &Frame| matches!(found, Frame::LargeHeaders { .. });
            assert!(!scan(&bytes).iter().any(is_large));
            for _ in 0..2 {
                bytes.extend(piece(CONTINUATION, 0, 1));
            }
            let large = Frame::LargeHeaders {
                stream: 5,
                ends_stream,
            };
            assert_eq!(scan(&bytes).iter().filter(|f| **f == large).count(), 1);
            // Each stream's headers count from zero.
            bytes.extend(piece(HEADERS, flags, LARGE_BLOCK));
            assert_eq!(scan(&bytes).iter().filter(|f| **f == large).count(), 1);
        }
    }

    #[test]
    fn large_headers_last_until_their_last_byte() {
        let mut bytes = frame(HEADERS, 0, &vec![0; LARGE_BLOCK]);
        let small = bytes.len();
        bytes.extend(frame(CONTINUATION, 0, &[0; 10]));
        bytes.extend(frame(CONTINUATION, END_HEADERS, &[0; 10]));
        let whole = bytes.len();
        bytes.extend(frame(DATA, 0, &[0; 10]));
        bytes.extend(frame(HEADERS, 0, &[0; 10]));
        let mut scanner = Scanner::default();
        for (index, byte) in bytes.iter().enumerate() {
            scanner.scan(&[*byte], |_| {});
            let arrived = index + 1;
            let expected = (small + HEADER..whole).contains(&arrived);
            assert_eq!(scanner.is_within_large_headers(), expected, "{arrived}");
        }
    }

    #[test]
    fn long_debug_data_is_cut() {
        let mut payload = vec![0, 0, 0, 7, 0, 0, 0, 11];
        payload.extend(std::iter::repeat_n(b'x', 100_000));
        let found = scan(&frame(GOAWAY, 0, &payload));
        let [Frame::GoAway(go_away)] = &found[..] else {
            panic!("{found:?}");
        };
        assert_eq!(go_away.last_stream, 7);
        assert_eq!(go_away.code, Reason::ENHANCE_YOUR_CALM);
        assert!(go_away.debug_data.len() <= MAX_KEPT);
    }

    proptest! {
        #[test]
        fn frames_are_found_in_pieces_of_any_size(
            frames in proptest::collection::vec((0u8..10, 0usize..300), 0..20),
            cuts in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let mut bytes = Vec::new();
            for (kind, length) in &frames {
                // A payload of bytes that look like a frame type.
                bytes.extend(frame(*kind, 0, &vec![GOAWAY; *length]));
            }
            let whole = scan(&bytes);
            let mut scanner = Scanner::default();
            let mut found = Vec::new();
            let mut rest = &bytes[..];
            for cut in cuts.iter().cycle() {
                let (piece, after) = rest.split_at((*cut).min(rest.len()));
                scanner.scan(piece, |frame| found.push(frame));
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found.len(), frames.len());
            prop_assert_eq!(found, whole);
        }
    }
}
