//! Servers of hand-written HTTP/2 frames, for peers that no library plays.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// The bytes that a client sends first (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The largest frame that every peer accepts.
const MAX_FRAME: usize = 16 * 1024;

pub const DATA: u8 = 0x0;
pub const HEADERS: u8 = 0x1;
pub const RST_STREAM: u8 = 0x3;
pub const SETTINGS: u8 = 0x4;
pub const PING: u8 = 0x6;
pub const GOAWAY: u8 = 0x7;
pub const WINDOW_UPDATE: u8 = 0x8;
pub const CONTINUATION: u8 = 0x9;

pub const END_STREAM: u8 = 0x1;
pub const ACK: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;

pub const NO_ERROR: u32 = 0x0;
pub const PROTOCOL_ERROR: u32 = 0x1;
pub const INTERNAL_ERROR: u32 = 0x2;
pub const REFUSED_STREAM: u32 = 0x7;
pub const ENHANCE_YOUR_CALM: u32 = 0xb;

pub const MAX_CONCURRENT_STREAMS: u16 = 0x3;
pub const INITIAL_WINDOW_SIZE: u16 = 0x4;
pub const MAX_HEADER_LIST_SIZE: u16 = 0x6;

/// The head of a gRPC response that messages follow.
pub const GRPC_HEAD: &[(&str, &[u8])] =
    &[(":status", b"200"), ("content-type", b"application/grpc")];

/// A server whose connections a closure handles, each in a task of its own.
pub struct FrameServer {
    address: String,
    accepted: Arc<AtomicUsize>,
    _accepting: AbortOnDropHandle<()>,
}

impl FrameServer {
    /// Starts a server. A connection closes when the closure's future ends, with or without an
    /// error, and all of them end with the server.
    pub async fn start<H, F>(handle: H) -> Self
    where
        H: Fn(FrameConnection) -> F + Send + 'static,
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::start_on(listener, handle)
    }

    /// Starts a server on a socket with options of the caller's.
    pub fn start_on<H, F>(listener: TcpListener, handle: H) -> Self
    where
        H: Fn(FrameConnection) -> F + Send + 'static,
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let address = listener.local_addr().unwrap().to_string();
        let accepted = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&accepted);
        let accepting = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((io, _)) = listener.accept().await {
                io.set_nodelay(true).unwrap();
                let index = count.fetch_add(1, Ordering::SeqCst);
                connections.spawn(handle(FrameConnection::new(io, index)));
                while connections.try_join_next().is_some() {}
            }
        });
        Self {
            address,
            accepted,
            _accepting: AbortOnDropHandle::new(accepting),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// The number of connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// A frame that the client sent.
#[derive(Debug, Clone)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    pub fn is_end_stream(&self) -> bool {
        matches!(self.kind, DATA | HEADERS) && self.flags & END_STREAM != 0
    }
}

/// A byte stream to a client.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// The server's side of a connection.
pub struct FrameConnection {
    io: Box<dyn Io>,
    /// How many connections the server accepted before.
    pub index: usize,
}

impl FrameConnection {
    /// A connection over any byte stream, for example a pipe in paused time.
    pub fn new(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, index: usize) -> Self {
        Self {
            io: Box::new(io),
            index,
        }
    }

    /// Reads the client's preface and sends SETTINGS, each an id with its value.
    pub async fn handshake(&mut self, settings: &[(u16, u32)]) -> io::Result<()> {
        self.read_preface().await?;
        self.send_settings(settings).await
    }

    pub async fn read_preface(&mut self) -> io::Result<()> {
        let mut preface = [0; PREFACE.len()];
        self.io.read_exact(&mut preface).await?;
        assert_eq!(preface, PREFACE);
        Ok(())
    }

    /// Reads one frame and answers nothing.
    pub async fn read_frame(&mut self) -> io::Result<Frame> {
        let mut header = [0; 9];
        self.io.read_exact(&mut header).await?;
        let [a, b, c, kind, flags, s1, s2, s3, s4] = header;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.io.read_exact(&mut payload).await?;
        Ok(Frame {
            kind,
            flags,
            stream: u32::from_be_bytes([s1, s2, s3, s4]) & 0x7fff_ffff,
            payload,
        })
    }

    /// Reads one frame as a well-behaved server does: acknowledges SETTINGS and PING, and makes
    /// room in the windows for DATA. Not cancel safe.
    pub async fn next(&mut self) -> io::Result<Frame> {
        let frame = self.read_frame().await?;
        let is_ack = frame.flags & ACK != 0;
        match frame.kind {
            SETTINGS if !is_ack => self.write_frame(SETTINGS, ACK, 0, &[]).await?,
            PING if !is_ack => self.write_frame(PING, ACK, 0, &frame.payload).await?,
            DATA if !frame.payload.is_empty() => {
                let room = (frame.payload.len() as u32).to_be_bytes();
                self.write_frame(WINDOW_UPDATE, 0, 0, &room).await?;
                if !frame.is_end_stream() {
                    self.write_frame(WINDOW_UPDATE, 0, frame.stream, &room)
                        .await?;
                }
            }
            _ => {}
        }
        Ok(frame)
    }

