//! The close of the client.

use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};

use tokio::sync::watch;

use super::*;
use crate::registrar::state::status::Status;

/// Reads a status whenever the status changes, as a caller on another thread may.
struct Observer {
    status: watch::Receiver<Status>,
    seen: Mutex<Vec<(bool, Option<Error>)>>,
}

impl Wake for Observer {
    fn wake(self: Arc<Self>) {
        let status = self.status.borrow();
        let seen = (status.terminal, status.error.clone());
        self.seen.lock().unwrap().push(seen);
    }
}

#[test]
fn end_and_its_error_are_seen_at_once() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    let observer = Arc::new(Observer {
        status: handle.status.clone(),
        seen: Mutex::default(),
    });
    let waker = Waker::from(Arc::clone(&observer));
    let mut status = handle.status.clone();
    status.mark_unchanged();
    let mut change = pin!(status.changed());
    let waiting = change.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(waiting.is_pending());
    harness.close_client();
    let seen = observer.seen.lock().unwrap();
    assert!(
        matches!(seen[..], [(true, Some(Error::Closed { .. }))]),
        "{seen:?}"
    );
}

#[test]
fn entries_and_later_requests_report_it() {
    let (mut harness, [handle]) = Harness::with_registered(["a"]);
    harness.close_client();
    let is_closed = |error: &Error| matches!(error, Error::Closed { .. });
    assert!(handle.status.borrow().error.as_ref().is_some_and(is_closed));
    assert!(is_recovering(&handle));
    let again = harness.register_keys(["b"]);
    assert!(again.is_err_and(|error| is_closed(&error)));
    assert_eq!(harness.idle(), None);
}
