//! The debug log of calls: one event for each, when it is over.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use http::Uri;
use tokio::time::Instant;
use tonic::Code;

use crate::balance::AttemptedEndpoints;

/// One call to etcd, from [`Config::enable_grpc_debug_log`](crate::Config::enable_grpc_debug_log).
/// Keys and values are not seen here, so they cannot be written.
#[derive(Debug)]
pub(super) struct CallLog {
    method: String,
    begun: Instant,
    /// Where it is asked.
    tried: AttemptedEndpoints,
    /// Who answered last; it may not be who was asked last.
    answered: Mutex<Option<Arc<str>>>,
    over: bool,
}

impl CallLog {
    pub(super) fn begin(uri: &Uri, tried: AttemptedEndpoints) -> Self {
        Self {
            method: uri.path().trim_start_matches('/').to_owned(),
            begun: Instant::now(),
            tried,
            answered: Mutex::new(None),
            over: false,
        }
    }

    /// One attempt at the call, to remember who answered it.
    pub(super) async fn attempt<T>(&self, attempt: impl Future<Output = T>) -> T {
        let mut attempt = pin!(attempt);
        let mut asked = None;
        let answer = poll_fn(|cx| {
            let before = self.tried.last();
            let polled = attempt.as_mut().poll(cx);
            // Those beside this one are in the same task, so what is new here was asked by this one. One
            // that asks whom the last had asked shows nothing, and then the last is who it is.
            let now = self.tried.last();
            if now != before {
                asked = now;
            }
            polled
        })
        .await;
        *self.answered() = asked.or_else(|| self.tried.last());
        answer
    }

    /// A stream is open: from here on it is with who answered, wherever else its caller asks.
    pub(super) fn opened(&mut self) {
        self.tried = AttemptedEndpoints::default();
    }

    /// The call was answered, or found to be impossible.
    pub(super) fn end(mut self, status: Code) {
        let answered = self.answered().take();
        let member = answered.or_else(|| self.tried.last());
        self.write(&format!("{status:?}"), member);
    }

    /// The call was asked of nobody.
    pub(super) fn refuse(mut self, status: Code) {
        self.write(&format!("{status:?}"), None);
    }

    fn write(&mut self, status: &str, member: Option<Arc<str>>) {
        self.over = true;
        let (time, member) = (self.begun.elapsed(), member.as_deref().unwrap_or("none"));
        tracing::debug!(method = self.method, member, status, ?time, "etcd call");
    }

    fn answered(&self) -> std::sync::MutexGuard<'_, Option<Arc<str>>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that the caller gave up or that its time cut off, with the member that was asked last; or a
/// stream that the caller closed.
impl Drop for CallLog {
    fn drop(&mut self) {
        if !self.over {
            let answered = self.answered().take();
            let member = self.tried.last().or(answered);
            self.write("dropped", member);
        }
    }
}
