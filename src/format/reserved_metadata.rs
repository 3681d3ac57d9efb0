//! Metadata names for the fields of an instance that a format has no field for.
//!
//! | name | field | value |
//! |---|---|---|
//! | `id` | [`Instance::id`] | text, if the id is not the address |
//! | `status` | [`Instance::draining`] | `draining` |
//! | `tls` | [`Instance::tls`] | `true` or `false` |
//! | `version` | [`Instance::version`] | text |
//! | `weight` | [`Instance::weight`] | a decimal number, if it is not 100 |
//! | `zone` | [`Instance::zone`] | text |
//!
//! [`Instance::validate`] refuses these names as metadata of the user, so that no name is written
//! twice.

use std::collections::BTreeMap;

use crate::instance::Instance;

pub(super) const ID: &str = "id";
pub(super) const STATUS: &str = "status";
pub(super) const TLS: &str = "tls";
pub(super) const VERSION: &str = "version";
pub(super) const WEIGHT: &str = "weight";
pub(super) const ZONE: &str = "zone";

/// The value of `status` for a draining instance.
pub(super) const DRAINING: &str = "draining";

/// The instance's metadata, plus every field that differs from its default. The format removes the
/// names that it has fields for.
pub(super) fn encode(instance: &Instance) -> BTreeMap<String, String> {
    let mut map = instance.metadata.clone();
    let mut put = |name: &str, value: String| map.insert(name.to_owned(), value);
    if instance.id != instance.address {
        put(ID, instance.id.clone());
    }
    if instance.draining {
        put(STATUS, DRAINING.to_owned());
    }
    if let Some(tls) = instance.tls {
        put(TLS, tls.to_string());
    }
    if let Some(version) = &instance.version {
        put(VERSION, version.clone());
    }
    if instance.weight != Instance::DEFAULT_WEIGHT {
        put(WEIGHT, instance.weight.to_string());
    }
    if let Some(zone) = &instance.zone {
        put(ZONE, zone.clone());
    }
    map
}

/// Moves metadata into the instance: reserved names into their fields, other names into
/// `instance.metadata`. The names in `except` count as not reserved, because the format itself has
/// fields for them.
///
/// A reserved name whose value we cannot read stays in the metadata: another writer may mean
/// something else by `weight`, and its value must not be lost.
pub(super) fn decode(instance: &mut Instance, map: BTreeMap<String, String>, except: &[&str]) {
    for (name, value) in map {
        let is_read = match name.as_str() {
            name if except.contains(&name) => false,
            ID => set(&mut instance.id, (!value.is_empty()).then(|| value.clone())),
            STATUS => set(&mut instance.draining, (value == DRAINING).then_some(true)),
            TLS => set(&mut instance.tls, value.parse().ok().map(Some)),
            VERSION => set(&mut instance.version, Some(Some(value.clone()))),
            WEIGHT => set(&mut instance.weight, value.parse().ok()),
            ZONE => set(&mut instance.zone, Some(Some(value.clone()))),
            _ => false,
        };
        if !is_read {
            instance.metadata.insert(name, value);
        }
    }
}

/// Sets a field if there is a value for it, and returns whether there is.
fn set<T>(field: &mut T, value: Option<T>) -> bool {
    value.map(|value| *field = value).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_carried_unless_default() {
        let plain = Instance::new("a", "h:1").metadata("k", "v");
        assert_eq!(encode(&plain), plain.metadata);
        let full = plain
            .id("i")
            .weight(0)
            .zone("")
            .version("1")
            .draining(true)
            .tls(false);
        let encoded = encode(&full);
        assert_eq!(encoded.len(), 7);
        let mut decoded = Instance::new("a", "h:1");
        decode(&mut decoded, encoded, &[]);
        assert_eq!(decoded, full);
    }

    #[test]
    fn unreadable_values_stay_in_the_metadata() {
        let foreign = BTreeMap::from(
            [
                (ID, ""),
                (STATUS, "up"),
                (TLS, "1.3"),
                (WEIGHT, "-1"),
                (ZONE, "z"),
            ]
            .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        let mut decoded = Instance::new("a", "h:1");
        decode(&mut decoded, foreign.clone(), &[ZONE]);
        let mut expected = Instance::new("a", "h:1");
        expected.metadata = foreign;
        assert_eq!(decoded, expected);
    }
}
