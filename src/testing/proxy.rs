//! A TCP proxy with which a test can cut the network between a client and a server.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use super::error::{Result, TestingError};
use super::port::Port;

/// The most bytes that are read at once.
const PIECE: usize = 16 * 1024;

/// The most bytes that are on the way in one direction of a connection.
const MAX_ON_THE_WAY: usize = 1024 * 1024;

/// The part of a second for which data is read at once while the rate is limited.
const PIECES_PER_SECOND: usize = 100;

/// A TCP proxy on a loopback port. Between a client and a server, it is the network that fails.
///
/// | | open connections | new connections |
/// |---|---|---|
/// | forwarding (at first, and after [`restore`](Self::restore)) | flow | are forwarded |
/// | [`cut`](Self::cut) | are closed | are refused |
/// | [`blackhole`](Self::blackhole) | stay open, silent | are accepted, silent |
/// | [`disconnect`](Self::disconnect) | are closed | are forwarded |
///
/// The port stays the same and reserved. While the target is down, a new connection is accepted and
/// closed at once, because a proxy cannot refuse connections for its target.
///
/// Cloning gives another handle to the same proxy. When the last handle drops, the port and all
/// connections are closed. The proxy runs on the runtime that started it and ends with that
/// runtime.
#[derive(Clone)]
#[must_use = "dropping the last handle closes the proxy and all its connections"]
pub struct Proxy {
    inner: Arc<Inner>,
}

struct Inner {
    port: Port,
    acceptor: tokio::sync::Mutex<Option<Acceptor>>,
    state: Arc<ProxyState>,
}

/// State shared with the connections.
struct ProxyState {
    target: Mutex<String>,
    link: watch::Sender<LinkState>,
    open: AtomicUsize,
    accepted: AtomicU64,
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
}

/// How data is forwarded.
#[derive(Clone, Copy, Default)]
struct LinkState {
    is_silent: bool,
    delay: Duration,
    /// In bytes per second. Zero is no limit.
    rate: u32,
}

impl LinkState {
    /// The most bytes that are read at once.
    fn piece(&self) -> usize {
        match self.rate {
            0 => PIECE,
            rate => (rate as usize / PIECES_PER_SECOND).clamp(1, PIECE),
        }
    }

    /// The time that this many bytes take at the limited rate.
    fn time_of(&self, bytes: usize) -> Duration {
        match self.rate {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(bytes as f64 / f64::from(rate)),
        }
    }
}

impl Proxy {
    /// Starts forwarding to `target`, given as `host:port`, such as
    /// [`Etcd::endpoint`](super::Etcd::endpoint). The target may be down.
    ///
    /// # Errors
    ///
    /// Fails if there is no free port.
    pub async fn start(target: impl Into<String>) -> Result<Self> {
        let proxy = Self {
            inner: Arc::new(Inner {
                port: Port::claim().map_err(TestingError::io("finding a free loopback port"))?,
                acceptor: tokio::sync::Mutex::new(None),
                state: Arc::new(ProxyState {
                    target: Mutex::new(target.into()),
                    link: watch::Sender::default(),
                    open: AtomicUsize::new(0),
                    accepted: AtomicU64::new(0),
                    bytes_up: AtomicU64::new(0),
                    bytes_down: AtomicU64::new(0),
                }),
            }),
        };
        proxy.restore().await?;
        Ok(proxy)
    }

