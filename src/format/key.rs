//! Keys: ranges, prefixes, and the id in a key.

/// A half-open range of keys: from `start` up to, but without, `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key.
    pub start: Vec<u8>,
    /// The first key after the range.
    pub end: Vec<u8>,
}

impl KeyRange {
    /// The range of all keys that begin with `prefix`.
    ///
    /// `prefix` must not be empty, and must have a byte other than `0xff`.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        let start = prefix.into();
        let mut end = start.clone();
        // The smallest key above all keys with this prefix: increment the last byte below 0xff and
        // cut off the bytes after it.
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                break;
            }
        }
        Self { start, end }
    }
}

/// The key of an entry that a [`Format`](super::Format) decodes, and the service it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyContext<'a> {
    /// The prefix of the range in which the entry was found.
    pub prefix: &'a str,
    /// The service of that range.
    pub service: &'a str,
    /// The entry's key.
    pub key: &'a [u8],
}

impl<'a> KeyContext<'a> {
    /// The context of `key` in the range of `service` under `prefix`.
    pub fn new(prefix: &'a str, service: &'a str, key: &'a [u8]) -> Self {
        Self {
            prefix,
            service,
            key,
        }
    }
}

/// The prefix of all keys of a service, in a format whose keys are `prefix/service/id`. An empty
/// prefix leaves no slash in front.
pub(super) fn service_prefix(prefix: &str, service: &str) -> String {
    let prefix = prefix.trim_end_matches('/');
    if prefix.is_empty() {
        format!("{service}/")
    } else {
        format!("{prefix}/{service}/")
    }
}

/// As [`service_prefix`], for frameworks that always join with slashes: an empty prefix leaves a
/// slash in front.
pub(super) fn slashed_prefix(prefix: &str, service: &str) -> String {
    format!("{}/{service}/", prefix.trim_end_matches('/'))
}

/// The id in a key: the part after `service_prefix`. `None` if the key has no such part.
pub(super) fn id_after<'a>(service_prefix: &str, key: &'a [u8]) -> Option<&'a str> {
    let id = std::str::from_utf8(key)
        .ok()?
        .strip_prefix(service_prefix)?;
    (!id.is_empty()).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_range_ends_before_the_next_key_without_the_prefix() {
        let range = KeyRange::prefix("services/greeter/");
        assert_eq!(range.start, b"services/greeter/");
        assert_eq!(range.end, b"services/greeter0");
        assert_eq!(KeyRange::prefix(b"a\xff\xff".to_vec()).end, b"b");
    }

    #[test]
    fn trailing_slashes_of_a_prefix_are_ignored() {
        assert_eq!(service_prefix("services/", "a"), "services/a/");
        assert_eq!(service_prefix("services", "a"), "services/a/");
        assert_eq!(service_prefix("", "a"), "a/");
        assert_eq!(service_prefix("/", "a"), "a/");
        assert_eq!(service_prefix("/x", "a"), "/x/a/");
        assert_eq!(slashed_prefix("/x/", "a"), "/x/a/");
    }
}
