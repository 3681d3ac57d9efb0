//! Registered only while its server says that it is ready.

use std::pin::pin;

use futures::{Stream, StreamExt};
use tokio::sync::watch;

use super::state::{RegistrationState, Status};

/// Passes on what `ready` says, until it ends, or the registration has, or nobody wants to know.
pub(super) async fn follow(
    ready: impl Stream<Item = bool>,
    mut status: watch::Receiver<Status>,
    tell: impl Fn(bool) -> bool,
) {
    let mut ready = pin!(ready);
    let ended = async {
        let is_over = |status: &Status| status.state == RegistrationState::Deregistered;
        // An error says that the sender is gone, and with it the registration.
        drop(status.wait_for(is_over).await);
    };
    let mut ended = pin!(ended);
    loop {
        tokio::select! {
            biased;
            () = &mut ended => return,
            said = ready.next() => match said {
                Some(said) if tell(said) => {}
                _ => return,
            },
        }
    }
}
