//! The named clients of this process.
//!
//! Connect each client once at startup with [`register`] or [`register_default`], find it by name
//! everywhere with [`get_client`] or [`default`], and close all of them on exit with [`close_all`].
//! All functions are also exported at the root of the crate.
//!
//! ```no_run
//! # async fn example() -> goo_etcd::Result<()> {
//! use goo_etcd::{Config, clients};
//!
//! clients::register_default(Config::default()).await?;
//! let other = Config::builder().endpoints(["etcd.other:2379"]).build()?;
//! clients::register("other", other).await?;
//!
//! clients::default()?.put("here", "1", None).await?;
//! clients::get_client("other")?.put("there", "1", None).await?;
//! clients::close_all().await?;
//! # Ok(())
//! # }
//! ```

use std::collections::BTreeMap;

use futures::future::join_all;
use parking_lot::RwLock;

use crate::client::Client;
use crate::config::Config;
use crate::error::{Error, Result};

/// The name that [`register_default`] uses.
const DEFAULT: &str = "default";

static CLIENTS: NamedClients = NamedClients(RwLock::new(Clients::new()));

/// Connects a client and registers it under this name. Dropping the future registers nothing.
///
/// # Errors
///
/// - [`Error::ClientAlreadyRegistered`]: the name is taken. The registered client stays.
/// - [`Error::Closed`]: [`close_all`] was called while the client was connecting. The client is
///   closed.
/// - The errors of [`Client::connect`].
pub async fn register(name: impl Into<String>, config: Config) -> Result<()> {
    CLIENTS.register(name.into(), config, false).await
}

/// Connects a client, registers it under the name `default`, and makes it the default client.
///
/// # Errors
///
/// The errors of [`register`].
pub async fn register_default(config: Config) -> Result<()> {
    CLIENTS.register(DEFAULT.to_owned(), config, true).await
}

/// Removes the client of this name and closes it and all its clones. If it was the default client,
/// no client is the default afterwards.
///
/// # Errors
///
/// - [`Error::UnknownClient`]: no client has this name.
/// - The errors of [`Client::close`]. The client is removed nevertheless.
pub async fn unregister(name: impl AsRef<str>) -> Result<()> {
    let client = CLIENTS.0.write().remove(name.as_ref())?;
    client.close().await
}

/// Removes the default client and closes it. No client is the default afterwards.
///
/// # Errors
///
/// - [`Error::NoDefaultClient`]: no client is the default.
/// - The errors of [`unregister`].
pub async fn unregister_default() -> Result<()> {
    let client = {
        let mut clients = CLIENTS.0.write();
        let name = clients.default_name()?.to_owned();
        clients.remove(&name)?
    };
    client.close().await
}

/// The client of this name.
///
/// # Errors
///
/// [`Error::UnknownClient`], which lists the registered names.
pub fn get_client(name: impl AsRef<str>) -> Result<Client> {
    CLIENTS.0.read().get(name.as_ref()).cloned()
}

/// Makes the client of this name the default client.
///
/// # Errors
///
/// [`Error::UnknownClient`]. The default client does not change.
pub fn set_default(name: impl AsRef<str>) -> Result<()> {
    CLIENTS.0.write().set_default(name.as_ref())
}

/// The default client: the client of [`register_default`], or of the latest [`set_default`].
///
/// # Errors
///
/// [`Error::NoDefaultClient`].
pub fn default() -> Result<Client> {
    let clients = CLIENTS.0.read();
    clients.get(clients.default_name()?).cloned()
}

/// The raw `etcd-client` of the default client, as from [`Client::client`].
///
/// # Errors
///
/// [`Error::NoDefaultClient`].
pub fn get_default_client() -> Result<etcd_client::Client> {
    Ok(default()?.client())
}

/// Removes and closes all clients at the same time, including clients that are still connecting. A
/// client that fails to close does not keep the others open.
///
/// # Errors
///
/// [`Error::CloseAll`] with each failure. All clients are removed and closed nevertheless.
pub async fn close_all() -> Result<()> {
    CLIENTS.close_all().await
}

/// Tests the connection of the default client, as [`Client::ping`] does.
///
/// # Errors
///
/// - [`Error::NoDefaultClient`]: no client is the default.
/// - The errors of [`Client::ping`].
pub async fn ping() -> Result<()> {
    default()?.ping().await
}

/// The clients of the process. The lock is held for lookups in memory, never across an await.
struct NamedClients(RwLock<Clients>);

