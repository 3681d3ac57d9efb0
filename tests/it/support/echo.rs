//! Echo servers within the test's process, each on its own thread, so that dropping one closes its
//! connections as a crash would.

use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use helloworld::echo::echo_server::{Echo, EchoServer as Service};
use helloworld::echo::{EchoReply, EchoRequest};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic::{Code, Request, Response, Status, Streaming};

/// More than any message of a test.
const LARGEST: usize = 64 << 20;

/// The counters of a server.
#[derive(Debug, Default)]
pub struct Counts {
    connections: AtomicUsize,
    accepted: AtomicUsize,
    calls: AtomicU64,
    active: AtomicUsize,
}

impl Counts {
    /// Connections that are open now.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Connections accepted since the start.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Calls in progress.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::SeqCst)
    }

    /// Calls received since the start.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }
}

/// The service. Each reply carries the name of the server.
#[derive(Clone)]
pub struct EchoService {
    name: String,
    delay: Duration,
    counts: Arc<Counts>,
}

impl EchoService {
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            delay: Duration::ZERO,
            counts: Arc::default(),
        }
    }

    pub fn service(self) -> Service<Self> {
        Service::new(self)
            .max_decoding_message_size(LARGEST)
            .max_encoding_message_size(LARGEST)
    }

    async fn reply(&self, request: EchoRequest, index: u64) -> Result<EchoReply, Status> {
        let delay = self.delay + Duration::from_millis(request.delay_ms.into());
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        if request.fail_with != 0 {
            let mut metadata = MetadataMap::new();
            metadata.insert("x-why", "as asked".parse().unwrap());
            let code = Code::from_i32(request.fail_with as i32);
            let details = bytes::Bytes::from_static(b"\x00details\xff");
            let message = "failed, as asked: \u{e9}";
            return Err(Status::with_details_and_metadata(
                code, message, details, metadata,
            ));
        }
        Ok(EchoReply {
            payload: request.payload,
            server: self.name.clone(),
            index,
        })
    }

    /// A response that returns the metadata of the request.
    fn respond<T, U>(&self, request: &Request<T>, message: U) -> Response<U> {
        let mut response = Response::new(message);
        let seen = request.metadata();
        for key in ["user-agent", "grpc-timeout"] {
            if let Some(value) = seen.get(key) {
                let key = format!("seen-{key}").parse::<tonic::metadata::AsciiMetadataKey>();
                response.metadata_mut().insert(key.unwrap(), value.clone());
            }
        }
        for value in &seen.get_all("x-echo") {
            response.metadata_mut().append("x-echo", value.clone());
        }
        for value in &seen.get_all_bin("x-echo-bin") {
            response
                .metadata_mut()
                .append_bin("x-echo-bin", value.clone());
        }
        response
    }

    fn start_call(&self) -> ActiveCall {
        self.counts.calls.fetch_add(1, Ordering::SeqCst);
        self.counts.active.fetch_add(1, Ordering::SeqCst);
        ActiveCall(Arc::clone(&self.counts))
    }
}

/// Counts a call as active until its response has been sent or the call is cancelled.
struct ActiveCall(Arc<Counts>);

impl Drop for ActiveCall {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

type Replies = BoxStream<'static, Result<EchoReply, Status>>;

#[tonic::async_trait]
impl Echo for EchoService {
    async fn unary(&self, request: Request<EchoRequest>) -> Result<Response<EchoReply>, Status> {
        let _active = self.start_call();
        let reply = self.reply(request.get_ref().clone(), 0).await?;
        Ok(self.respond(&request, reply))
    }

    type ServerStreamStream = Replies;

    /// With `fail_with`, fails after `count` replies; if `count` is 0, without response headers.
    async fn server_stream(
        &self,
        request: Request<EchoRequest>,
    ) -> Result<Response<Replies>, Status> {
        let active = self.start_call();
        let asked = request.get_ref().clone();
        if asked.count == 0 {
            self.reply(asked.clone(), 0).await?;
        }
        let this = self.clone();
        let fails = asked.fail_with != 0;
        let last = u64::from(asked.count) + u64::from(fails);
        let replies = stream::iter(0..last).then(move |index| {
            // Dropped with the stream.
            let _active = &active;
            let (this, mut asked) = (this.clone(), asked.clone());
            async move {
                if index < u64::from(asked.count) {
                    asked.fail_with = 0;
                }
                this.reply(asked, index).await
            }
        });
        Ok(self.respond(&request, replies.boxed()))
    }

