//! The decoded keys of one layout.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use super::event::{Fingerprint, KeyValueAt};
use crate::format::{DecodeError, Format, KeyContext, KeyRange};
use crate::instance::{Instance, uncallable_reason};
use crate::snapshot::InstanceKey;

/// The decoded keys of a range, by their key in etcd.
pub(super) type Keys = BTreeMap<Vec<u8>, DecodedKey>;

/// The last good value of one key.
#[derive(Debug, Clone)]
pub(super) struct DecodedKey {
    create_revision: i64,
    pub(super) mod_revision: i64,
    /// The instances in the value, each with its key in the snapshot.
    pub(super) instances: Vec<(InstanceKey, Arc<Instance>)>,
    /// Whether the newest value could not be decoded or has an address that nobody can call, so
    /// that `instances` come from an older value, at least in part.
    pub(super) undecodable: bool,
}

pub(super) fn fingerprint(keys: &Keys) -> Fingerprint {
    let newest = keys.values().map(|key| key.mod_revision).max();
    Fingerprint {
        count: i64::try_from(keys.len()).unwrap_or(i64::MAX),
        newest: newest.unwrap_or_default(),
    }
}

pub(super) fn count_undecodable(keys: &Keys) -> usize {
    keys.values().filter(|key| key.undecodable).count()
}

/// The snapshot key of an instance that is identified by its address: the address itself, with IP
/// addresses in their canonical form.
pub(super) fn address_key(instance: &Instance) -> InstanceKey {
    match instance.address.parse::<SocketAddr>() {
        Ok(address) => InstanceKey::new(address.to_string()),
        Err(_) => InstanceKey::new(instance.address.as_str()),
    }
}

/// Decodes the keys of one service in one format under one prefix.
#[derive(Debug)]
pub(super) struct Decoder {
    format: Arc<dyn Format>,
    prefix: String,
    service: String,
    by_address: bool,
}

impl Decoder {
    pub(super) fn new(format: Arc<dyn Format>, prefix: String, service: String) -> Self {
        Self {
            by_address: format.merges_by_address(),
            format,
            prefix,
            service,
        }
    }

    /// Identifies instances by address even if the format identifies them by key.
    pub(super) fn by_address(mut self) -> Self {
        self.by_address = true;
        self
    }

    pub(super) fn is_by_address(&self) -> bool {
        self.by_address
    }

