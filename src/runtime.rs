//! The Tokio runtime that timers and background tasks need.

use std::time::Duration;

use tokio::runtime::Handle;

use tonic::Status;

use crate::error::{Error, Result};

/// Whether the current thread is inside a runtime.
pub(crate) fn is_entered() -> bool {
    // A look at the task's id is cheaper than a clone of the handle, but the main future of a
    // runtime has no id.
    tokio::task::try_id().is_some() || Handle::try_current().is_ok()
}

/// Fails outside of a runtime, where timers and tasks would panic.
pub(crate) fn require(operation: impl FnOnce() -> String) -> Result<()> {
    if is_entered() {
        return Ok(());
    }
    Err(Error::NoRuntime {
        operation: operation(),
        remedy: "; call it in an async function that Tokio runs, or after `Handle::enter`",
    })
}

/// [`require`], and fails on a runtime without timers, where tasks would panic.
pub(crate) fn require_with_timers(operation: impl Fn() -> String) -> Result<()> {
    require(&operation)?;
    // Tokio offers no other way to ask.
    let timer = std::panic::catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO)));
    timer.map_err(|_| Error::NoRuntime {
        operation: operation(),
        remedy: " with timers; call `enable_all` on the runtime's builder",
    })
}

/// [`require`] for a call on a channel. `part` is the part of the call that needs the runtime.
pub(crate) fn require_for_call(part: &str) -> Result<(), Status> {
    if is_entered() {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "{part} needs a Tokio runtime; make the call in an async function that Tokio runs"
    )))
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
        let error = require_with_timers(|| "building".to_owned()).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("building needs a Tokio runtime with timers"),
            "{message}"
        );
        drop(entered);
        let runtime = builder.enable_time().build().unwrap();
        let _entered = runtime.enter();
        assert!(require_with_timers(String::new).is_ok());
    }
}
