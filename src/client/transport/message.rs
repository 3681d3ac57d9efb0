//! gRPC's messages on the wire: their limits, and gzip.
//!
//! Both are done here, for every call alike: etcd-client takes limits for keys and watches only, and
//! has no way to compress.

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

/// A message's prefix: whether it is compressed, and its length ("gRPC over HTTP2").
const PREFIX: usize = 5;

/// Below this gzip makes a message longer: its own header and trailer are 18 bytes.
const WORTH_COMPRESSING: usize = 128;

/// Answers that are larger etcd-client does not read, except on keys and watches: it has no way to lift
/// tonic's own limit for the others.
const READ_AT_MOST: usize = 4 * 1024 * 1024;

const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const GZIP: HeaderValue = HeaderValue::from_static("gzip");

/// What messages may be, and how they are written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Codec {
    pub(super) max_send: usize,
    pub(super) max_recv: usize,
    pub(super) gzip: bool,
    /// Whether answers are read by what keeps to tonic's own limit.
    pub(super) lesser: bool,
}

impl Codec {
    /// Announces to the server how messages are written.
    pub(super) fn announce(&self, headers: &mut HeaderMap) {
        if self.gzip {
            headers.insert(ENCODING, GZIP);
            headers.insert(ACCEPT_ENCODING, GZIP);
        }
    }

