//! What a format has no place for travels in its metadata, under names that are reserved for that.
//!
//! | name | field | as |
//! |---|---|---|
//! | `id` | [`Instance::id`] | text, where it is not the address |
//! | `status` | [`Instance::draining`] | `draining` |
//! | `tls` | [`Instance::tls`] | `true` or `false` |
//! | `version` | [`Instance::version`] | text |
//! | `weight` | [`Instance::weight`] | a decimal number, where it is not 100 |
//! | `zone` | [`Instance::zone`] | text |
//!
//! [`Instance::validate`] refuses these names as free metadata, so that nothing is written twice.

use std::collections::BTreeMap;

use crate::instance::DEFAULT_WEIGHT;
use crate::instance::Instance;

pub(super) const ID: &str = "id";
pub(super) const STATUS: &str = "status";
pub(super) const TLS: &str = "tls";
pub(super) const VERSION: &str = "version";
pub(super) const WEIGHT: &str = "weight";
pub(super) const ZONE: &str = "zone";

/// The value of `status` of an instance that is about to leave.
pub(super) const DRAINING: &str = "draining";

/// The instance's metadata, and beside it every field that is not as it is by default. The format
/// takes out what it has a place for.
pub(super) fn all(instance: &Instance) -> BTreeMap<String, String> {
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
    if instance.weight != DEFAULT_WEIGHT {
        put(WEIGHT, instance.weight.to_string());
    }
    if let Some(zone) = &instance.zone {
        put(ZONE, zone.clone());
    }
    map
}

/// Takes metadata into the fields that it carries, except those in `placed`, which the format has a
/// place of its own for; and everything else as it is: what another writer means by `weight` may not
/// be ours, and then it must not be lost.
pub(super) fn take(instance: &mut Instance, map: BTreeMap<String, String>, placed: &[&str]) {
    for (name, value) in map {
        let known = match name.as_str() {
            placed_elsewhere if placed.contains(&placed_elsewhere) => false,
            ID => set(&mut instance.id, (!value.is_empty()).then(|| value.clone())),
            STATUS => set(&mut instance.draining, (value == DRAINING).then_some(true)),
            TLS => set(&mut instance.tls, value.parse().ok().map(Some)),
            VERSION => set(&mut instance.version, Some(Some(value.clone()))),
            WEIGHT => set(&mut instance.weight, value.parse().ok()),
            ZONE => set(&mut instance.zone, Some(Some(value.clone()))),
            _ => false,
        };
        if !known {
            instance.metadata.insert(name, value);
        }
    }
}

fn set<T>(field: &mut T, value: Option<T>) -> bool {
    value.map(|value| *field = value).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_carried_and_what_is_as_by_default_is_not() {
        let plain = Instance::new("a", "h:1").metadata("k", "v");
        assert_eq!(all(&plain), plain.metadata);
        let full = plain
            .id("i")
            .weight(0)
            .zone("")
            .version("1")
            .draining(true)
            .tls(false);
        let carried = all(&full);
        assert_eq!(carried.len(), 7);
        let mut read = Instance::new("a", "h:1");
        take(&mut read, carried, &[]);
        assert_eq!(read, full);
    }

    #[test]
    fn what_is_not_ours_stays_as_it_is() {
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
        let mut read = Instance::new("a", "h:1");
        take(&mut read, foreign.clone(), &[ZONE]);
        let mut expected = Instance::new("a", "h:1");
        expected.metadata = foreign;
        assert_eq!(read, expected);
    }
}
