//! The settings of a registrar.

use std::time::Duration;

use super::state::{Records, TargetRecords};
use crate::error::{Error, Result};
use crate::format::Layout;
use crate::instance::Instance;

#[derive(Debug)]
pub(super) struct RegistrarSettings {
    pub(super) ttl: Duration,
    pub(super) layouts: Vec<Layout>,
    pub(super) leave_grace: Duration,
}

impl RegistrarSettings {
    /// Encodes an instance as one record per format.
    pub(super) fn encode(&self, instance: &Instance) -> Result<TargetRecords> {
        let layouts = self.layouts.iter();
        let records: Records = layouts
            .map(|layout| layout.encode(instance))
            .collect::<Result<_>>()?;
        for (index, (key, _)) in records.iter().enumerate() {
            if records[..index].iter().any(|(other, _)| other == key) {
                let reason =
                    "two formats of the registrar write this key; set another prefix for one";
                return Err(Error::invalid("key", key, reason));
            }
        }
        Ok(TargetRecords {
            records,
            draining: instance.draining,
        })
    }

    /// Whether every format can mark the instance as draining.
    pub(super) fn can_mark_draining(&self, instance: &Instance) -> bool {
        let encode = |draining| self.encode(&instance.clone().draining(draining));
        let (Ok(draining), Ok(serving)) = (encode(true), encode(false)) else {
            return false;
        };
        let mut pairs = draining.records.iter().zip(&serving.records);
        pairs.all(|(draining, serving)| draining != serving)
    }
}
