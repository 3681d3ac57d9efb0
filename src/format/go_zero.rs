//! go-zero's registrations.
//!
//! `user.rpc/7587881534843123458 => 10.0.0.5:8080`
//!
//! The value is the bare address, so a reader sees no weight, zone or metadata, and learns that an
//! instance drains only when its key is deleted. All keys with one address are one instance.

use std::time::Duration;

use super::codec::{DecodeError, Format};
use super::key::{KeyContext, KeyRange, id_after, service_prefix};
use crate::error::Result;
use crate::instance::{Instance, check_address};

/// go-zero's registrations (`core/discov`): keys are `service/number`, there is no default prefix,
/// the value is the bare address, and the default time to live is 10 s.
///
/// The format carries the address alone. Keys other than `service/number` belong to other services
/// and are not shown. The service's name is what go-zero calls the key (`user.rpc`). A go-zero key
/// with slashes is a prefix and a name: `/user.rpc` has the prefix `/`, and `a/user.rpc` the prefix
/// `a`.
///
/// In go-zero the number is the lease's id, or chosen by the publisher. Ours does not depend on
/// the lease, so that it stays the same when the lease is lost: the instance's id if that is a
/// decimal number of 64 bits, otherwise the id's hash (FNV-1a, 63 bits). Read back, an instance's
/// id is its address, because several keys may stand for one instance.
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
            // `+7` and `007` must not share the key of `7`.
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

    fn decode(&self, context: KeyContext<'_>, value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        // Without a prefix, the range of a service `a` also holds a service named `a/b`, and keys
        // of other software.
        let prefix = service_prefix(context.prefix, context.service);
        let number = id_after(&prefix, context.key);
        if !number.is_some_and(is_decimal) {
            return Ok(Vec::new());
        }
        let address = std::str::from_utf8(value)
            .map_err(|_| DecodeError::new("the value is not an address: not UTF-8"))?;
        check_address(address)
            .map_err(|reason| DecodeError::new(format!("the value is not an address: {reason}")))?;
        Ok(vec![Instance::new(context.service, address)])
    }
}

fn is_decimal(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// FNV-1a, made positive as lease ids are. Must never change, because it is part of keys in etcd.
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
    use super::super::properties::{decode, in_range};
    use super::*;

    #[test]
    fn vectors_encode_and_decode_exactly() {
        for (key, id) in [
            ("user.rpc/7587881534843123458", "7587881534843123458"),
            ("user.rpc/7", "7"),
        ] {
            let instance = Instance::new("user.rpc", "10.0.0.5:8080").id(id);
            assert_eq!(GoZero.key("", &instance), key);
            assert_eq!(GoZero.encode(&instance).unwrap(), b"10.0.0.5:8080");
            let decoded = decode(&GoZero, "", "user.rpc", key, b"10.0.0.5:8080").unwrap();
            assert_eq!(decoded, [Instance::new("user.rpc", "10.0.0.5:8080")]);
        }
    }

    #[test]
    fn non_numeric_id_becomes_a_stable_number() {
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
    fn refuses_values_that_are_not_addresses() {
        for value in [
            &b""[..],
            b"10.0.0.5",
            b"\xff:80",
            b"{\"Addr\":\"a:1\"}",
            b"a:1\n",
        ] {
            assert!(decode(&GoZero, "", "a", "a/7", value).is_err(), "{value:?}");
        }
    }

    #[test]
    fn ignores_keys_other_than_service_and_number() {
        for key in ["a/b/7", "a/7/8", "a/x", "a/", "a/-", "a/7x", "b/7"] {
            let decoded = decode(&GoZero, "", "a", key, b"h:1");
            assert_eq!(decoded.unwrap(), [], "{key}");
        }
        for key in ["a/7", "a/-7"] {
            let decoded = decode(&GoZero, "", "a", key, b"h:1");
            assert_eq!(decoded.unwrap().len(), 1, "{key}");
        }
    }

    #[test]
    fn range_excludes_services_with_a_longer_name() {
        assert!(in_range(&GoZero, "", "user.rpc", "user.rpc/7"));
        assert!(!in_range(&GoZero, "", "user.rpc", "user.rpc2/7"));
        assert!(!in_range(&GoZero, "", "user.rpc", "user.rpc"));
    }
}
