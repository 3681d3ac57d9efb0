//! Sending a request's body.

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body_util::BodyExt as _;
use tokio::task::AbortHandle;

use crate::balance::replay::AttemptBody;

/// The task that sends a streamed body; dropped, it stops, and the stream is reset if it was not sent
/// to its end.
#[derive(Debug)]
pub(crate) struct Upload(AbortHandle);

impl Upload {
    pub(crate) fn is_over(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends the body: at once what is at hand, in a task of its own what is still to come.
pub(crate) fn upload(mut stream: SendStream<Bytes>, body: AttemptBody) -> Option<Upload> {
    match body {
        AttemptBody::Whole(None) => None,
        AttemptBody::Whole(Some(bytes)) => {
            // It is in memory anyway; h2 sends it as the peer's window allows. Should the stream be
            // gone already, the response says why.
            let _ = stream.send_data(bytes, true);
            None
        }
        body @ AttemptBody::Streamed { .. } => {
            let task = tokio::spawn(pump(stream, body));
            Some(Upload(task.abort_handle()))
        }
    }
}

/// The sending half of a call. Let go before its end, whatever the reason, it resets the stream: the
/// server must not wait for the rest.
struct Outgoing {
    stream: SendStream<Bytes>,
    ended: bool,
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.ended {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// Sends a body as the peer's window allows, until it ends or the peer wants no more.
async fn pump(stream: SendStream<Bytes>, mut body: AttemptBody) {
    let mut outgoing = Outgoing {
        stream,
        ended: false,
    };
    let stream = &mut outgoing.stream;
    loop {
        let frame = tokio::select! {
            biased;
            _ = std::future::poll_fn(|cx| stream.poll_reset(cx)) => break,
            frame = body.frame() => frame,
        };
        let mut data = match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => data,
                // gRPC requests have no trailers.
                Err(_) => continue,
            },
            Some(Err(status)) => {
                tracing::debug!(%status, "a request's body failed");
                return;
            }
            None => {
                let _ = stream.send_data(Bytes::new(), true);
                break;
            }
        };
        while !data.is_empty() {
            stream.reserve_capacity(data.len());
            match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
                // The window has shrunk meanwhile.
                Some(Ok(0)) => {}
                Some(Ok(granted)) => {
                    let piece = data.split_to(granted.min(data.len()));
                    if stream.send_data(piece, false).is_err() {
                        return;
                    }
                }
                Some(Err(_)) | None => return,
            }
        }
    }
    outgoing.ended = true;
}
