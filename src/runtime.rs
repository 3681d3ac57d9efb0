//! The Tokio runtime that timers and background tasks need.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::{Instant, Sleep, Timeout, sleep, timeout_at};
use tonic::Status;

use crate::error::{Error, Result};

/// Whether the current thread is inside a runtime.
pub(crate) fn is_entered() -> bool {
    // A look at the task's id is cheaper than a clone of the handle, but the main future of a
    // runtime has no id.
    tokio::task::try_id().is_some() || Handle::try_current().is_ok()
}

/// Fails outside of a runtime and on one without timers, where timers and tasks would panic.
pub(crate) fn require(operation: impl Fn() -> String) -> Result<()> {
    let remedy = if !is_entered() {
        "; call it in an async function that Tokio runs, or after `Handle::enter`"
    } else if !has_timers() {
        " with timers; call `enable_all` on the runtime's builder"
    } else {
        return Ok(());
    };
    Err(Error::NoRuntime {
        operation: operation(),
        remedy,
    })
}

/// [`require`] for a channel. Fails as well on a runtime without I/O, where every attempt to open a
/// socket would panic, unless the user's connector opens them.
pub(crate) fn require_for_channel(needs_io: bool) -> Result<()> {
    let operation = || "building a channel".to_owned();
    require(operation)?;
    // Tokio offers no other way to ask. A lack of file descriptors shows later.
    if !needs_io || catch_unwind(|| drop(UnixStream::pair())).is_ok() {
        return Ok(());
    }
    Err(Error::NoRuntime {
        operation: operation(),
        remedy: " with I/O; call `enable_all` on the runtime's builder",
    })
}

/// Whether the current runtime has timers. Tokio offers no other way to ask.
fn has_timers() -> bool {
    catch_unwind(|| drop(sleep(Duration::ZERO))).is_ok()
}

/// Fails outside of a runtime. `part` is the part of a call on a channel that needs the runtime.
pub(crate) fn require_for_call(part: &str) -> Result<(), Status> {
    if is_entered() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "{part} needs a Tokio runtime; make the call in an async function that Tokio runs"
    )))
}

/// [`timeout_at`] for a `part` of a call. Fails where there are no timers.
pub(crate) fn timeout_at_for_call<F: Future>(
    part: &str,
    deadline: Instant,
    future: F,
) -> Result<Timeout<F>, Status> {
    timer_for_call(part, || timeout_at(deadline, future))
}

/// [`sleep`] for a `part` of a call. Fails where there are no timers.
pub(crate) fn sleep_for_call(part: &str, duration: Duration) -> Result<Sleep, Status> {
    timer_for_call(part, || sleep(duration))
}

/// Makes a timer, which is the cheapest way to find out whether that is possible.
fn timer_for_call<T>(part: &str, make: impl FnOnce() -> T) -> Result<T, Status> {
    require_for_call(part)?;
    catch_unwind(AssertUnwindSafe(make)).map_err(|_| {
        Status::failed_precondition(format!(
            "{part} needs a Tokio runtime with timers; call `enable_all` on the runtime's builder"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_entered_only_inside_of_a_runtime() {
        assert!(!is_entered());
        let error = require(|| "build".to_owned()).unwrap_err();
        assert!(matches!(error, Error::NoRuntime { .. }), "{error}");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            assert!(is_entered());
            assert!(tokio::spawn(async { is_entered() }).await.unwrap());
        });
        let _entered = runtime.enter();
        assert!(require(String::new).is_ok());
    }

    #[test]
    fn runtime_without_timers_is_refused() {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.build().unwrap();
        let entered = runtime.enter();
        let error = require(|| "building".to_owned()).unwrap_err();
        let message = error.to_string();
        let expected = "building needs a Tokio runtime with timers";
        assert!(message.contains(expected), "{message}");

        let soon = Instant::now() + Duration::from_secs(1);
        let waiting = timeout_at_for_call("a wait", soon, std::future::pending::<()>());
        let status = waiting.unwrap_err();
        let expected = "a wait needs a Tokio runtime with timers";
        assert!(status.message().contains(expected), "{status}");
        assert!(sleep_for_call("a pause", Duration::ZERO).is_err());
        drop(entered);
        let runtime = builder.enable_time().build().unwrap();
        let _entered = runtime.enter();
        assert!(require(String::new).is_ok());
    }
}
