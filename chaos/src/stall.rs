//! Notices when this program, and so probably the machine, stalled. Nothing made progress during a
//! stall.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::record::{Clock, Disturbance, Extension, Scope};

/// The interval between two looks at the clock.
const TICK: Duration = Duration::from_millis(50);

/// A look later than this is a stall. A busy scheduler delays a look by tens of milliseconds.
const LATE: Duration = Duration::from_millis(100);

/// A stall longer than this is a disturbance: a lease of 3 s, renewed every second, is at risk from
/// half a second on.
const LATE_FOR_LEASES: Duration = Duration::from_millis(500);

/// Records stalls until dropped.
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
                    let mut found = into.lock();
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

    /// Start and end of each stall.
    pub fn all(&self) -> Vec<(Duration, Duration)> {
        let found = self.found.lock();
        found.clone()
    }

    /// The stalls that can affect leases and directories.
    pub fn long(&self) -> impl Iterator<Item = (Duration, Duration)> + use<> {
        let all = self.all().into_iter();
        all.filter(|(from, to)| *to - *from > TICK + LATE_FOR_LEASES)
    }

    /// Long stalls as disturbances of everything.
    pub fn disturbances(&self) -> impl Iterator<Item = Disturbance> + use<> {
        self.long().map(|(from, to)| Disturbance {
            from,
            to,
            scope: Scope::All,
        })
    }

    /// Long stalls as reasons why expired keys are still there.
    pub fn extensions(&self) -> impl Iterator<Item = Extension> + use<> {
        self.long()
            .map(|(from, to)| Extension::Standstill { from, to })
    }
}