    /// Reads frames until a request has arrived completely. Returns its stream.
    pub async fn next_request(&mut self) -> io::Result<u32> {
        loop {
            let frame = self.next().await?;
            if frame.is_end_stream() {
                return Ok(frame.stream);
            }
        }
    }

    /// Writes bytes that need not be whole frames.
    pub async fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes).await
    }

    pub async fn write_frame(
        &mut self,
        kind: u8,
        flags: u8,
        stream: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        self.write_bytes(&frame(kind, flags, stream, payload)).await
    }

    pub async fn send_settings(&mut self, settings: &[(u16, u32)]) -> io::Result<()> {
        self.write_bytes(&settings_frame(settings)).await
    }

    pub async fn send_go_away(
        &mut self,
        last_stream: u32,
        code: u32,
        debug_data: &str,
    ) -> io::Result<()> {
        self.write_bytes(&go_away_frame(last_stream, code, debug_data))
            .await
    }

    pub async fn reset_stream(&mut self, stream: u32, code: u32) -> io::Result<()> {
        self.write_frame(RST_STREAM, 0, stream, &code.to_be_bytes())
            .await
    }

    /// Sends HEADERS, and CONTINUATION frames where they are long.
    pub async fn send_headers(
        &mut self,
        stream: u32,
        headers: &[(&str, &[u8])],
        end_stream: bool,
    ) -> io::Result<()> {
        self.write_bytes(&header_frames(stream, headers, end_stream))
            .await
    }

    /// Sends a complete response: an empty message and the status OK.
    pub async fn respond_ok(&mut self, stream: u32) -> io::Result<()> {
        self.write_bytes(&ok_response(stream)).await
    }

    /// Sends a response without messages.
    pub async fn respond_status(&mut self, stream: u32, code: &str) -> io::Result<()> {
        let headers = [GRPC_HEAD, &[("grpc-status", code.as_bytes())]].concat();
        self.send_headers(stream, &headers, true).await
    }

    /// Closes the sending side and reads until the client closes too, so that the client sees an
    /// end and no reset.
    pub async fn close(mut self) -> io::Result<()> {
        self.io.shutdown().await?;
        let mut rest = [0; 4096];
        while self.io.read(&mut rest).await? > 0 {}
        Ok(())
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let [_, a, b, c] = (payload.len() as u32).to_be_bytes();
    let mut bytes = vec![a, b, c, kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub fn settings_frame(settings: &[(u16, u32)]) -> Vec<u8> {
    let mut payload = Vec::new();
    for (id, value) in settings {
        payload.extend(id.to_be_bytes());
        payload.extend(value.to_be_bytes());
    }
    frame(SETTINGS, 0, 0, &payload)
}

pub fn go_away_frame(last_stream: u32, code: u32, debug_data: &str) -> Vec<u8> {
    let mut payload = last_stream.to_be_bytes().to_vec();
    payload.extend(code.to_be_bytes());
    payload.extend(debug_data.as_bytes());
    frame(GOAWAY, 0, 0, &payload)
}

pub fn ok_response(stream: u32) -> Vec<u8> {
    let mut bytes = header_frames(stream, GRPC_HEAD, false);
    bytes.extend(frame(DATA, 0, stream, &[0; 5]));
    bytes.extend(header_frames(stream, &[("grpc-status", b"0")], true));
    bytes
}

/// HEADERS and, where the block is long, CONTINUATION frames.
pub fn header_frames(stream: u32, headers: &[(&str, &[u8])], end_stream: bool) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        // A literal that neither table gets (RFC 7541, section 6.2.2).
        block.push(0);
        hpack_string(&mut block, name.as_bytes());
        hpack_string(&mut block, value);
    }
    let mut bytes = Vec::new();
    let last = block.len().div_ceil(MAX_FRAME).max(1) - 1;
    for index in 0..=last {
        let piece = &block[index * MAX_FRAME..block.len().min((index + 1) * MAX_FRAME)];
        let (kind, mut flags) = match index {
            0 if end_stream => (HEADERS, END_STREAM),
            0 => (HEADERS, 0),
            _ => (CONTINUATION, 0),
        };
        if index == last {
            flags |= END_HEADERS;
        }
        bytes.extend(frame(kind, flags, stream, piece));
    }
    bytes
}

/// A string without Huffman coding, after its length (RFC 7541, sections 5.1 and 5.2).
fn hpack_string(block: &mut Vec<u8>, string: &[u8]) {
    const PREFIX: usize = 0x7f;
    if string.len() < PREFIX {
        block.push(string.len() as u8);
    } else {
        block.push(PREFIX as u8);
        let mut rest = string.len() - PREFIX;
        while rest >= 0x80 {
            block.push((rest % 0x80) as u8 | 0x80);
            rest /= 0x80;
        }
        block.push(rest as u8);
    }
    block.extend(string);
}
