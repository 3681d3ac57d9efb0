//! Keys: ranges, prefixes, and the id in a key.

/// The end with which etcd takes a range as one of all keys from its start on.
const ALL_KEYS: &[u8] = b"\0";

/// A half-open range of keys: from `start` up to, but without, `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The first key.
    pub start: Vec<u8>,
    /// The first key after the range. A single zero byte stands for the end of all keys.
    pub end: Vec<u8>,
}

impl KeyRange {
    /// The range of all keys that begin with `prefix`.
    ///
    /// An empty prefix gives the range of all keys.
    pub fn prefix(prefix: impl Into<Vec<u8>>) -> Self {
        let mut start = prefix.into();
        if start.is_empty() {
            // The smallest key, because etcd refuses an empty one.
            start.push(0);
            return Self {
                start,
                end: ALL_KEYS.to_vec(),
            };
        }
        let mut end = start.clone();
        // The smallest key above all keys with this prefix: increment the last byte below 0xff and
        // cut off the bytes after it.
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                break;
            }
        }
        if end.is_empty() {
            end = ALL_KEYS.to_vec();
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

/// The prefix of all keys of a service, in a format whose keys are `prefix/service/id`, where the
/// whole of `prefix/service` is what the framework's users choose. An empty prefix therefore gives
/// keys without a slash in front, and the prefix `/` gives keys with one.
pub(super) fn service_prefix(prefix: &str, service: &str) -> String {
    if prefix.is_empty() || prefix.ends_with('/') {
        format!("{prefix}{service}/")
    } else {
        format!("{prefix}/{service}/")
    }
}

/// As [`service_prefix`], for frameworks that put a slash between any prefix and the service, even
/// if the prefix is empty or ends in a slash.
pub(super) fn slashed_prefix(prefix: &str, service: &str) -> String {
    format!("{prefix}/{service}/")
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
        assert_eq!(KeyRange::prefix(b"\xff".to_vec()).end, ALL_KEYS);
        let all = KeyRange::prefix("");
        assert_eq!((&*all.start, &*all.end), (ALL_KEYS, ALL_KEYS));
    }

    #[test]
    fn slashes_of_a_prefix_are_kept() {
        assert_eq!(service_prefix("services/", "a"), "services/a/");
        assert_eq!(service_prefix("services", "a"), "services/a/");
        assert_eq!(service_prefix("", "a"), "a/");
        assert_eq!(service_prefix("/", "a"), "/a/");
        assert_eq!(service_prefix("/x", "a"), "/x/a/");
        assert_eq!(slashed_prefix("", "a"), "/a/");
        assert_eq!(slashed_prefix("/", "a"), "//a/");
        assert_eq!(slashed_prefix("/x/", "a"), "/x//a/");
    }
}
