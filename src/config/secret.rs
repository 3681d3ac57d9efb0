//! Deserializers for secrets, whose errors do not quote the value.
//!
//! serde's own errors quote it: "invalid type: integer `81726354`, expected a string".

use serde::de::{Deserialize, Deserializer, Error};

fn deserialize<'de, D: Deserializer<'de>>(
    from: D,
    field: &str,
) -> Result<Option<String>, D::Error> {
    Option::<String>::deserialize(from).map_err(|_| {
        D::Error::custom(format_args!(
            "invalid {field}: expected a string; a number or a date needs quotes"
        ))
    })
}

pub(super) fn password<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    deserialize(from, "password")
}

pub(super) fn ca_pem<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    deserialize(from, "tls_config.ca_pem")
}

pub(super) fn cert_pem<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    deserialize(from, "tls_config.cert_pem")
}

pub(super) fn key_pem<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    deserialize(from, "tls_config.key_pem")
}
