//! Registers an instance only while its server is ready.

use std::pin::pin;

use futures::{Stream, StreamExt};
use tokio::sync::watch;

use super::state::{Readiness, Status};

/// Passes the items of `ready` to `set_ready` until the stream ends, the registration ends, or
/// `set_ready` returns `false`.
///
/// The registration ends for this purpose as soon as it is deregistered, even before etcd knows: a
/// server that shuts down waits for its connections to close, and `ready` may hold one of them.
pub(super) async fn forward(
    ready: impl Stream<Item = bool>,
    mut status: watch::Receiver<Status>,
    set_ready: impl Fn(Readiness) -> bool,
) {
    let mut ending = HoldBackOnDrop(Some(&set_ready));
    let mut ready = pin!(ready);
    let terminated = async {
        // An error means that the sender is gone, and the registration with it.
        drop(status.wait_for(|status| status.terminal).await);
    };
    let mut terminated = pin!(terminated);
    loop {
        tokio::select! {
            biased;
            () = &mut terminated => break,
            item = ready.next() => match item {
                Some(is_ready) if set_ready(readiness_of(is_ready)) => {}
                _ => break,
            },
        }
    }
    ending.0 = None;
}

fn readiness_of(is_ready: bool) -> Readiness {
    if is_ready {
        Readiness::Ready
    } else {
        Readiness::NotReady
    }
}

/// Holds an instance back whose readiness nobody follows any more, because the runtime of the task
/// has ended or the stream has panicked.
struct HoldBackOnDrop<'a, F: Fn(Readiness) -> bool>(Option<&'a F>);

impl<F: Fn(Readiness) -> bool> Drop for HoldBackOnDrop<'_, F> {
    fn drop(&mut self) {
        if let Some(set_ready) = self.0
            && set_ready(Readiness::NotFollowed)
        {
            tracing::warn!(
                "a server's readiness is not followed any more, because a runtime has ended or the \
                 stream `ready` has panicked; the instance is held back"
            );
        }
    }
}
