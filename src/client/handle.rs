//! [`Client`]: how it is created, and the bounds that every call gets.

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::held_leases::HeldLeases;
use super::transport::{self, CallOptions, Transport};
use crate::backoff::Backoff;
use crate::balance::{AttemptRecord, AttemptedEndpoints};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::runtime;

/// How long one member may take to open a stream before another is tried. etcd itself needs
/// milliseconds.
const STREAM_OPEN_TIMEOUT: Duration = Duration::from_millis(1500);

/// A client of one etcd cluster.
///
/// Clones are cheap and share the connections. The connections end with [`close`](Client::close),
/// or when the last clone and everything created from it (watches, locks, registrars, directories)
/// are dropped.
///
/// A client may be used on several Tokio runtimes. The tasks behind its connections run on the
/// runtime that built it; when that runtime ends, every call fails with [`Error::RuntimeEnded`].
///
/// Dropping the future of a call cancels the call. A write that was in progress may or may not have
/// been applied.
///
/// ```no_run
/// # async fn example() -> goo_etcd::Result<()> {
/// use goo_etcd::{Client, Config, GetOptions};
///
/// let client = Client::connect("main", Config::default()).await?;
/// client.put("config/a", "1", None).await?;
/// let response = client.get("config/", GetOptions::new().with_prefix()).await?;
/// assert_eq!(response.kvs()[0].value(), b"1");
/// client.close().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use = "dropping the last clone of a client closes its connections"]
pub struct Client {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    name: String,
    pub(super) config: Config,
    pub(super) transport: Transport,
    pub(super) closed: CancellationToken,
    pub(super) held_leases: HeldLeases,
    extensions: Mutex<http::Extensions>,
}

impl Client {
    /// Connects to etcd. `name` appears in errors and logs; it need not be unique.
    ///
    /// Returns once a member has responded. Until then the client retries, for at most
    /// [`Config::dial_timeout`] (5 s by default). Dropping the future closes the connections.
    ///
    /// # Errors
    ///
    /// - [`Error::Invalid`]: `name` is empty, [`Config::validate`] refuses the configuration, or a
    ///   certificate cannot be read.
    /// - [`Error::Unreachable`]: no member responded in time.
    /// - [`Error::Rpc`], at once: etcd refuses the user.
    /// - [`Error::NoRuntime`] outside of a Tokio runtime with timers and I/O.
    pub async fn connect(name: impl Into<String>, config: Config) -> Result<Self> {
        let (name, closed) = validate(name, &config)?;
        // Stops the background tasks if connecting fails or this future is dropped.
        let guard = closed.clone().drop_guard();
        let transport = Transport::connect(&config, &closed).await?;
        guard.disarm();
        Ok(Self::from_parts(name, config, transport, closed))
    }

    /// The same as [`connect`](Self::connect), named as in the Go library.
    ///
    /// # Errors
    ///
    /// The errors of [`connect`](Self::connect).
    pub async fn new(name: impl Into<String>, config: Config) -> Result<Self> {
        Self::connect(name, config).await
    }

    /// Creates a client that connects in the background and retries until it is closed. Use it in a
    /// process that may start before etcd does, or while etcd is down.
    ///
    /// Calls wait for a connected member within their own time limit, and the first call
    /// authenticates. With such a client,
    /// [`Registrar::register_eventually`](crate::Registrar::register_eventually) registers once
    /// etcd is reachable, and a directory with a [`cache_dir`](crate::DirectoryBuilder::cache_dir)
    /// serves the last known instances until then. The raw [`client`](Self::client) is
    /// authenticated only after the first call of this client.
    ///
    /// ```no_run
    /// # async fn example() -> goo_etcd::Result<()> {
    /// use goo_etcd::{Client, Config, Instance, Registrar};
    ///
    /// let client = Client::connect_lazy("main", Config::default())?;
    /// let instance = Instance::new("greeter", "10.0.0.5:50051");
    /// let registration = Registrar::new(&client).register_eventually(instance)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`], as for [`connect`](Self::connect). Errors that only etcd can report,
    /// such as a wrong password, are returned by each call. [`Error::NoRuntime`] outside of a Tokio
    /// runtime, because the connections are background tasks.
    pub fn connect_lazy(name: impl Into<String>, config: Config) -> Result<Self> {
        let (name, closed) = validate(name, &config)?;
        let transport = Transport::connect_lazy(&config, &closed)?;
        Ok(Self::from_parts(name, config, transport, closed))
    }

