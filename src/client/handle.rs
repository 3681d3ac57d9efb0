//! The client itself: its connection, its end, and how each of its calls is bounded.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::transport::{self, Transport};
use super::wire::{self, Route};
use crate::backoff::Backoff;
use crate::balance::Tried;
use crate::config::Config;
use crate::error::{Error, Result};

/// How long a member is given to open a stream before another is asked. What etcd does for it takes
/// milliseconds.
pub(super) const STREAM_OPENS_WITHIN: Duration = Duration::from_millis(1500);

/// What etcd says of a token that is older than its users and roles (`ErrAuthOldRevision`).
pub(super) const OLD_TOKEN: &str = "revision of auth store is old";

/// A client of one etcd cluster.
///
/// Clones are cheap and share the connection, which ends with [`close`](Client::close), or when
/// the last clone and everything made from it are gone. Dropping the future of a call abandons
/// the call; a write that was under way may have happened or not.
///
/// ```no_run
/// # async fn example() -> goo_etcd::Result<()> {
/// use goo_etcd::{Client, Config, GetOptions};
///
/// let client = Client::new("main", Config::default()).await?;
/// client.put("config/a", "1", None).await?;
/// let answer = client.get("config/", GetOptions::new().with_prefix()).await?;
/// assert_eq!(answer.kvs()[0].value(), b"1");
/// client.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Client {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    name: String,
    pub(super) config: Config,
    pub(super) transport: Transport,
    pub(super) closed: CancellationToken,
}

impl Client {
    /// Connects to etcd. The name appears in errors and logs; it need not be unique.
    ///
    /// Returns when a member has answered. While none does, it keeps trying for
    /// [`Config::dial_timeout`].
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for what [`Config::validate`] refuses and for unreadable certificates,
    /// [`Error::Unreachable`] when no member answered in time, [`Error::Rpc`] at once when etcd
    /// refuses the user.
    pub async fn new(name: impl Into<String>, config: Config) -> Result<Self> {
        let (name, closed) = begin(name, &config)?;
        // Nothing stays behind when this fails or is dropped half-way.
        let guard = closed.clone().drop_guard();
        let transport = Transport::connect(&config, &closed).await?;
        guard.disarm();
        Ok(Self::of(name, config, transport, closed))
    }

    /// The same without waiting for a member to answer: for a process that may be started before etcd
    /// is there, or while it is away. It connects in the background, for as long as it takes.
    ///
    /// Calls wait for a member within their time, and the first one authenticates. So
    /// [`Registrar::register_eventually`](crate::Registrar::register_eventually) gets there once etcd
    /// does, and a directory with a [`cache_dir`](crate::DirectoryBuilder::cache_dir) serves what was
    /// last known until then. The raw [`client`](Self::client) has the user from the first call of this
    /// one on.
    ///
    /// ```no_run
    /// # async fn example() -> goo_etcd::Result<()> {
    /// use goo_etcd::{Client, Config, Instance, Registrar};
    ///
    /// let client = Client::connect_lazy("main", Config::default()).await?;
    /// let instance = Instance::new("greeter", "10.0.0.5:50051");
    /// let registration = Registrar::new(&client).register_eventually(instance)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], as for [`new`](Self::new). What only etcd can tell, such as a wrong password,
    /// each call says.
    pub async fn connect_lazy(name: impl Into<String>, config: Config) -> Result<Self> {
        let (name, closed) = begin(name, &config)?;
        let transport = Transport::lazy(&config, &closed).await?;
        Ok(Self::of(name, config, transport, closed))
    }

    fn of(name: String, config: Config, transport: Transport, closed: CancellationToken) -> Self {
        Client {
            inner: Arc::new(Inner {
                name,
                config,
                transport,
                closed,
            }),
        }
    }

    /// What tells this client and its clones from the others that are there.
    pub(crate) fn identity(&self) -> usize {
        Arc::as_ptr(&self.inner).addr()
    }

    /// The name given to [`Client::new`].
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// How long a call may take.
    pub(crate) fn request_timeout(&self) -> Duration {
        self.inner.config.request_timeout
    }

    /// The `etcd-client` beneath, for what this crate does not wrap. It shares the connections,
    /// the user and the limits of messages, and reads no answer of more than 4 MiB, whatever
    /// [`Config::max_call_recv_msg_size`] is; only its `kv_client()` and `watch_client()` can be told to
    /// read larger ones, by `max_decoding_message_size`. Its calls have no time limit, and its errors are
    /// its own. After [`close`](Self::close) its calls fail, and its open streams end.
    pub fn client(&self) -> etcd_client::Client {
        self.inner.transport.raw.clone()
    }

    /// Closes the connections. Every call under way and every open [`Watch`] and [`KeepAlive`],
    /// of all clones, ends with [`Error::Closed`], as does everything tried later. Closing twice
    /// is fine.
    ///
    /// # Errors
    ///
    /// None today; the signature leaves room for a farewell that takes a round trip.
    pub async fn close(&self) -> Result<()> {
        self.inner.closed.cancel();
        self.inner.transport.wire.close();
        Ok(())
    }