    /// The endpoint of the proxy, as `127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        self.inner.port.endpoint()
    }

    /// Sends new connections to another target. Open connections keep theirs.
    pub fn set_target(&self, target: impl Into<String>) {
        *self.inner.state.target.lock() = target.into();
    }

    /// Closes all connections and refuses new ones. Both are in effect when this method returns.
    pub async fn cut(&self) {
        if let Some(acceptor) = self.inner.acceptor.lock().await.take() {
            acceptor.stop().await;
        }
    }

    /// Closes all connections. New ones are forwarded unless the proxy is cut or silent.
    ///
    /// # Errors
    ///
    /// Fails if another program has taken the port in between.
    pub async fn disconnect(&self) -> Result<()> {
        let mut acceptor = self.inner.acceptor.lock().await;
        if let Some(running) = acceptor.take() {
            running.stop().await;
            *acceptor = Some(self.listen().await?);
        }
        Ok(())
    }

    /// Stops forwarding in both directions, including the end of a connection, without closing any
    /// connection. Data that arrives in the meantime is forwarded after [`restore`](Self::restore),
    /// as TCP would retransmit it. One piece of data that is being forwarded may still arrive.
    pub fn blackhole(&self) {
        let link = &self.inner.state.link;
        link.send_modify(|link| link.is_silent = true);
    }

    /// Delays all data by this time in both directions, like a long-distance link: data that is sent
    /// meanwhile does not wait longer. In each direction of a connection, up to 1 MiB is on the way
    /// at a time. Zero ends the delay for data that is sent from then on.
    pub fn delay(&self, delay: Duration) {
        let link = &self.inner.state.link;
        link.send_modify(|link| link.delay = delay);
    }

    /// Forwards at most this many bytes per second, in each direction of each connection. Zero ends
    /// the limit.
    pub fn limit_rate(&self, bytes_per_second: u32) {
        let link = &self.inner.state.link;
        link.send_modify(|link| link.rate = bytes_per_second);
    }

    /// Forwards again after [`cut`](Self::cut) or [`blackhole`](Self::blackhole), and ends a
    /// [`delay`](Self::delay) and a [limited rate](Self::limit_rate).
    ///
    /// # Errors
    ///
    /// Fails if another program has taken the port in between.
    pub async fn restore(&self) -> Result<()> {
        self.inner.state.link.send_replace(LinkState::default());
        let mut acceptor = self.inner.acceptor.lock().await;
        if acceptor.is_none() {
            *acceptor = Some(self.listen().await?);
        }
        Ok(())
    }

    /// The number of open connections.
    pub fn connections(&self) -> usize {
        self.inner.state.open.load(Ordering::Relaxed)
    }

    /// The number of connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.inner.state.accepted.load(Ordering::Relaxed)
    }

    /// The number of bytes forwarded from clients to the target so far.
    pub fn bytes_up(&self) -> u64 {
        self.inner.state.bytes_up.load(Ordering::Relaxed)
    }

    /// The number of bytes forwarded from the target to clients so far.
    pub fn bytes_down(&self) -> u64 {
        self.inner.state.bytes_down.load(Ordering::Relaxed)
    }

    async fn listen(&self) -> Result<Acceptor> {
        let listener = self
            .inner
            .port
            .listen()
            .await
            .map_err(TestingError::io("listening as a proxy"))?;
        let (stop, stopped) = oneshot::channel();
        let state = Arc::clone(&self.inner.state);
        let task = tokio::spawn(accept(listener, state, stopped));
        Ok(Acceptor { task, stop })
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("endpoint", &self.endpoint())
            .field("target", &*self.inner.state.target.lock())
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

/// The task that owns the listener and the connections. The task ends soon after this drops.
struct Acceptor {
    task: JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl Acceptor {
    /// Stops the task and waits until all sockets are closed.
    async fn stop(self) {
        drop(self.stop);
        // An error means a panic, which is already in the test's output.
        let _ = self.task.await;
    }
}

async fn accept(listener: TcpListener, state: Arc<ProxyState>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    state.accepted.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(forward(client, OpenConnection::new(&state)));
                }
                // Most likely the process has no free file descriptor: pause, then try again.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// Counts a connection as open until dropped.
struct OpenConnection(Arc<ProxyState>);

impl OpenConnection {
    fn new(state: &Arc<ProxyState>) -> Self {
        state.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(state))
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn forward(client: TcpStream, open: OpenConnection) {
    let state = &*open.0;
    let mut link = state.link.subscribe();
    wait_until_open(&mut link).await;
    let target = state.target.lock().clone();
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    // Nagle's algorithm would add a delay.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // An error in one direction ends both.
    let _ = tokio::try_join!(
        pump(from_client, to_server, link.clone(), &state.bytes_up),
        pump(from_server, to_client, link, &state.bytes_down),
    );
}

/// A piece of data on its way. No data means the end of the connection.
struct Piece {
    data: Vec<u8>,
    due: Instant,
    /// The piece's part of [`MAX_ON_THE_WAY`].
    _room: OwnedSemaphorePermit,
}

/// Forwards one direction of a connection.
async fn pump(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    link: watch::Receiver<LinkState>,
    bytes: &AtomicU64,
) -> io::Result<()> {
    let (pieces, on_the_way) = mpsc::unbounded_channel();
    let reading = read_pieces(from, link.clone(), pieces);
    let writing = write_pieces(to, link, on_the_way, bytes);
    tokio::try_join!(reading, writing).map(drop)
}

async fn read_pieces(
    mut from: OwnedReadHalf,
    mut link: watch::Receiver<LinkState>,
    pieces: mpsc::UnboundedSender<Piece>,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(MAX_ON_THE_WAY));
    let mut buffer = vec![0; PIECE];
    loop {
        // The rate may change while the connection is idle.
        from.readable().await?;
        let piece = link.borrow().piece();
        let read = from.read(buffer.split_at_mut(piece).0).await?;
        let state = *link.borrow();
        let transfer = state.time_of(read);
        if !transfer.is_zero() {
            sleep(transfer).await;
        }
        let due = Instant::now() + state.delay;
        wait_until_open(&mut link).await;
        let data = buffer.get(..read).unwrap_or_default().to_vec();
        let taken = Arc::clone(&room).acquire_many_owned(read as u32).await;
        let Ok(_room) = taken else { return Ok(()) };
        // An error means that writing has failed.
        if pieces.send(Piece { data, due, _room }).is_err() || read == 0 {
            return Ok(());
        }
    }
}

async fn write_pieces(
    mut to: OwnedWriteHalf,
    mut link: watch::Receiver<LinkState>,
    mut on_the_way: mpsc::UnboundedReceiver<Piece>,
    bytes: &AtomicU64,
) -> io::Result<()> {
    while let Some(Piece { data, due, _room }) = on_the_way.recv().await {
        if due > Instant::now() {
            sleep_until(due).await;
        }
        wait_until_open(&mut link).await;
        if data.is_empty() {
            return to.shutdown().await;
        }
        to.write_all(&data).await?;
        bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Waits while the proxy is a black hole.
async fn wait_until_open(link: &mut watch::Receiver<LinkState>) {
    // An error means that the proxy is gone; then this connection is dropped soon.
    let _ = link.wait_for(|link| !link.is_silent).await;
}
