//! Watches the registrar's own keys, so that what others do to them is noticed at once.
//!
//! One watch for each key: that of a whole service would bring every server the news of all the others.

use std::collections::BTreeMap;
use std::future::pending;

use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::state::{Heard, Held};
use crate::backoff::Backoff;
use crate::client::{Client, EventType};
use crate::client::{RawWatch, WatchOptions};
use crate::error::Error;

/// The watches, and what they tell.
pub(super) struct KeyWatches {
    client: Client,
    watches: BTreeMap<String, AbortOnDropHandle<()>>,
    tell: mpsc::Sender<(String, Heard)>,
    told: mpsc::Receiver<(String, Heard)>,
}

/// How much may be told before it is taken: with more, the watches wait, which costs nothing.
const EVENT_BUFFER: usize = 64;

impl KeyWatches {
    pub(super) fn new(client: Client) -> Self {
        let (tell, told) = mpsc::channel(EVENT_BUFFER);
        Self {
            client,
            watches: BTreeMap::new(),
            tell,
            told,
        }
    }

    /// Watches these keys, and no others.
    pub(super) fn set_keys(&mut self, keys: &std::collections::BTreeSet<String>) {
        self.watches.retain(|key, _| keys.contains(key));
        for key in keys {
            if !self.watches.contains_key(key) {
                let watch = watch(self.client.clone(), key.clone(), self.tell.clone());
                let handle = AbortOnDropHandle::new(tokio::spawn(watch));
                self.watches.insert(key.clone(), handle);
            }
        }
    }

    /// What is told next.
    pub(super) async fn next(&mut self) -> (String, Heard) {
        match self.told.recv().await {
            Some(told) => told,
            // Never, since a sender is kept.
            None => pending().await,
        }
    }
}

/// A watch that was lost is begun anew at the present, and the key is to be looked at then: that holds
/// whatever happened in between, also if etcd was wiped.
async fn watch(client: Client, key: String, tell: mpsc::Sender<(String, Heard)>) {
    let mut pauses = Backoff::for_etcd();
    loop {
        let error = match client.open_watch(key.as_str(), &WatchOptions::new()).await {
            Ok(mut watch) => {
                pauses.reset();
                listen(&mut watch, &key, &tell).await
            }
            Err(error) => error,
        };
        if matches!(error, Error::Closed { .. }) {
            return;
        }
        tracing::debug!(key, %error, "registrar: a key is not watched");
        tokio::time::sleep(pauses.next()).await;
    }
}

async fn listen(watch: &mut RawWatch, key: &str, tell: &mpsc::Sender<(String, Heard)>) -> Error {
    let mut heard = Heard::Begun;
    loop {
        // Nobody listens any more: the task is about to end.
        drop(tell.send((key.to_owned(), heard)).await);
        heard = loop {
            let response = match watch.next().await {
                Ok(response) => response,
                Err(error) => return error,
            };
            // What it was in between is over.
            if let Some(event) = response.events().last()
                && let Some(kv) = event.kv()
            {
                let held = (event.event_type() == EventType::Put).then(|| Held {
                    lease: kv.lease(),
                    mod_revision: kv.mod_revision(),
                    value: kv.value().to_vec(),
                });
                let revision = kv.mod_revision();
                break Heard::Changed { revision, held };
            }
        };
    }
}
