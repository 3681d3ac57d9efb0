//! JSON as Go's `encoding/json` writes and reads it.
//!
//! Registrations are compared byte for byte by people and tools, so what we write must be what a
//! Go writer would have written: no spaces, and `&`, `<`, `>`, U+2028 and U+2029 escaped even in
//! plain strings. And what a Go reader would take, we take: field names match whatever their case,
//! of a field that occurs twice the last counts, bytes that are not UTF-8 and lone surrogates
//! (`\ud800`) read as U+FFFD.
//!
//! Where a Go reader takes more: a number beyond a float in a field that it ignores, nesting deeper
//! than 128. Nobody registers those, and the entry is refused, not misread.

mod object;
mod text;
mod value;

use std::collections::BTreeMap;
use std::io;

use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;

pub(super) use object::Object;

/// Writes `value` as Go would.
pub(super) fn to_vec(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(128);
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut out,
        GoFormatter,
    ))?;
    Ok(out)
}

/// A map as Go writes one that was never made: `null` when empty.
pub(super) fn null_if_empty<S: Serializer>(
    map: &BTreeMap<String, String>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if map.is_empty() {
        serializer.serialize_none()
    } else {
        map.serialize(serializer)
    }
}

struct GoFormatter;

impl Formatter for GoFormatter {
    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let mut written = 0;
        for (at, character) in fragment.char_indices() {
            let escape: &[u8] = match character {
                '&' => b"\\u0026",
                '<' => b"\\u003c",
                '>' => b"\\u003e",
                '\u{2028}' => b"\\u2028",
                '\u{2029}' => b"\\u2029",
                _ => continue,
            };
            writer.write_all(&fragment.as_bytes()[written..at])?;
            writer.write_all(escape)?;
            written = at + character.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[written..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_as_go_escapes_it() {
        let text = "<a>&\u{2028}\u{2029}\"\\/\u{8}\u{c}\n\r\t\u{1}\u{7f}é";
        assert_eq!(
            String::from_utf8(to_vec(&text).unwrap()).unwrap(),
            "\"\\u003ca\\u003e\\u0026\\u2028\\u2029\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\u{7f}é\""
        );
    }
}
