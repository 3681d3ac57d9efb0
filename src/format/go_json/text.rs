//! Decodes a value's bytes into text as a Go reader does.

use std::borrow::Cow;

/// The length in bytes of a Unicode escape such as `\ud800`.
const ESCAPE: usize = 6;

/// Replaces each byte that is not UTF-8, and each lone surrogate escape, with U+FFFD. Outside of
/// strings neither is valid JSON, and the parser then refuses the U+FFFD.
pub(super) fn decode(bytes: &[u8]) -> Cow<'_, str> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => Cow::Owned(replace_invalid_bytes(bytes)),
    };
    if text.contains("\\ud") || text.contains("\\uD") {
        Cow::Owned(replace_lone_surrogates(&text))
    } else {
        text
    }
}

fn replace_invalid_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    text
}

fn replace_lone_surrogates(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let length = match (surrogate(escape), escape.get(ESCAPE..).and_then(surrogate)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 2 * ESCAPE,
            (Some(_), _) => {
                out.push(char::REPLACEMENT_CHARACTER);
                rest = &escape[ESCAPE..];
                continue;
            }
            // The backslash and the character it escapes, which may be another backslash.
            (None, _) => escape.chars().take(2).map(char::len_utf8).sum(),
        };
        let (escape, after) = escape.split_at(length);
        out.push_str(escape);
        rest = after;
    }
    out + rest
}

/// The surrogate of the escape at the beginning of `text`, if it is one.
fn surrogate(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..ESCAPE - 2)?;
    // `from_str_radix` also accepts a sign.
    let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let unit = u16::from_str_radix(digits, 16).ok().filter(|_| is_hex)?;
    matches!(unit, 0xd800..=0xdfff).then_some(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lone_surrogates_are_replaced() {
        for (text, read) in [
            (r"\ud800", "\u{fffd}"),
            (r"\uDFFF!", "\u{fffd}!"),
            (r"\ud83d\ude00", r"\ud83d\ude00"),
            (r"\ud83d\ud83d\ude00", "\u{fffd}\\ud83d\\ude00"),
            (r"\ude00\ud83d", "\u{fffd}\u{fffd}"),
            (r"\ud800\n\u00e9", "\u{fffd}\\n\\u00e9"),
            // An escaped backslash, followed by letters.
            (r"\\ud800", r"\\ud800"),
            (r"\\\ud800", "\\\\\u{fffd}"),
            // Not valid escapes: the parser refuses them.
            (r"\ud80", r"\ud80"),
            (r"\ud8é0", r"\ud8é0"),
            (r"\ud800\é\", "\u{fffd}\\é\\"),
        ] {
            assert_eq!(decode(text.as_bytes()), read, "{text}");
        }
    }

    #[test]
    fn invalid_bytes_are_replaced_one_by_one() {
        assert_eq!(decode(b"a\xe2\x82b"), "a\u{fffd}\u{fffd}b");
    }
}
