//! The close of the client.

use super::*;

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
