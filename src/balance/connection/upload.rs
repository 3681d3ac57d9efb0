//! Sending a request's body.

use bytes::Bytes;
use h2::{Reason, SendStream};
use http_body_util::BodyExt as _;
use tokio::task::AbortHandle;

use crate::balance::replay::AttemptBody;

/// The task that sends a streamed body. Dropping it stops the task, which resets the stream unless
/// the body was sent to its end.
#[derive(Debug)]
pub(crate) struct Upload(AbortHandle);

impl Upload {
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends a body: a complete one at once, a streamed one in a task.
pub(crate) fn upload(mut stream: SendStream<Bytes>, body: AttemptBody) -> Option<Upload> {
    match body {
        AttemptBody::Whole(bytes) => {
            // h2 buffers the bytes, which are in memory anyway, and sends them as the peer's window
            // allows. An empty frame needs no window. If the stream is closed already, the response
            // says why.
            let _ = stream.send_data(bytes.unwrap_or_default(), true);
            None
        }
        body @ AttemptBody::Streamed { .. } => {
            let task = tokio::spawn(pump(stream, body));
            Some(Upload(task.abort_handle()))
        }
    }
}

/// The sending half of a call. If the half is dropped before the body has ended, it resets the
/// stream, so that the server does not wait for the rest.
struct Outgoing {
    stream: SendStream<Bytes>,
    finished: bool,
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.finished {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// Sends a body as the peer's window allows, until the body ends or the peer resets the stream.
async fn pump(stream: SendStream<Bytes>, mut body: AttemptBody) {
    let mut outgoing = Outgoing {
        stream,
        finished: false,
    };
    let stream = &mut outgoing.stream;
    loop {
        let frame = tokio::select! {
            biased;
            _ = std::future::poll_fn(|cx| stream.poll_reset(cx)) => break,
            frame = body.frame() => frame,
        };
        match frame {
            Some(Ok(frame)) => {
                // Trailers are skipped, because gRPC requests have none.
                if let Ok(data) = frame.into_data()
                    && !send_chunk(stream, data).await
                {
                    return;
                }
            }
            Some(Err(status)) => {
                tracing::debug!(%status, "the request's body failed");
                return;
            }
            None => {
                let _ = stream.send_data(Bytes::new(), true);
                break;
            }
        }
    }
    outgoing.finished = true;
}

/// Sends one chunk as the peer's window allows. Returns false if the stream was closed meanwhile.
async fn send_chunk(stream: &mut SendStream<Bytes>, mut data: Bytes) -> bool {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
            // The window shrank in the meantime.
            Some(Ok(0)) => {}
            Some(Ok(granted)) => {
                let piece = data.split_to(granted.min(data.len()));
                if stream.send_data(piece, false).is_err() {
                    return false;
                }
            }
            Some(Err(_)) | None => return false,
        }
    }
    true
}
