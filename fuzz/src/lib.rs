#![forbid(unsafe_code)]
//! The check that each fuzz target runs on its format.

use goo_etcd::Instance;
use goo_etcd::format::{DecodeError, Format, KeyContext};

const SERVICE: &str = "svc";

/// Decodes `data` as a value of the format. If `data` has a NUL byte, the bytes before the first
/// one are the end of the key instead.
///
/// Decoding must fail or return instances. Each valid instance must come back unchanged when it is
/// encoded and decoded again, as far as the format carries it: `carried` returns that part.
pub fn check(format: &dyn Format, data: &[u8], carried: impl Fn(&Instance) -> Instance) {
    let (id, value) = match data.iter().position(|byte| *byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (&b"1"[..], data),
    };
    let prefix = format.default_prefix();
    let key = [&format.range(prefix, SERVICE).start[..], id].concat();
    let Ok(instances) = decode(format, &key, value) else {
        return;
    };
    for instance in instances {
        assert_eq!(instance.service, SERVICE);
        if instance.validate().is_err() {
            continue;
        }
        let key = format.key(prefix, &instance);
        // Not every format can carry a Unix socket.
        let Ok(value) = format.encode(&instance) else {
            assert!(instance.address.starts_with("unix:"), "{instance:?}");
            continue;
        };
        let again =
            decode(format, key.as_bytes(), &value).expect("an encoded instance can be decoded");
        assert_eq!(again, [carried(&instance)]);
    }
}

fn decode(format: &dyn Format, key: &[u8], value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
    let context = KeyContext::new(format.default_prefix(), SERVICE, key);
    format.decode(context, value)
}
