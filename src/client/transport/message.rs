//! gRPC's messages: their size limits and their compression with gzip.
//!
//! Both are applied here, to every call alike, because etcd-client takes limits for keys and
//! watches only and cannot compress.

use std::io::{Read as _, Write as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::Frame;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::Status;
use tonic::body::Body;

use super::awaited_response::AwaitedResponse;

/// The length of a message's prefix: one byte that says whether the message is compressed, and four
/// with its length ("gRPC over HTTP2").
pub(super) const PREFIX: usize = 5;

/// Smaller messages are not compressed. gzip would make them longer, because its header and trailer
/// take 18 bytes.
const MIN_COMPRESSED: usize = 128;

/// tonic's default limit of a response. etcd-client can lift the limit for keys and watches only.
const TONIC_LIMIT: usize = 4 * 1024 * 1024;

const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const GZIP: HeaderValue = HeaderValue::from_static("gzip");

/// Encodes and decodes messages within their limits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Codec {
    /// The largest request, in bytes.
    pub(super) max_send: usize,
    /// The largest response, in bytes.
    pub(super) max_recv: usize,
    pub(super) gzip: bool,
    /// Whether tonic's limit of 4 MiB applies to responses as well.
    pub(super) capped_at_4_mib: bool,
}

impl Codec {
    /// The codec for calls to this path.
    pub(super) fn for_path(mut self, path: &str) -> Self {
        let has_own_limit =
            path.starts_with("/etcdserverpb.KV/") || path.starts_with("/etcdserverpb.Watch/");
        self.capped_at_4_mib = !has_own_limit;
        self
    }

    /// Adds the headers that announce gzip to the server.
    pub(super) fn add_headers(&self, headers: &mut HeaderMap) {
        if self.gzip {
            headers.insert(ENCODING, GZIP);
            headers.insert(ACCEPT_ENCODING, GZIP);
        }
    }

    /// Checks the sizes of the uncompressed messages that start in these bytes.
    fn check_request(&self, bytes: &[u8]) -> Result<(), Status> {
        let mut rest = bytes;
        while let Some(length) = message_length(rest) {
            if length > self.max_send {
                return Err(Status::out_of_range(format!(
                    "the request of {length} bytes is over max_call_send_msg_size, {} bytes",
                    self.max_send
                )));
            }
            rest = rest.get(PREFIX + length..).unwrap_or_default();
        }
        Ok(())
    }

    /// Checks the request's only message, and compresses it if that helps.
    pub(super) fn encode(&self, message: Bytes) -> Result<Bytes, Status> {
        self.check_request(&message)?;
        if !self.gzip || message.len() < MIN_COMPRESSED {
            return Ok(message);
        }
        let failed = |error| Status::internal(format!("the request cannot be compressed: {error}"));
        let mut prefixed = Vec::with_capacity(message.len() / 4);
        prefixed.put_slice(&[0; PREFIX]);
        let mut gzip = GzEncoder::new(prefixed, Compression::default());
        gzip.write_all(&message[PREFIX..]).map_err(failed)?;
        let mut compressed = gzip.finish().map_err(failed)?;
        let length = u32::try_from(compressed.len() - PREFIX)
            .map_err(|_| Status::out_of_range("the request is over gRPC's limit of 4 GiB"))?;
        compressed[0] = 1;
        compressed[1..PREFIX].copy_from_slice(&length.to_be_bytes());
        Ok(compressed.into())
    }

    /// Checks that the client can decode the response's encoding, and removes the header, because
    /// etcd-client gets plain messages.
    pub(super) fn take_encoding(&self, headers: &mut HeaderMap) -> Result<(), Status> {
        match headers.remove(ENCODING) {
            None => Ok(()),
            Some(encoding) if encoding == GZIP || encoding == "identity" => Ok(()),
            Some(encoding) => Err(Status::unimplemented(format!(
                "the response is compressed with {encoding:?}, which the client does not accept"
            ))),
        }
    }

    /// The largest response, in bytes.
    fn max_response(&self) -> usize {
        match self.capped_at_4_mib {
            true => self.max_recv.min(TONIC_LIMIT),
            false => self.max_recv,
        }
    }

    fn check_response(&self, length: usize) -> Result<(), Status> {
        let limit = self.max_response();
        if length <= limit {
            return Ok(());
        }
        let limit = match limit == self.max_recv {
            true => format!("max_call_recv_msg_size, {limit} bytes"),
            false => format!(
                "{limit} bytes: only responses about keys and watches may exceed 4 MiB, whatever \
                 max_call_recv_msg_size is"
            ),
        };
        Err(Status::out_of_range(format!(
            "the response of at least {length} bytes is over {limit}"
        )))
    }

