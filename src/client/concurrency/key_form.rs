//! The form of a queue's keys, `NAME/LEASE`, and how to skip the keys between them.

/// The part of an entry's key behind `NAME/`, as Go's `%x` writes a lease.
pub(super) fn suffix_of(lease: i64) -> String {
    let sign = if lease < 0 { "-" } else { "" };
    format!("{sign}{:x}", lease.unsigned_abs())
}

/// The least suffix that an entry can have.
pub(super) const FIRST_SUFFIX: &[u8] = b"-";

/// A suffix that is greater than that of every entry.
pub(super) const END_SUFFIX: &[u8] = b"g";

/// The longest number behind the sign, in digits.
const MAX_DIGITS: usize = 16;

/// The least string after `suffix` with which the suffix of an entry can begin; `None` if no entry
/// comes after `suffix`. A read that goes on there skips whole folders of other keys.
pub(super) fn next_suffix(suffix: &[u8]) -> Option<Vec<u8>> {
    let is_possible = |at: &usize| possible_bytes(&suffix[..*at]).contains(&suffix[*at]);
    let length = (0..suffix.len()).take_while(is_possible).count();
    let mut next = suffix[..length].to_vec();
    let mut after = suffix.get(length).copied();
    loop {
        let mut bytes = possible_bytes(&next).iter().copied();
        if let Some(byte) = bytes.find(|byte| after.is_none_or(|after| *byte > after)) {
            next.push(byte);
            return Some(next);
        }
        after = Some(next.pop()?);
    }
}

/// The bytes that can follow `begin` in the suffix of an entry, in ascending order.
fn possible_bytes(begin: &[u8]) -> &'static [u8] {
    let (has_sign, digits) = match begin.strip_prefix(b"-") {
        Some(digits) => (true, digits.len()),
        None => (false, begin.len()),
    };
    match (has_sign, digits) {
        (false, 0) => b"-123456789abcdef",
        (true, 0) => b"123456789abcdef",
        (_, MAX_DIGITS..) => b"",
        _ => b"0123456789abcdef",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn suffix_is_written_as_by_go() {
        for (lease, suffix) in [
            (1, "1"),
            (0x10, "10"),
            (i64::MAX, "7fffffffffffffff"),
            // etcd grants such ids to clients that choose them.
            (-0x1f, "-1f"),
            (i64::MIN, "-8000000000000000"),
        ] {
            assert_eq!(suffix_of(lease), suffix);
        }
    }

    #[test]
    fn folders_and_other_names_are_skipped() {
        for (suffix, next) in [
            ("", Some("-")),
            ("b", Some("b0")),
            ("b/c", Some("b0")),
            ("config", Some("d")),
            ("0", Some("1")),
            ("/1", Some("1")),
            ("ff-f", Some("ff0")),
            ("f\u{e9}", None),
            ("fffffffffffffffe", Some("ffffffffffffffff")),
            ("ffffffffffffffff0", None),
            ("zone", None),
        ] {
            let expected = next.map(|next| next.as_bytes().to_vec());
            assert_eq!(next_suffix(suffix.as_bytes()), expected, "{suffix}");
        }
    }

    proptest! {
        #[test]
        fn no_entry_is_skipped(suffix in "[-/0-3a-h]{0,4}", lease in any::<i16>()) {
            prop_assume!(lease != 0);
            let entry = suffix_of(i64::from(lease)).into_bytes();
            prop_assert!(FIRST_SUFFIX.to_vec() <= entry && entry < END_SUFFIX.to_vec());
            let suffix = suffix.into_bytes();
            let next = next_suffix(&suffix);
            prop_assert!(next.as_ref().is_none_or(|next| *next > suffix));
            if entry > suffix {
                prop_assert!(next.is_some_and(|next| next <= entry));
            }
        }
    }
}
