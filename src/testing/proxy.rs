//! A network between client and server that a test can cut.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::port::Port;
use super::{Result, TestingError};

/// A TCP proxy on a loopback port: put between a client and a server, it is the network that fails.
///
/// | | connections that are open | new ones |
/// |---|---|---|
/// | forwarding (at first, and after [`restore`](Self::restore)) | flow | are forwarded |
/// | [`cut`](Self::cut) | are closed | are refused |
/// | [`blackhole`](Self::blackhole) | stay open, silent | are accepted, silent |
/// | [`disconnect`](Self::disconnect) | are closed | are forwarded |
///
/// Its port stays the same throughout, and nobody else gets it. When the server behind it is not there,
/// a new connection is accepted and closed at once: a proxy cannot refuse on another's behalf.
///
/// Cloning gives another handle to the same proxy; when the last drops, the port and all connections
/// are closed. It works on the runtime that started it, and ends with that.
#[derive(Clone)]
pub struct Proxy {
    inner: Arc<Inner>,
}

struct Inner {
    port: Port,
    acceptor: tokio::sync::Mutex<Option<Acceptor>>,
    shared: Arc<Shared>,
}

/// What the connections look at.
struct Shared {
    target: Mutex<String>,
    weather: watch::Sender<Weather>,
    open: AtomicUsize,
    accepted: AtomicU64,
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
}

#[derive(Clone, Copy, Default)]
struct Weather {
    silent: bool,
    delay: Duration,
}

impl Proxy {
    /// Starts forwarding to `target`, as `host:port`, such as [`Etcd::endpoint`](super::Etcd::endpoint).
    /// The target need not be there yet.
    ///
    /// # Errors
    ///
    /// When no port can be had.
    pub async fn start(target: impl Into<String>) -> Result<Self> {
        let proxy = Self {
            inner: Arc::new(Inner {
                port: Port::claim().map_err(TestingError::io("finding a free loopback port"))?,
                acceptor: tokio::sync::Mutex::new(None),
                shared: Arc::new(Shared {
                    target: Mutex::new(target.into()),
                    weather: watch::Sender::default(),
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

    /// Where to connect to, as `127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        self.inner.port.endpoint()
    }

    /// Sends new connections to another target; open ones stay with theirs.
    pub fn set_target(&self, target: impl Into<String>) {
        *self.inner.shared.lock_target() = target.into();
    }

    /// Closes all connections and refuses new ones; both are done when this returns.
    pub async fn cut(&self) {
        if let Some(acceptor) = self.inner.acceptor.lock().await.take() {
            acceptor.end().await;
        }
    }

    /// Closes all connections; new ones are forwarded (unless the proxy is cut or silent).
    ///
    /// # Errors
    ///
    /// When another program has taken the port in between.
    pub async fn disconnect(&self) -> Result<()> {
        let mut acceptor = self.inner.acceptor.lock().await;
        if let Some(running) = acceptor.take() {
            running.end().await;
            *acceptor = Some(self.listen().await?);
        }
        Ok(())
    }

    /// Lets nothing through, either way, the end of a connection included, and closes nothing. What
    /// arrives meanwhile waits, as TCP would send it again, and flows after [`restore`](Self::restore).
    /// Of what is on its way at this moment, a last piece may still be delivered.
    pub fn blackhole(&self) {
        let weather = &self.inner.shared.weather;
        weather.send_modify(|weather| weather.silent = true);
    }

    /// Holds each piece of data (up to 16 KiB) back for this long, in both directions; zero ends it.
    pub fn delay(&self, delay: Duration) {
        let weather = &self.inner.shared.weather;
        weather.send_modify(|weather| weather.delay = delay);
    }

    /// Forwards again after [`cut`](Self::cut) or [`blackhole`](Self::blackhole), without delay.
    ///
    /// # Errors
    ///
    /// When another program has taken the port in between.
    pub async fn restore(&self) -> Result<()> {
        self.inner.shared.weather.send_replace(Weather::default());
        let mut acceptor = self.inner.acceptor.lock().await;
        if acceptor.is_none() {
            *acceptor = Some(self.listen().await?);
        }
        Ok(())
    }

    /// How many connections are open now.
    pub fn connections(&self) -> usize {
        self.inner.shared.open.load(Ordering::Relaxed)
    }

    /// How many connections have been accepted so far.
    pub fn accepted(&self) -> u64 {
        self.inner.shared.accepted.load(Ordering::Relaxed)
    }

    /// How many bytes have gone from clients to the target so far.
    pub fn bytes_up(&self) -> u64 {
        self.inner.shared.bytes_up.load(Ordering::Relaxed)
    }

    /// How many bytes have gone from the target to clients so far.
    pub fn bytes_down(&self) -> u64 {
        self.inner.shared.bytes_down.load(Ordering::Relaxed)
    }

    async fn listen(&self) -> Result<Acceptor> {
        let listener = TcpListener::bind(self.endpoint())
            .await
            .map_err(TestingError::io("listening as a proxy"))?;
        let (stop, stopped) = oneshot::channel();
        let shared = Arc::clone(&self.inner.shared);
        let task = tokio::spawn(accept(listener, shared, stopped));
        Ok(Acceptor { task, stop })
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("endpoint", &self.endpoint())
            .field("target", &*self.inner.shared.lock_target())
            .field("connections", &self.connections())
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock_target(&self) -> std::sync::MutexGuard<'_, String> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The task that owns the listener and the connections. Dropping this ends it, some time soon.
struct Acceptor {
    task: JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl Acceptor {
    /// Ends it and waits until every socket is closed.
    async fn end(self) {
        drop(self.stop);
        // It can only fail by a panic, which the test's output shows.
        let _ = self.task.await;
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, mut stopped: oneshot::Receiver<()>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    shared.accepted.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(forward(client, Open::new(&shared)));
                }
                // Out of file descriptors, most likely: leave some time for them to come back.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

/// Counts a connection for as long as it is open.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn forward(client: TcpStream, open: Open) {
    let shared = &*open.0;
    let mut weather = shared.weather.subscribe();
    until_heard(&mut weather).await;
    let target = shared.lock_target().clone();
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    // A proxy that waits for more to send would be a delay of its own.
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // An error either way ends both: half a broken connection helps nobody.
    let _ = tokio::try_join!(
        pump(from_client, to_server, weather.clone(), &shared.bytes_up),
        pump(from_server, to_client, weather, &shared.bytes_down),
    );
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    bytes: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let read = from.read(&mut buffer).await?;
        let delay = weather.borrow().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        until_heard(&mut weather).await;
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
        bytes.fetch_add(read as u64, Ordering::Relaxed);
    }
}

/// Waits while the proxy is a black hole.
async fn until_heard(weather: &mut watch::Receiver<Weather>) {
    // It fails when the proxy is gone; then this connection is about to be dropped.
    let _ = weather.wait_for(|weather| !weather.silent).await;
}
