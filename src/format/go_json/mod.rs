//! JSON as Go's `encoding/json` writes and reads it.
//!
//! People and tools compare registrations byte for byte, so we write exactly the bytes of a Go
//! writer: no spaces, and `&`, `<`, `>`, U+2028 and U+2029 escaped even in plain strings. We accept
//! the same values as a Go reader: field names match in any case, the last of several equal fields
//! counts, and bytes that are not UTF-8 and lone surrogates (`\ud800`) read as U+FFFD.
//!
//! A Go reader accepts two things that we refuse: a number too large for a float in a field that it
//! ignores, and nesting deeper than 128. No known framework registers either.

mod object;
mod text;
mod value;

use std::collections::BTreeMap;
use std::io;

use serde::{Serialize, Serializer};
use serde_json::ser::Formatter;

pub(super) use value::Object;

/// Serializes `value` as Go would.
pub(super) fn to_vec(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(128);
    value.serialize(&mut serde_json::Serializer::with_formatter(
        &mut out,
        GoFormatter,
    ))?;
    Ok(out)
}

/// Serializes a map, and an empty one as `null`, as Go does for a nil map.
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
    fn strings_are_escaped_as_in_go() {
        let text = "<a>&\u{2028}\u{2029}\"\\/\u{8}\u{c}\n\r\t\u{1}\u{7f}é";
        assert_eq!(
            String::from_utf8(to_vec(&text).unwrap()).unwrap(),
            "\"\\u003ca\\u003e\\u0026\\u2028\\u2029\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\u{7f}é\""
        );
    }
}