    /// Whether [`close`](Self::close) was called on this client or a clone.
    pub fn is_closed(&self) -> bool {
        self.inner.closed.is_cancelled()
    }

    /// Tests the connection: one round trip to a member.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] without an answer in [`Config::request_timeout`], [`Error::Rpc`] when
    /// the way to it fails, [`Error::Closed`].
    pub async fn ping(&self) -> Result<()> {
        let mut maintenance = self.inner.transport.maintenance.clone();
        self.bounded(|| "ping".to_owned(), async {
            transport::answered(maintenance.status().await, "ping")
        })
        .await
    }

    /// One call to etcd: bounded in time, ended by `close`, its error with what was tried.
    pub(super) async fn call<T>(
        &self,
        operation: impl Fn() -> String,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T> {
        // By reference from here on: whoever takes a future by value makes room for it twice.
        let call = pin!(call);
        self.bounded(&operation, async {
            call.await
                .map_err(|error| Error::from_etcd(operation(), error))
        })
        .await
    }

    pub(super) async fn bounded<T>(
        &self,
        operation: impl Fn() -> String,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let after = self.inner.config.request_timeout;
        let work = pin!(work);
        self.unless_closed(async {
            let work = async {
                self.inner.transport.sign_in(&self.inner.config).await?;
                work.await
            };
            match tokio::time::timeout(after, work).await {
                Ok(result) => result,
                Err(_) => Err(self.late(operation(), after)),
            }
        })
        .await
    }

    /// What a call that got no answer in time failed of.
    fn late(&self, operation: String, after: Duration) -> Error {
        match self.inner.transport.wire.unready() {
            Some(reason) => Error::Rpc {
                operation,
                status: Box::new(tonic::Status::unavailable(format!(
                    "no etcd member was connected for {after:?}: {reason}"
                ))),
            },
            None => Error::Timeout { operation, after },
        }
    }

    /// Opens a stream. A member that cannot, or does not in time, is left for another, until the
    /// time of a request is over; one that is going down may end the new stream in any way that a read is
    /// sent again for.
    pub(super) async fn opened_stream<T, F: Future<Output = Result<T>>>(
        &self,
        operation: impl Fn() -> String,
        open: impl Fn() -> F,
    ) -> Result<T> {
        self.opened_stream_within(STREAM_OPENS_WITHIN, operation, open)
            .await
    }

    /// The same, with so long for each member.
    pub(super) async fn opened_stream_within<T, F: Future<Output = Result<T>>>(
        &self,
        within: Duration,
        operation: impl Fn() -> String,
        open: impl Fn() -> F,
    ) -> Result<T> {
        let route = Route {
            only: None,
            tried: Some(Tried::default()),
        };
        let attempts = route.of(async {
            let mut pauses = Backoff::for_etcd();
            let (begun, limit) = (Instant::now(), self.request_timeout());
            loop {
                // Whoever waits for it has time left to be told.
                let is_late = || begun.elapsed() >= limit / 2;
                // Boxed: rare, and large.
                match tokio::time::timeout(within, Box::pin(open())).await {
                    Ok(Err(error)) if error.code().is_some_and(wire::is_passing) => {
                        tracing::debug!(%error, "a stream was not opened");
                        // Not what a cluster says that is choosing a leader, for as long as that takes:
                        // what every member keeps saying is told, and not that time ran out.
                        if error.code() != Some(tonic::Code::Unavailable) && is_late() {
                            return Err(error);
                        }
                    }
                    Ok(result) => return result,
                    Err(_) => tracing::debug!(operation = operation(), "no answer to a new stream"),
                }
                if is_late() && self.inner.transport.wire.unready().is_some() {
                    return Err(self.late(operation(), begun.elapsed()));
                }
                tokio::time::sleep(pauses.next()).await;
            }
        });
        let attempts = pin!(attempts);
        self.bounded(&operation, attempts).await
    }

    /// The work's result, or [`Error::Closed`] as soon as the client is closed.
    pub(super) async fn unless_closed<T>(
        &self,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut work = pin!(work);
        tokio::select! {
            biased;
            () = self.inner.closed.cancelled() => Err(self.closed()),
            result = &mut work => result,
        }
    }

    pub(super) fn closed(&self) -> Error {
        Error::Closed {
            name: self.inner.name.clone(),
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("name", &self.inner.name)
            .field("config", &self.inner.config)
            .field("closed", &self.is_closed())
            .finish()
    }
}

/// What can be said of a client before anything is sent.
fn begin(name: impl Into<String>, config: &Config) -> Result<(String, CancellationToken)> {
    let name = name.into();
    if name.is_empty() {
        return Err(Error::invalid("name", "", "a client needs a name"));
    }
    config.validate()?;
    Ok((name, CancellationToken::new()))
}

/// A key as errors and logs show it.
pub(super) fn shown(key: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(key))
}