    fn from_parts(
        name: String,
        config: Config,
        transport: Transport,
        closed: CancellationToken,
    ) -> Self {
        Client {
            inner: Arc::new(Inner {
                name,
                config,
                transport,
                closed,
                held_leases: HeldLeases::default(),
                extensions: Mutex::default(),
            }),
        }
    }

    /// The data that another module keeps with this client and its clones, by type. Created with
    /// its default value on first use.
    pub(crate) fn extension<T: Default + Send + Sync + 'static>(&self) -> Arc<T> {
        let mut extensions = self.inner.extensions.lock();
        Arc::clone(extensions.get_or_insert_default::<Arc<T>>())
    }

    /// The name given to [`Client::connect`].
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The time limit of a call, [`Config::request_timeout`].
    pub(crate) fn request_timeout(&self) -> Duration {
        self.inner.config.request_timeout
    }

    /// A raw `etcd-client`, with the etcd APIs that this crate does not wrap. The raw client shares
    /// the connections, the user and the message limits of this one.
    ///
    /// Its calls have no time limit and return errors of `etcd-client`. Responses are limited to 4
    /// MiB, even where [`Config::max_call_recv_msg_size`] allows more. Only `kv_client()` and
    /// `watch_client()` can lift that limit, with `max_decoding_message_size`. After
    /// [`close`](Self::close) its calls fail and its open streams end. Do not give it
    /// another user, because leases are renewed as the configured user.
    pub fn client(&self) -> etcd_client::Client {
        self.inner.transport.raw.clone()
    }

    /// Tests the connection with one round trip to a member.
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`]: no response within [`Config::request_timeout`].
    /// - [`Error::NotConnected`]: no member was connected for that time.
    /// - [`Error::Rpc`]: the call failed.
    /// - [`Error::Closed`]: the client was closed.
    pub async fn ping(&self) -> Result<()> {
        let mut maintenance = self.inner.transport.maintenance.clone();
        self.with_timeout(|| "ping".to_owned(), async {
            transport::check_reachable(maintenance.status().await, "ping")
        })
        .await
    }

    /// Makes one call to etcd: with a time limit, ended by `close`, and with `operation` in its
    /// error.
    pub(super) async fn call<T>(
        &self,
        operation: impl Fn() -> String,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T> {
        // Passed on by reference, because an async fn that takes a future by value stores it twice.
        let call = pin!(call);
        self.with_timeout(&operation, async {
            call.await
                .map_err(|error| Error::from_etcd(operation(), error))
        })
        .await
    }

    /// Authenticates if needed, then runs `work`, both within `request_timeout`.
    pub(super) async fn with_timeout<T>(
        &self,
        operation: impl Fn() -> String,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        runtime::require(&operation)?;
        let limit = self.request_timeout();
        let work = pin!(work);
        let result = self.or_closed(async {
            let work = async {
                self.inner
                    .transport
                    .authenticate_once(&self.inner.config)
                    .await?;
                work.await
            };
            self.within(limit, &operation, work).await
        });
        result.await.map_err(|error| {
            if self.has_runtime_ended() {
                self.runtime_error(operation())
            } else {
                error
            }
        })
    }

    /// Whether the runtime has ended on which the client was built.
    pub(super) fn has_runtime_ended(&self) -> bool {
        self.inner.transport.rpc.has_runtime_ended()
    }

    /// The error after the end of the runtime on which the client was built.
    pub(super) fn runtime_error(&self, operation: String) -> Error {
        Error::RuntimeEnded {
            operation,
            what: "the client",
        }
    }

    /// The result of `work` within `limit`, or an error that names the members which the calls of
    /// `work` tried, with the last failure of each.
    ///
    /// If calls to `within` are nested, an attempt counts for each of them.
    pub(crate) async fn within<T>(
        &self,
        limit: Duration,
        operation: impl Fn() -> String,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let record = CallOptions::current().record.unwrap_or_default();
        self.within_recorded(limit, operation, record, work).await
    }

    /// [`within`](Self::within), where `record` gets the attempts.
    pub(crate) async fn within_recorded<T>(
        &self,
        limit: Duration,
        operation: impl Fn() -> String,
        record: AttemptRecord,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let options = CallOptions {
            record: Some(record.clone()),
            ..CallOptions::current()
        };
        let pinned = options.pinned.clone();
        match timeout(limit, options.scope(work)).await {
            Ok(result) => result,
            Err(_) if pinned.is_some() => {
                let (pinned, learners) = (pinned.as_ref(), Default::default());
                let operation = operation();
                Err(transport::timeout_error(
                    operation, limit, &record, pinned, &learners,
                ))
            }
            Err(_) => Err(self.timeout_error(operation(), limit, &record)),
        }
    }

    /// The error of an operation whose time is over.
    pub(crate) fn timeout_error(
        &self,
        operation: String,
        after: Duration,
        record: &AttemptRecord,
    ) -> Error {
        let transport = &self.inner.transport;
        transport.timeout_error(operation, after, record)
    }

    /// Why no member responded within the time of `record`'s operation.
    pub(super) fn no_response_reason(&self, record: &AttemptRecord) -> String {
        self.inner.transport.rpc.no_response_reason(record)
    }

    /// Opens a stream within `request_timeout`. Moves on to another member when one fails
    /// transiently, or does not open the stream within [`STREAM_OPEN_TIMEOUT`].
    pub(super) async fn open_stream<T, F: Future<Output = Result<T>>>(
        &self,
        operation: impl Fn() -> String,
        open: impl Fn() -> F,
    ) -> Result<T> {
        let options = CallOptions {
            attempted: Some(AttemptedEndpoints::default()),
            ..CallOptions::default()
        };
        let opened = pin!(options.scope(self.open_on_any_member(&operation, open)));
        self.with_timeout(&operation, opened).await
    }

    /// Calls `open` until it succeeds or fails for good.
    ///
    /// From half of `request_timeout` on, a failure ends the attempts if it says more than a
    /// timeout would. `Unavailable` does not: a cluster that elects a leader says so until it has
    /// one.
    async fn open_on_any_member<T, F: Future<Output = Result<T>>>(
        &self,
        operation: &impl Fn() -> String,
        open: impl Fn() -> F,
    ) -> Result<T> {
        let mut backoff = Backoff::for_etcd();
        let started = Instant::now();
        let record = CallOptions::current().record.unwrap_or_default();
        loop {
            // Boxed, because the future is large and opening a stream is rare.
            let failure = match timeout(STREAM_OPEN_TIMEOUT, Box::pin(open())).await {
                Ok(Err(error)) if error.code().is_some_and(transport::is_transient) => {
                    tracing::debug!(%error, "cannot open a stream, trying another member");
                    Some(error)
                }
                Ok(result) => return result,
                Err(_) => {
                    record.abandon_waiting();
                    let operation = operation();
                    tracing::debug!(
                        operation,
                        "no response to a new stream, trying another member"
                    );
                    None
                }
            };
            if self.has_runtime_ended() {
                return Err(self.runtime_error(operation()));
            }
            if started.elapsed() >= self.request_timeout() / 2 {
                match failure {
                    Some(error) if error.code() != Some(tonic::Code::Unavailable) => {
                        return Err(error);
                    }
                    _ if self.inner.transport.rpc.is_disconnected() => {
                        return Err(self.timeout_error(operation(), started.elapsed(), &record));
                    }
                    _ => {}
                }
            }
            sleep(backoff.next()).await;
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

/// Checks the arguments of a constructor, without sending anything.
fn validate(name: impl Into<String>, config: &Config) -> Result<(String, CancellationToken)> {
    let name = name.into();
    if name.is_empty() {
        return Err(Error::invalid("name", "", "a client needs a name"));
    }
    config.validate()?;
    Ok((name, CancellationToken::new()))
}

/// A key as errors and logs show it: quoted, with invalid UTF-8 replaced.
pub(super) fn display_key(key: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(key))
}