    /// Checks the size of the response message that starts in these bytes, if its prefix is there.
    pub(super) fn check_prefix(&self, received: &[u8]) -> Result<(), Status> {
        message_length(received).map_or(Ok(()), |length| self.check_response(length))
    }

    fn decompress(&self, message: Bytes) -> Result<Bytes, Status> {
        if message.first() != Some(&1) {
            return Ok(message);
        }
        let mut plain = vec![0; PREFIX];
        // One byte over the limit is enough to see that the message is too large, and bounds the
        // memory that a message can take.
        let limit = u64::try_from(self.max_response()).unwrap_or(u64::MAX);
        GzDecoder::new(&message[PREFIX..])
            .take(limit.saturating_add(1))
            .read_to_end(&mut plain)
            .map_err(|error| Status::internal(format!("the response's gzip is broken: {error}")))?;
        let length = plain.len() - PREFIX;
        self.check_response(length)?;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        plain[1..PREFIX].copy_from_slice(&length.to_be_bytes());
        Ok(plain.into())
    }

    /// Removes the first message from the received bytes and decodes it. `None` while it is
    /// incomplete.
    fn decode_next(&self, received: &mut BytesMut) -> Result<Option<Bytes>, Status> {
        let Some(length) = message_length(received) else {
            return Ok(None);
        };
        self.check_response(length)?;
        if received.len() < PREFIX + length {
            return Ok(None);
        }
        self.decompress(received.split_to(PREFIX + length).freeze())
            .map(Some)
    }

    /// Decodes the message of a unary response.
    pub(super) fn decode(&self, received: Bytes) -> Result<Bytes, Status> {
        self.check_prefix(&received)?;
        self.decompress(received)
    }
}

/// The length of the message that starts here. `None` while its prefix is incomplete.
fn message_length(bytes: &[u8]) -> Option<usize> {
    let [_, a, b, c, d] = *bytes.first_chunk::<PREFIX>()?;
    Some(u32::from_be_bytes([a, b, c, d]) as usize)
}

/// The body of a streaming request, whose messages are checked against the limit. The messages are
/// not compressed, because etcd's streams take messages of a few bytes each.
pub(super) struct RequestStream {
    pub(super) codec: Codec,
    pub(super) body: Body,
}