struct Clients {
    by_name: BTreeMap<String, Client>,
    /// A name in `by_name`.
    default: Option<String>,
    /// The number of calls of [`close_all`]. A client that started to connect before such a call
    /// must not be added after it.
    close_count: u64,
}

impl NamedClients {
    async fn register(&self, name: String, config: Config, as_default: bool) -> Result<()> {
        let close_count = {
            let clients = self.0.read();
            clients.ensure_vacant(&name)?;
            clients.close_count
        };
        let client = Client::connect(name, config).await?;
        // Meanwhile the name may have been taken, or all clients closed.
        let added = self.0.write().add(client.clone(), close_count, as_default);
        if added.is_err() {
            client.close().await?;
        }
        added
    }

    async fn close_all(&self) -> Result<()> {
        let clients = self.0.write().take_all();
        close_each(clients, async |client| client.close().await).await
    }
}

/// Closes all clients at the same time, whether or not some of them fail.
async fn close_each<C>(
    clients: BTreeMap<String, C>,
    close: impl AsyncFn(C) -> Result<()>,
) -> Result<()> {
    let closing = clients.into_iter().map(async |(name, client)| {
        let failure = close(client).await.err()?;
        Some((name, failure))
    });
    let failures: Vec<_> = join_all(closing).await.into_iter().flatten().collect();
    match failures.is_empty() {
        true => Ok(()),
        false => Err(Error::CloseAll { failures }),
    }
}

impl Clients {
    const fn new() -> Self {
        Clients {
            by_name: BTreeMap::new(),
            default: None,
            close_count: 0,
        }
    }

    fn names(&self) -> Vec<String> {
        self.by_name.keys().cloned().collect()
    }

    fn unknown_client(&self, name: &str) -> Error {
        Error::UnknownClient {
            name: name.to_owned(),
            known: self.names(),
        }
    }

    fn ensure_vacant(&self, name: &str) -> Result<()> {
        if self.by_name.contains_key(name) {
            return Err(Error::ClientAlreadyRegistered {
                name: name.to_owned(),
            });
        }
        Ok(())
    }

    /// Adds a client that started to connect when `close_count` had this value.
    fn add(&mut self, client: Client, close_count: u64, as_default: bool) -> Result<()> {
        if close_count != self.close_count {
            return Err(Error::Closed {
                name: client.name().to_owned(),
            });
        }
        self.ensure_vacant(client.name())?;
        if as_default {
            self.default = Some(client.name().to_owned());
        }
        self.by_name.insert(client.name().to_owned(), client);
        Ok(())
    }

    fn take_all(&mut self) -> BTreeMap<String, Client> {
        self.close_count += 1;
        self.default = None;
        std::mem::take(&mut self.by_name)
    }

    fn get(&self, name: &str) -> Result<&Client> {
        self.by_name
            .get(name)
            .ok_or_else(|| self.unknown_client(name))
    }

    fn remove(&mut self, name: &str) -> Result<Client> {
        match self.by_name.remove(name) {
            Some(client) => {
                if self.default.as_deref() == Some(name) {
                    self.default = None;
                }
                Ok(client)
            }
            None => Err(self.unknown_client(name)),
        }
    }

    fn default_name(&self) -> Result<&str> {
        self.default
            .as_deref()
            .ok_or_else(|| Error::NoDefaultClient {
                known: self.names(),
            })
    }

    fn set_default(&mut self, name: &str) -> Result<()> {
        self.get(name)?;
        self.default = Some(name.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[tokio::test]
    async fn close_each_reports_every_failure() {
        let closed = Mutex::new(Vec::new());
        let close = async |client: u8| {
            closed.lock().push(client);
            match client % 2 {
                0 => Ok(()),
                _ => Err(Error::invalid("farewell", client.to_string(), "no")),
            }
        };
        let clients = [("a", 1), ("b", 2), ("c", 3), ("d", 4)];
        let clients = clients.map(|(name, client)| (name.to_owned(), client));
        let error = close_each(clients.into(), close).await.unwrap_err();
        assert_eq!(*closed.lock(), [1, 2, 3, 4]);
        let text = error.to_string();
        for part in ["\"a\" (invalid farewell", "\"c\" (invalid farewell"] {
            assert!(text.contains(part), "{text}");
        }
        let Error::CloseAll { failures } = error else {
            panic!("{text}");
        };
        let names: Vec<_> = failures.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "c"]);
        close_each([("a".to_owned(), 2)].into(), async |_| Ok(()))
            .await
            .unwrap();
    }
}
