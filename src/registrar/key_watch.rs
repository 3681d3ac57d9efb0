//! Watches the registrar's own keys, so that changes by other clients are noticed at once.
//!
//! Each key has its own watch. A watch of the service's prefix would bring every server the events
//! of all other servers.

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::state::{KeyEvent, StoredKey};
use crate::backoff::Backoff;
use crate::client::{Client, EventType, RawWatch, WatchOptions, WatchResponse};
use crate::error::Error;

/// The number of events that wait for the reconciler. When the buffer is full the watches pause,
/// and no event is lost.
const EVENT_BUFFER: usize = 64;

/// The watches of a set of keys.
pub(super) struct KeyWatches {
    client: Client,
    watches: BTreeMap<String, AbortOnDropHandle<()>>,
    events_tx: mpsc::Sender<(String, KeyEvent)>,
    events: mpsc::Receiver<(String, KeyEvent)>,
}

impl KeyWatches {
    pub(super) fn new(client: Client) -> Self {
        let (events_tx, events) = mpsc::channel(EVENT_BUFFER);
        Self {
            client,
            watches: BTreeMap::new(),
            events_tx,
            events,
        }
    }

    /// Starts watches of new keys, and ends those of keys that are not in `keys`.
    pub(super) fn set_keys(&mut self, keys: &BTreeSet<String>) {
        self.watches.retain(|key, _| keys.contains(key));
        for key in keys {
            if !self.watches.contains_key(key) {
                let task = watch(self.client.clone(), key.clone(), self.events_tx.clone());
                let handle = AbortOnDropHandle::new(tokio::spawn(task));
                self.watches.insert(key.clone(), handle);
            }
        }
    }

    /// The next event, and its key.
    pub(super) async fn next(&mut self) -> (String, KeyEvent) {
        match self.events.recv().await {
            Some(event) => event,
            // Unreachable, because `events_tx` keeps the channel open.
            None => pending().await,
        }
    }
}

/// Watches one key until the client is closed. After a loss the watch starts again at the current
/// revision. The [`KeyEvent::Started`] of each start makes the reconciler read the key, which
/// covers every change in between, even a wiped etcd.
async fn watch(client: Client, key: String, events: mpsc::Sender<(String, KeyEvent)>) {
    let mut backoff = Backoff::for_etcd();
    loop {
        let error = match client.open_watch(key.as_str(), &WatchOptions::new()).await {
            Ok(mut watch) => {
                backoff.reset();
                forward_events(&mut watch, &key, &events).await
            }
            Err(error) => error,
        };
        if matches!(error, Error::Closed { .. }) {
            return;
        }
        tracing::debug!(key, %error, "the watch of a registered key was lost");
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Sends the events of a watch until it fails.
async fn forward_events(
    watch: &mut RawWatch,
    key: &str,
    events: &mpsc::Sender<(String, KeyEvent)>,
) -> Error {
    let mut event = KeyEvent::Started;
    loop {
        // Fails only when the driver has ended, which also aborts this task.
        drop(events.send((key.to_owned(), event)).await);
        event = loop {
            match watch.next().await {
                Ok(response) => {
                    if let Some(event) = latest_change(&response) {
                        break event;
                    }
                }
                Err(error) => return error,
            }
        };
    }
}

/// The last change in a response, which makes earlier changes obsolete.
fn latest_change(response: &WatchResponse) -> Option<KeyEvent> {
    let event = response.events().last()?;
    let kv = event.kv()?;
    Some(KeyEvent::Changed {
        revision: kv.mod_revision(),
        stored: (event.event_type() == EventType::Put).then(|| StoredKey::from(kv)),
    })
}
