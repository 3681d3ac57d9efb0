//! go-zero's registrations.
//!
//! `user.rpc/7587881534843123458 => 10.0.0.5:8080`
//!
//! The value is the bare address, so it is all that an instance is: a reader sees no weight, no zone,
//! no metadata, and none of a draining one's leaving before its key goes. The keys of one address
//! are one endpoint until all of them are gone.

use std::time::Duration;

use super::{DecodeError, Format, KeyRange, id_after, service_prefix};
use crate::error::Result;
use crate::instance::Instance;
use crate::instance::validate_address;

/// go-zero's registrations (`core/discov`): keys are `service/id`, no prefix, the value is the bare
/// address, time to live 10 s.
///
/// It carries the address alone. What stands deeper than `service/number` is another's, and not shown.
/// The service's name is what go-zero calls the key (`user.rpc`).
///
/// go-zero's ids are decimal numbers: the lease's, or one that the publisher chose. Ours is chosen,
/// since it is known before there is a lease and stays through its loss: the instance's own id where
/// that is a decimal number that fits 64 bits, and otherwise the id's hash (FNV-1a, 63 bits). Read
/// back, an instance's id is its address, for several keys may stand for it.
#[derive(Debug, Clone, Copy, Default)]
pub struct GoZero;

impl Format for GoZero {
    fn name(&self) -> &'static str {
        "go-zero"
    }

    fn default_prefix(&self) -> &'static str {
        ""
    }

    fn default_ttl(&self) -> Duration {
        // `TimeToLive` in core/discov/internal/vars.go.
        Duration::from_secs(10)
    }

    fn merges_by_address(&self) -> bool {
        true
    }

    fn key(&self, prefix: &str, instance: &Instance) -> String {
        let number = match instance.id.parse::<i64>() {
            // Not `+7` nor `007`, which would be other keys than `7`.
            Ok(number) if number.to_string() == instance.id => number,
            _ => hash(&instance.id),
        };
        format!("{}{number}", service_prefix(prefix, &instance.service))
    }

    fn range(&self, prefix: &str, service: &str) -> KeyRange {
        KeyRange::prefix(service_prefix(prefix, service))
    }

    fn encode(&self, instance: &Instance) -> Result<Vec<u8>> {
        Ok(instance.address.as_bytes().to_vec())
    }

    fn decode(
        &self,
        prefix: &str,
        service: &str,
        key: &[u8],
        value: &[u8],
    ) -> Result<Vec<Instance>, DecodeError> {
        // A service named `a/b` stands in the range of `a`, and so may anything else: there is no prefix
        // that would keep it apart.
        let number = id_after(&service_prefix(prefix, service), key);
        if !number.is_some_and(is_decimal) {
            return Ok(Vec::new());
        }
        let address = std::str::from_utf8(value)
            .map_err(|_| DecodeError::new("the value is not an address: it is not UTF-8"))?;
        validate_address(address)
            .map_err(|_| DecodeError::new("the value is not an address (host:port)"))?;
        Ok(vec![Instance::new(service, address)])
    }
}

fn is_decimal(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// FNV-1a, made positive as lease ids are. It must stay the same for ever: it is in keys.
fn hash(id: &str) -> i64 {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = id.bytes().fold(OFFSET, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    });
    (hash & i64::MAX.unsigned_abs()).max(1).cast_signed()
}

#[cfg(test)]
mod tests {
    use super::super::laws::{in_range, read};
    use super::*;

    #[test]
    fn every_vector_is_written_byte_for_byte_and_read_field_for_field() {
        for (key, id) in [
            ("user.rpc/7587881534843123458", "7587881534843123458"),
            ("user.rpc/7", "7"),
        ] {
            let instance = Instance::new("user.rpc", "10.0.0.5:8080").id(id);
            assert_eq!(GoZero.key("", &instance), key);
            assert_eq!(GoZero.encode(&instance).unwrap(), b"10.0.0.5:8080");
            let read = read(&GoZero, "", "user.rpc", key, b"10.0.0.5:8080").unwrap();
            assert_eq!(read, [Instance::new("user.rpc", "10.0.0.5:8080")]);
        }
    }

    #[test]
    fn an_id_that_is_no_number_becomes_one_that_never_changes() {
        let key = |id: &str| GoZero.key("", &Instance::new("a", "h:1").id(id));
        assert_eq!(key("-5"), "a/-5");
        assert_eq!(key(&i64::MAX.to_string()), "a/9223372036854775807");
        // FNV-1a of "a" is 0xaf63dc4c8601ec8c, without its highest bit 3414815163700866188.
        assert_eq!(key("a"), "a/3414815163700866188");
        for id in ["007", "+7", "9223372036854775808", "10.0.0.5:8080", ""] {
            let key = key(id);
            let number: i64 = key.strip_prefix("a/").unwrap().parse().unwrap();
            assert!(number > 0, "{id}: {key}");
            assert_ne!(number, 7, "{id}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for value in [
            &b""[..],
            b"10.0.0.5",
            b"\xff:80",
            b"{\"Addr\":\"a:1\"}",
            b"a:1\n",
        ] {
            assert!(read(&GoZero, "", "a", "a/7", value).is_err(), "{value:?}");
        }
    }

    #[test]
    fn what_is_not_one_number_below_the_service_is_anothers() {
        for key in ["a/b/7", "a/7/8", "a/x", "a/", "a/-", "a/7x", "b/7"] {
            let read = read(&GoZero, "", "a", key, b"h:1");
            assert_eq!(read.unwrap(), [], "{key}");
        }
        for key in ["a/7", "a/-7"] {
            let read = read(&GoZero, "", "a", key, b"h:1");
            assert_eq!(read.unwrap().len(), 1, "{key}");
        }
    }

    #[test]
    fn a_service_does_not_show_another_with_a_longer_name() {
        assert!(in_range(&GoZero, "", "user.rpc", "user.rpc/7"));
        assert!(!in_range(&GoZero, "", "user.rpc", "user.rpc2/7"));
        assert!(!in_range(&GoZero, "", "user.rpc", "user.rpc"));
    }
}