    pub(super) fn format_name(&self) -> &'static str {
        self.format.name()
    }

    pub(super) fn service(&self) -> &str {
        &self.service
    }

    /// The range of keys that holds the service.
    pub(super) fn range(&self) -> KeyRange {
        self.format.range(&self.prefix, &self.service)
    }

    /// Decodes an entry into `keys`. A value that cannot be decoded leaves the key's last good
    /// value in force, because a typing error must not take a server away from its clients. So does
    /// an address that nobody can call: clients of `0.0.0.0` would call themselves.
    ///
    /// A list starts with empty `keys`, so the last good value may be in `earlier`. A key that was
    /// deleted and created again has no last good value.
    pub(super) fn upsert(&self, keys: &mut Keys, earlier: Option<&Keys>, entry: KeyValueAt) {
        let KeyValueAt {
            key,
            create_revision,
            mod_revision,
            value,
        } = entry;
        let before = keys.remove(&key).or_else(|| earlier?.get(&key).cloned());
        let value = value.as_deref().unwrap_or_default();
        let last_good = before
            .as_ref()
            .filter(|before| before.create_revision == create_revision);
        let (instances, error) = match self.decode(&key, value) {
            Ok(decoded) => {
                let decoded = self.assign_keys(&key, decoded, before.as_ref());
                replace_uncallable(decoded, last_good)
            }
            Err(error) => {
                let kept = last_good.map(|before| before.instances.clone());
                (kept.unwrap_or_default(), Some(error))
            }
        };
        if let Some(error) = &error {
            let is_logged = last_good
                .is_some_and(|before| before.undecodable && before.mod_revision == mod_revision);
            if !is_logged {
                tracing::warn!(
                    key = %String::from_utf8_lossy(&key),
                    mod_revision,
                    format = self.format.name(),
                    kept_last_good = !instances.is_empty(),
                    %error,
                    "ignoring a value in etcd that cannot be used"
                );
            }
        }
        let decoded = DecodedKey {
            create_revision,
            mod_revision,
            instances,
            undecodable: error.is_some(),
        };
        keys.insert(key, decoded);
    }

    /// Decodes a value. A panic of the format counts as a decoding error, because one bad value
    /// must not end the task that follows all the others.
    fn decode(&self, key: &[u8], value: &[u8]) -> Result<Vec<Instance>, DecodeError> {
        let context = KeyContext::new(&self.prefix, &self.service, key);
        let decode = || self.format.decode(context, value);
        // Unwind-safe: the closure only reads, so a panic cannot leave our data half changed.
        std::panic::catch_unwind(AssertUnwindSafe(decode))
            .unwrap_or_else(|_| Err(DecodeError::new("the format panicked")))
    }

    /// Gives each instance its key. An instance that equals the one before it keeps that one's
    /// allocation, which makes comparing snapshots cheap.
    fn assign_keys(
        &self,
        key: &[u8],
        instances: Vec<Instance>,
        before: Option<&DecodedKey>,
    ) -> Vec<(InstanceKey, Arc<Instance>)> {
        let before = before.map_or(&[][..], |before| &before.instances);
        // A multi-instance format marks a single instance as well, so that its key does not change
        // when another instance joins or leaves the value.
        let is_multi_instance = self.format.is_multi_instance() || instances.len() > 1;
        instances
            .into_iter()
            .enumerate()
            .map(|(index, instance)| {
                let instance = match before.get(index) {
                    Some((_, same)) if **same == instance => Arc::clone(same),
                    _ => Arc::new(instance),
                };
                let key = self.instance_key(key, is_multi_instance, &instance);
                (key, instance)
            })
            .collect()
    }

    fn instance_key(
        &self,
        key: &[u8],
        is_multi_instance: bool,
        instance: &Instance,
    ) -> InstanceKey {
        if self.by_address {
            return address_key(instance);
        }
        let key = String::from_utf8_lossy(key);
        if is_multi_instance {
            InstanceKey::new(format!("{key}#{}", instance.address))
        } else {
            InstanceKey::new(key)
        }
    }
}

/// Takes instances with an address that nobody can call out of a decoded value, and puts their last
/// good versions in their place. The error says why an address was refused.
fn replace_uncallable(
    decoded: Vec<(InstanceKey, Arc<Instance>)>,
    last_good: Option<&DecodedKey>,
) -> (Vec<(InstanceKey, Arc<Instance>)>, Option<DecodeError>) {
    let reason_of = |instance: &Instance| uncallable_reason(&instance.address);
    let is_callable = |(_, instance): &(_, Arc<Instance>)| reason_of(instance).is_none();
    let last_good = last_good.map_or(&[][..], |before| &before.instances);
    let is_single = decoded.len() == 1 && last_good.len() == 1;
    let (mut callable, refused): (Vec<_>, Vec<_>) = decoded.into_iter().partition(is_callable);
    let Some(reason) = refused.first().and_then(|(_, first)| reason_of(first)) else {
        return (callable, None);
    };
    for (key, instance) in last_good {
        // The ids of single instances are not compared, because an id may be an address.
        let is_refused = is_single || refused.iter().any(|(_, now)| now.id == instance.id);
        if is_refused && !callable.iter().any(|(other, _)| other == key) {
            callable.push((key.clone(), Arc::clone(instance)));
        }
    }
    let error = DecodeError::new(format!("the address cannot be called: {reason}"));
    (callable, Some(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_key_normalizes_ip_addresses() {
        let key = |address: &str| address_key(&Instance::new("a", address));
        assert_eq!(key("[::1]:80"), key("[0:0:0::0:1]:80"));
        assert_ne!(key("[::1]:80"), key("[::1]:81"));
        assert_eq!(key("host:80").as_str(), "host:80");
    }
}
