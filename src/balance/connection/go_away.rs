//! The GOAWAY frame, with which a peer ends a connection (RFC 9113, section 6.8).

use std::fmt;

use h2::Reason;

/// How many bytes of the debug data a message shows. The peer chooses the data.
const MAX_SHOWN: usize = 256;

/// A GOAWAY of the peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GoAway {
    /// The last stream that the peer may have acted on.
    pub(super) last_stream: u32,
    pub(super) code: Reason,
    pub(super) debug_data: Vec<u8>,
}

impl GoAway {
    /// Parses a payload. h2 refuses a frame that is too short, so missing bytes count as zero.
    pub(super) fn parse(payload: &[u8]) -> Self {
        let number = |at: usize| {
            let bytes = payload.get(at..at + 4).unwrap_or(&[0; 4]);
            u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        Self {
            last_stream: number(0) & 0x7fff_ffff,
            code: Reason::from(number(4)),
            debug_data: payload.get(8..).unwrap_or_default().to_vec(),
        }
    }
}

/// `GOAWAY ENHANCE_YOUR_CALM: too_many_pings`, or without debug data `GOAWAY NO_ERROR`.
impl fmt::Display for GoAway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // `Debug` is the code's name in RFC 9113; `Display` is a sentence.
        write!(f, "GOAWAY {:?}", self.code)?;
        if self.debug_data.is_empty() {
            return Ok(());
        }
        let shown = &self.debug_data[..self.debug_data.len().min(MAX_SHOWN)];
        write!(f, ": {}", String::from_utf8_lossy(shown).escape_debug())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(last_stream: u32, code: u32, debug_data: &[u8]) -> GoAway {
        let mut payload = last_stream.to_be_bytes().to_vec();
        payload.extend(code.to_be_bytes());
        payload.extend(debug_data);
        GoAway::parse(&payload)
    }

    #[test]
    fn text_names_the_code_and_the_debug_data() {
        assert_eq!(parse(0, 0, b"").to_string(), "GOAWAY NO_ERROR");
        let text = parse(0, 11, b"too_many_pings").to_string();
        assert_eq!(text, "GOAWAY ENHANCE_YOUR_CALM: too_many_pings");
    }

    #[test]
    fn debug_data_is_shown_escaped_and_cut() {
        let text = parse(0, 2, b"a\nb\xff").to_string();
        assert_eq!(text, "GOAWAY INTERNAL_ERROR: a\\nb\u{fffd}");
        assert!(parse(0, 2, &[b'x'; 4000]).to_string().len() < 300);
    }

    #[test]
    fn reserved_bit_is_no_part_of_the_stream_id() {
        assert_eq!(parse(0x8000_0003, 0, b"").last_stream, 3);
    }

    #[test]
    fn short_payload_is_not_a_panic() {
        assert_eq!(GoAway::parse(&[0, 0]).last_stream, 0);
    }
}