impl http_body::Body for RequestStream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(status) = self.codec.check_request(data)
        {
            return Poll::Ready(Some(Err(status)));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// Called when a stream ends, with its trailers, which it may change, or with the status that it
/// failed with.
type OnEnd = Box<dyn FnMut(&mut HeaderMap, Option<&Status>) + Send>;

/// The body of a streaming response: decoded messages within the limit. Fails with `CANCELLED` when
/// the client is closed.
pub(super) struct ResponseStream {
    codec: Codec,
    body: Body,
    received: BytesMut,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    has_ended: bool,
    /// Over with the first message.
    awaited: AwaitedResponse,
    on_end: OnEnd,
}

impl ResponseStream {
    pub(super) fn new(
        codec: Codec,
        body: Body,
        closed: WaitForCancellationFutureOwned,
        awaited: AwaitedResponse,
        on_end: impl FnMut(&mut HeaderMap, Option<&Status>) + Send + 'static,
    ) -> Self {
        Self {
            codec,
            body,
            received: BytesMut::new(),
            closed: Box::pin(closed),
            has_ended: false,
            awaited,
            on_end: Box::new(on_end),
        }
    }

    fn fail(&mut self, status: Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.has_ended = true;
        self.body = Body::empty();
        self.awaited.fail(&status);
        (self.on_end)(&mut HeaderMap::new(), Some(&status));
        Poll::Ready(Some(Err(status)))
    }
}

impl http_body::Body for ResponseStream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.has_ended {
            return Poll::Ready(None);
        }
        if this.closed.as_mut().poll(cx).is_ready() {
            return this.fail(Status::cancelled("the client is closed"));
        }
        loop {
            match this.codec.decode_next(&mut this.received) {
                Ok(Some(message)) => {
                    this.awaited.succeed();
                    return Poll::Ready(Some(Ok(Frame::data(message))));
                }
                Ok(None) => {}
                Err(status) => return this.fail(status),
            }
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(status)) => return this.fail(status),
                None if this.received.has_remaining() => {
                    return this.fail(Status::unavailable(
                        "the response stream ended in the middle of a message",
                    ));
                }
                None => {
                    this.has_ended = true;
                    (this.on_end)(&mut HeaderMap::new(), None);
                    return Poll::Ready(None);
                }
            };
            match frame.into_data() {
                Ok(data) => this.received.extend_from_slice(&data),
                Err(frame) => {
                    this.has_ended = true;
                    let Ok(mut trailers) = frame.into_trailers() else {
                        return Poll::Ready(None);
                    };
                    if let Some(status) = Status::from_header_map(&trailers) {
                        this.awaited.fail(&status);
                    }
                    (this.on_end)(&mut trailers, None);
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn codec(limit: usize, gzip: bool) -> Codec {
        Codec {
            max_send: limit,
            max_recv: limit,
            gzip,
            capped_at_4_mib: false,
        }
    }

    fn message(payload: &[u8]) -> Bytes {
        let mut message = BytesMut::new();
        message.put_u8(0);
        message.put_u32(payload.len() as u32);
        message.put_slice(payload);
        message.freeze()
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut_of_the_bytes(
            payloads in proptest::collection::vec(proptest::collection::vec(0u8..4, 0..600), 0..8),
            cut in 1usize..200,
            gzip: bool,
        ) {
            let codec = codec(600, gzip);
            let mut wire = BytesMut::new();
            for payload in &payloads {
                wire.extend_from_slice(&codec.encode(message(payload)).unwrap());
            }
            let mut received = BytesMut::new();
            let mut found = Vec::new();
            for piece in wire.chunks(cut) {
                received.extend_from_slice(piece);
                while let Some(message) = codec.decode_next(&mut received).unwrap() {
                    found.push(message[PREFIX..].to_vec());
                }
            }
            prop_assert_eq!(found, payloads);
            prop_assert!(received.is_empty());
        }
    }

    #[test]
    fn error_over_the_limit_names_limit_and_field() {
        let codec = codec(10, false);
        assert!(codec.encode(message(&[7; 10])).is_ok());
        let sent = codec.encode(message(&[7; 11])).unwrap_err();
        assert!(
            sent.message()
                .contains("11 bytes is over max_call_send_msg_size, 10")
        );
        let received = codec
            .check_prefix(&message(&[7; 11])[..PREFIX])
            .unwrap_err();
        assert!(
            received
                .message()
                .contains("over max_call_recv_msg_size, 10")
        );
    }

    #[test]
    fn limit_applies_to_the_decompressed_message() {
        let packed = codec(1 << 20, true).encode(message(&[7; 1 << 20])).unwrap();
        assert!(packed.len() < 10_000);
        let error = codec(100_000, true).decode(packed).unwrap_err();
        assert!(
            error.message().contains("max_call_recv_msg_size"),
            "{error}"
        );
    }

    #[test]
    fn only_keys_and_watches_exceed_4_mib() {
        let larger = codec(2 * TONIC_LIMIT, false);
        let prefix = |length: usize| {
            let mut prefix = vec![0];
            prefix.put_u32(length as u32);
            prefix
        };
        for (path, most) in [
            ("/etcdserverpb.KV/Range", 2 * TONIC_LIMIT),
            ("/etcdserverpb.Watch/Watch", 2 * TONIC_LIMIT),
            ("/etcdserverpb.Lease/LeaseLeases", TONIC_LIMIT),
            ("/v3lockpb.Lock/Lock", TONIC_LIMIT),
        ] {
            let codec = larger.for_path(path);
            assert!(codec.check_prefix(&prefix(most)).is_ok(), "{path}");
            let over = codec.check_prefix(&prefix(most + 1)).unwrap_err();
            for part in ["max_call_recv_msg_size", &most.to_string()] {
                assert!(over.message().contains(part), "{over}");
            }
        }
        let smaller = codec(1000, false).for_path("/etcdserverpb.Lease/LeaseLeases");
        let over = smaller.check_prefix(&prefix(1001)).unwrap_err();
        assert!(over.message().ends_with("1000 bytes"), "{over}");
    }

    #[test]
    fn broken_gzip_is_an_error() {
        let mut broken = message(&[7; 100]).to_vec();
        broken[0] = 1;
        let error = codec(1 << 20, true).decode(broken.into()).unwrap_err();
        assert!(error.message().contains("gzip"), "{error}");
    }
}
