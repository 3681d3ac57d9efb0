//! The stream of a registration's states.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::Stream;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;

use super::state::{RegistrationState, Status};

/// The states of a registration, see [`Registration::states`](super::Registration::states).
#[derive(Debug)]
#[must_use = "streams do nothing unless polled"]
pub struct RegistrationStates {
    statuses: WatchStream<Status>,
    /// The number of states that had been announced when the last item was taken.
    announced: Option<u64>,
}

impl RegistrationStates {
    pub(super) fn new(status: watch::Receiver<Status>) -> Self {
        Self {
            statuses: WatchStream::new(status),
            announced: None,
        }
    }
}

impl Stream for RegistrationStates {
    type Item = RegistrationState;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Some(status) = ready!(Pin::new(&mut self.statuses).poll_next(cx)) else {
                return Poll::Ready(None);
            };
            // A status also changes in other ways, for example by an error.
            if self.announced != Some(status.announced) {
                self.announced = Some(status.announced);
                return Poll::Ready(Some(status.state));
            }
        }
    }
}
