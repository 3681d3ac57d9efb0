//! Notices when this program, and so most likely the machine, stood still: what should have happened
//! meanwhile did not have its time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::record::{Clock, Disturbance, Extension, Whom};

/// How often it looks at the clock.
const TICK: Duration = Duration::from_millis(50);

/// How late a look must be to be told. A busy scheduler makes one wait for tens of milliseconds.
const LATE: Duration = Duration::from_millis(100);

/// How late it must be to disturb: leases of 3 s that are renewed every second feel half of one.
const LATE_FOR_LEASES: Duration = Duration::from_millis(500);

/// Looks for as long as it is held.
pub struct Stalls {
    found: Arc<Mutex<Vec<(Duration, Duration)>>>,
    _task: AbortOnDropHandle<()>,
}

impl Stalls {
    pub fn watch(clock: Clock) -> Self {
        let found = Arc::<Mutex<Vec<_>>>::default();
        let into = Arc::clone(&found);
        let task = tokio::spawn(async move {
            let mut before = clock.now();
            loop {
                sleep(TICK).await;
                let now = clock.now();
                if now - before > TICK + LATE {
                    let mut found = into.lock().unwrap_or_else(PoisonError::into_inner);
                    found.push((before, now));
                }
                before = now;
            }
        });
        Self {
            found,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// From when to when, each.
    pub fn all(&self) -> Vec<(Duration, Duration)> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.clone()
    }

    /// Those that leases and directories feel.
    pub fn long(&self) -> impl Iterator<Item = (Duration, Duration)> + use<> {
        let all = self.all().into_iter();
        all.filter(|(from, to)| *to - *from > TICK + LATE_FOR_LEASES)
    }

    /// Nobody can be expected to be as they should be.
    pub fn disturbances(&self) -> impl Iterator<Item = Disturbance> + use<> {
        self.long().map(|(from, to)| Disturbance {
            from,
            to,
            whom: Whom::Everybody,
        })
    }

    /// What is over stays where it is.
    pub fn extensions(&self) -> impl Iterator<Item = Extension> + use<> {
        self.long()
            .map(|(from, to)| Extension::Standstill { from, to })
    }
}