    /// Checks the messages that begin in these bytes, none of them compressed yet.
    fn check_request(&self, bytes: &[u8]) -> Result<(), Status> {
        let mut rest = bytes;
        while let Some(length) = length_of(rest) {
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

    /// The request's one message as it is to be sent.
    pub(super) fn request(&self, message: Bytes) -> Result<Bytes, Status> {
        self.check_request(&message)?;
        if !self.gzip || message.len() < WORTH_COMPRESSING {
            return Ok(message);
        }
        let failed = |error| Status::internal(format!("the request cannot be compressed: {error}"));
        let mut prefixed = Vec::with_capacity(message.len() / 4);
        prefixed.put_slice(&[0; PREFIX]);
        let mut gzip = GzEncoder::new(prefixed, Compression::default());
        gzip.write_all(&message[PREFIX..]).map_err(failed)?;
        let mut compressed = gzip.finish().map_err(failed)?;
        let length = u32::try_from(compressed.len() - PREFIX)
            .map_err(|_| Status::out_of_range("the request is over what gRPC allows, 4 GiB"))?;
        compressed[0] = 1;
        compressed[1..PREFIX].copy_from_slice(&length.to_be_bytes());
        Ok(compressed.into())
    }

    /// Takes note of how the answer is written; what reads it next finds it written plainly.
    pub(super) fn answer(&self, headers: &mut HeaderMap) -> Result<(), Status> {
        match headers.remove(ENCODING) {
            None => Ok(()),
            Some(encoding) if encoding == GZIP || encoding == "identity" => Ok(()),
            Some(encoding) => Err(Status::unimplemented(format!(
                "the answer is compressed with {encoding:?}, which was not asked for"
            ))),
        }
    }

    /// The same for calls to this path.
    pub(super) fn to(mut self, path: &str) -> Self {
        let any = path.starts_with("/etcdserverpb.KV/") || path.starts_with("/etcdserverpb.Watch/");
        self.lesser = !any;
        self
    }

    /// How large an answer may be.
    fn limit(&self) -> usize {
        match self.lesser {
            true => self.max_recv.min(READ_AT_MOST),
            false => self.max_recv,
        }
    }

    fn check_answer(&self, length: usize) -> Result<(), Status> {
        let limit = self.limit();
        if length <= limit {
            return Ok(());
        }
        let over = match limit == self.max_recv {
            true => format!("max_call_recv_msg_size, {limit} bytes"),
            false => format!(
                "{limit} bytes: whatever max_call_recv_msg_size is, answers other than those on keys and \
                 watches are at most 4 MiB"
            ),
        };
        Err(Status::out_of_range(format!(
            "the answer of {length} bytes or more is over {over}"
        )))
    }

    /// The message without its compression.
    fn plain(&self, message: Bytes) -> Result<Bytes, Status> {
        if message.first() != Some(&1) {
            return Ok(message);
        }
        let mut plain = vec![0; PREFIX];
        // One byte more than allowed shows that there are too many, however many there are.
        let limit = u64::try_from(self.limit()).unwrap_or(u64::MAX);
        GzDecoder::new(&message[PREFIX..])
            .take(limit.saturating_add(1))
            .read_to_end(&mut plain)
            .map_err(|error| Status::internal(format!("the answer's gzip is broken: {error}")))?;
        let length = plain.len() - PREFIX;
        self.check_answer(length)?;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        plain[1..PREFIX].copy_from_slice(&length.to_be_bytes());
        Ok(plain.into())
    }

    /// Takes the first message off what has arrived, if it is there to its end.
    fn next(&self, arrived: &mut BytesMut) -> Result<Option<Bytes>, Status> {
        let Some(length) = length_of(arrived) else {
            return Ok(None);
        };
        self.check_answer(length)?;
        if arrived.len() < PREFIX + length {
            return Ok(None);
        }
        self.plain(arrived.split_to(PREFIX + length).freeze())
            .map(Some)
    }

    /// The messages of an answer that has arrived in one piece, as it most often does.
    pub(super) fn whole(&self, arrived: Bytes) -> Result<Bytes, Status> {
        if let Some(length) = length_of(&arrived) {
            self.check_answer(length)?;
        }
        self.plain(arrived)
    }

    /// Whether the message that has begun to arrive is too long.
    pub(super) fn check_begun(&self, arrived: &[u8]) -> Result<(), Status> {
        length_of(arrived).map_or(Ok(()), |length| self.check_answer(length))
    }
}

/// The length of the message that begins here; `None` without its prefix.
fn length_of(bytes: &[u8]) -> Option<usize> {
    let [_, a, b, c, d] = *bytes.first_chunk::<PREFIX>()?;
    Some(u32::from_be_bytes([a, b, c, d]) as usize)
}

/// A request's stream, each message within the limit. They are not compressed: what etcd takes as
/// streams are a few bytes each.
pub(super) struct Requests {
    pub(super) codec: Codec,
    pub(super) body: Body,
}

impl http_body::Body for Requests {
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

/// Told how a stream ended: its trailers, or what it failed of.
type Ended = Box<dyn FnMut(&HeaderMap, Option<&Status>) + Send>;

/// An answer's stream: plain messages within the limit, until the client is closed.
pub(super) struct Answers {
    codec: Codec,
    body: Body,
    arrived: BytesMut,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    over: bool,
    ended: Ended,
}

impl Answers {
    pub(super) fn new(
        codec: Codec,
        body: Body,
        closed: WaitForCancellationFutureOwned,
        ended: impl FnMut(&HeaderMap, Option<&Status>) + Send + 'static,
    ) -> Self {
        Self {
            codec,
            body,
            arrived: BytesMut::new(),
            closed: Box::pin(closed),
            over: false,
            ended: Box::new(ended),
        }
    }

    fn failed(&mut self, status: Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.over = true;
        self.body = Body::empty();
        (self.ended)(&HeaderMap::new(), Some(&status));
        Poll::Ready(Some(Err(status)))
    }
}

impl http_body::Body for Answers {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.over {
            return Poll::Ready(None);
        }
        if this.closed.as_mut().poll(cx).is_ready() {
            return this.failed(Status::cancelled("the client is closed"));
        }
        loop {
            match this.codec.next(&mut this.arrived) {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(Frame::data(message)))),
                Ok(None) => {}
                Err(status) => return this.failed(status),
            }
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(status)) => return this.failed(status),
                None if this.arrived.has_remaining() => {
                    return this.failed(Status::unavailable("the answer broke off"));
                }
                None => {
                    this.over = true;
                    (this.ended)(&HeaderMap::new(), None);
                    return Poll::Ready(None);
                }
            };
            match frame.into_data() {
                Ok(data) => this.arrived.extend_from_slice(&data),
                Err(frame) => {
                    this.over = true;
                    if let Some(trailers) = frame.trailers_ref() {
                        (this.ended)(trailers, None);
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over
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
            lesser: false,
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
        fn messages_come_out_as_they_went_in_however_the_bytes_are_cut(
            payloads in proptest::collection::vec(proptest::collection::vec(0u8..4, 0..600), 0..8),
            cut in 1usize..200,
            gzip: bool,
        ) {
            let codec = codec(600, gzip);
            let mut wire = BytesMut::new();
            for payload in &payloads {
                wire.extend_from_slice(&codec.request(message(payload)).unwrap());
            }
            let mut arrived = BytesMut::new();
            let mut found = Vec::new();
            for piece in wire.chunks(cut) {
                arrived.extend_from_slice(piece);
                while let Some(message) = codec.next(&mut arrived).unwrap() {
                    found.push(message[PREFIX..].to_vec());
                }
            }
            prop_assert_eq!(found, payloads);
            prop_assert!(arrived.is_empty());
        }
    }

    #[test]
    fn a_message_over_the_limit_is_an_error_that_names_limit_and_field() {
        let codec = codec(10, false);
        assert!(codec.request(message(&[7; 10])).is_ok());
        let sent = codec.request(message(&[7; 11])).unwrap_err();
        assert!(
            sent.message()
                .contains("11 bytes is over max_call_send_msg_size, 10")
        );
        let begun = codec.check_begun(&message(&[7; 11])[..PREFIX]).unwrap_err();
        assert!(begun.message().contains("over max_call_recv_msg_size, 10"));
    }

    #[test]
    fn what_is_small_only_while_it_is_compressed_is_over_the_limit_too() {
        let packed = codec(1 << 20, true)
            .request(message(&[7; 1 << 20]))
            .unwrap();
        assert!(packed.len() < 10_000);
        let error = codec(100_000, true).whole(packed).unwrap_err();
        assert!(
            error.message().contains("max_call_recv_msg_size"),
            "{error}"
        );
    }

    #[test]
    fn what_etcd_client_reads_up_to_4_mib_is_refused_with_the_field_s_name_above_that() {
        let larger = codec(2 * READ_AT_MOST, false);
        let begins = |length: usize| {
            let mut begun = vec![0];
            begun.put_u32(length as u32);
            begun
        };
        for (path, most) in [
            ("/etcdserverpb.KV/Range", 2 * READ_AT_MOST),
            ("/etcdserverpb.Watch/Watch", 2 * READ_AT_MOST),
            ("/etcdserverpb.Lease/LeaseLeases", READ_AT_MOST),
            ("/v3lockpb.Lock/Lock", READ_AT_MOST),
        ] {
            let codec = larger.to(path);
            assert!(codec.check_begun(&begins(most)).is_ok(), "{path}");
            let over = codec.check_begun(&begins(most + 1)).unwrap_err();
            for part in ["max_call_recv_msg_size", &most.to_string()] {
                assert!(over.message().contains(part), "{over}");
            }
        }
        let smaller = codec(1000, false).to("/etcdserverpb.Lease/LeaseLeases");
        let over = smaller.check_begun(&begins(1001)).unwrap_err();
        assert!(over.message().ends_with("1000 bytes"), "{over}");
    }

    #[test]
    fn broken_gzip_is_an_error() {
        let mut broken = message(&[7; 100]).to_vec();
        broken[0] = 1;
        let error = codec(1 << 20, true).whole(broken.into()).unwrap_err();
        assert!(error.message().contains("gzip"), "{error}");
    }
}
