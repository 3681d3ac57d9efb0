//! Panics in code that the user of this crate supplies: connectors, sources.
//!
//! Such a panic must not end a task that serves others. The panic hook has logged the place.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;

/// The output of `future`, or the text of its panic.
///
/// `future` is dropped after a panic, so that no code sees state that is half changed.
pub(crate) async fn catch<F: Future>(future: F) -> Result<F::Output, String> {
    let result = AssertUnwindSafe(future).catch_unwind().await;
    result.map_err(|payload| text(&*payload))
}

/// The text of a panic, if the panic has one, as those of `panic!` do.
pub(crate) fn text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "without a text".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::panic_any;

    use super::*;

    fn caught(payload: impl Any + Send) -> String {
        let panicking = catch(async { panic_any(payload) });
        panicking.now_or_never().unwrap().unwrap_err()
    }

    #[test]
    fn text_is_that_of_the_panic() {
        assert_eq!(caught("static"), "static");
        assert_eq!(caught("owned".to_owned()), "owned");
        assert_eq!(caught(7), "without a text");
    }

    #[test]
    fn output_passes() {
        assert_eq!(catch(async { 7 }).now_or_never().unwrap(), Ok(7));
    }
}
