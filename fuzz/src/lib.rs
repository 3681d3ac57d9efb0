#![forbid(unsafe_code)]
//! What each fuzz target checks of its format.

use goo_etcd::format::Format;

const SERVICE: &str = "svc";

/// Decodes `data` as a value of the format; before the first NUL byte, if there is one, is the end of
/// its key. It must be an error or instances, and each instance that could be registered must be
/// written and read back as it is. `carries` says what is carried of it.
pub fn check(
    format: &dyn Format,
    data: &[u8],
    carries: impl Fn(&goo_etcd::Instance) -> goo_etcd::Instance,
) {
    let (id, value) = match data.iter().position(|byte| *byte == 0) {
        Some(at) => (&data[..at], &data[at + 1..]),
        None => (&b"1"[..], data),
    };
    let prefix = format.default_prefix();
    let key = [&format.range(prefix, SERVICE).start[..], id].concat();
    let Ok(instances) = format.decode(prefix, SERVICE, &key, value) else {
        return;
    };
    for instance in instances {
        assert_eq!(instance.service, SERVICE);
        if instance.validate().is_err() {
            continue;
        }
        let key = format.key(prefix, &instance);
        // A Unix socket does not fit everywhere.
        let Ok(value) = format.encode(&instance) else {
            assert!(instance.address.starts_with("unix:"), "{instance:?}");
            continue;
        };
        let again = format
            .decode(prefix, SERVICE, key.as_bytes(), &value)
            .expect("what was written can be read");
        assert_eq!(again, [carries(&instance)]);
    }
}