    async fn client_stream(
        &self,
        request: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<EchoReply>, Status> {
        let _active = self.start_call();
        let mut response = self.respond(&request, EchoReply::default());
        let mut requests = request.into_inner();
        let mut received = 0;
        while let Some(one) = requests.message().await? {
            received += one.payload.len() as u64;
            self.reply(one, 0).await?;
        }
        *response.get_mut() = self.reply(EchoRequest::default(), received).await?;
        Ok(response)
    }

    type BidiStream = Replies;

    async fn bidi(
        &self,
        request: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<Replies>, Status> {
        let active = self.start_call();
        let mut response = self.respond(&request, ());
        let metadata = std::mem::take(response.metadata_mut());
        let this = self.clone();
        let replies = request.into_inner().enumerate().then(move |(index, one)| {
            let _active = &active;
            let this = this.clone();
            async move { this.reply(one?, index as u64).await }
        });
        let mut response = Response::new(replies.boxed());
        *response.metadata_mut() = metadata;
        Ok(response)
    }
}

/// How to start an [`EchoServer`].
#[derive(Default)]
pub struct Options {
    /// Default: a free port of loopback.
    pub address: Option<String>,
    /// The delay before each reply.
    pub delay: Duration,
    pub max_concurrent_streams: Option<u32>,
    pub max_connection_age: Option<Duration>,
    #[cfg(feature = "_tls")]
    pub tls: Option<tonic::transport::ServerTlsConfig>,
}

/// A server on its own thread. Dropping it closes all connections at once, as a crash does.
pub struct EchoServer {
    address: String,
    counts: Arc<Counts>,
    graceful: Option<oneshot::Sender<()>>,
    hard: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl EchoServer {
    pub fn start() -> Self {
        Self::start_with(Options::default())
    }

    /// Starts a server on the address of an earlier one.
    pub fn start_at(address: &str) -> Self {
        Self::start_with(Options {
            address: Some(address.to_owned()),
            ..Options::default()
        })
    }

    pub fn start_with(options: Options) -> Self {
        let address = options.address.as_deref().unwrap_or("127.0.0.1:0");
        let listener = bind(address);
        let address = listener.local_addr().unwrap().to_string();
        let counts = Arc::<Counts>::default();
        let echoing = EchoService {
            name: address.clone(),
            delay: options.delay,
            counts: Arc::clone(&counts),
        };
        let mut server = Server::builder().max_concurrent_streams(options.max_concurrent_streams);
        if let Some(age) = options.max_connection_age {
            server = server.max_connection_age(age);
        }
        #[cfg(feature = "_tls")]
        if let Some(tls) = options.tls {
            server = server.tls_config(tls).unwrap();
        }
        let (graceful, graceful_requested) = oneshot::channel::<()>();
        let (hard, hard_requested) = oneshot::channel::<()>();
        let accepted = Arc::clone(&counts);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let serving = server
                    .add_service(echoing.service())
                    .serve_with_incoming_shutdown(incoming(listener, accepted), async {
                        if graceful_requested.await.is_err() {
                            std::future::pending().await
                        }
                    });
                tokio::select! {
                    served = serving => served.unwrap(),
                    _ = hard_requested => {}
                }
            });
            runtime.shutdown_background();
        });
        Self {
            address,
            counts,
            graceful: Some(graceful),
            hard: Some(hard),
            thread: Some(thread),
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Starts a graceful shutdown: no new connections and calls; calls in progress finish.
    pub fn begin_shutdown(&mut self) {
        if let Some(graceful) = self.graceful.take() {
            graceful.send(()).ok();
        }
    }

    /// Whether the server has shut down.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Shuts down gracefully and waits until all calls have ended.
    pub async fn shutdown(mut self) {
        self.begin_shutdown();
        super::wait_until("the server has finished its calls", async || {
            self.has_ended()
        })
        .await;
    }
}

impl Drop for EchoServer {
    fn drop(&mut self) {
        if let Some(hard) = self.hard.take() {
            hard.send(()).ok();
        }
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Binds a listener, again while the address is in use: when another test starts a process, the
/// child holds a copy of every socket for a moment, even of a listener that has just been closed.
pub fn bind(address: &str) -> TcpListener {
    let deadline = Instant::now() + super::PATIENCE;
    loop {
        match TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true).unwrap();
                return listener;
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(super::POLL);
            }
            Err(error) => panic!("{address}: {error}"),
        }
    }
}

pub(super) fn incoming(
    listener: TcpListener,
    counts: Arc<Counts>,
) -> impl Stream<Item = io::Result<CountedIo<tokio::net::TcpStream>>> {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    stream::unfold((listener, counts), |(listener, counts)| async move {
        let accepted = listener.accept().await.map(|(io, _)| {
            io.set_nodelay(true).ok();
            CountedIo::new(io, Arc::clone(&counts))
        });
        Some((accepted, (listener, counts)))
    })
}

/// A connection that is counted until it is dropped.
pub(super) struct CountedIo<T> {
    io: T,
    counts: Arc<Counts>,
}

impl<T> CountedIo<T> {
    fn new(io: T, counts: Arc<Counts>) -> Self {
        counts.connections.fetch_add(1, Ordering::SeqCst);
        counts.accepted.fetch_add(1, Ordering::SeqCst);
        Self { io, counts }
    }
}

impl<T> Drop for CountedIo<T> {
    fn drop(&mut self) {
        self.counts.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

impl<T: Connected> Connected for CountedIo<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for CountedIo<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for CountedIo<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
