//! The named clients of this process: connected once at start, found by name everywhere, closed
//! together on exit.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::client::Client;
use crate::config::Config;
use crate::error::{Error, Result};

/// The name under which [`register_default`] registers.
const DEFAULT: &str = "default";

static CLIENTS: Registry = Registry(RwLock::new(Clients::new()));

/// Connects a client and keeps it under this name.
///
/// Dropping the future registers nothing.
///
/// # Errors
///
/// [`Error::ClientAlreadyRegistered`] when there is one of this name, which stays in place;
/// [`Error::Closed`] when [`close_all`] was called meanwhile, and then nothing is kept; otherwise those of
/// [`Client::new`].
///
/// ```no_run
/// # async fn example() -> goo_etcd::Result<()> {
/// use goo_etcd::Config;
///
/// goo_etcd::register_default(Config::default()).await?;
/// let other = Config::builder().endpoints(["etcd.other:2379"]).build()?;
/// goo_etcd::register("other", other).await?;
///
/// goo_etcd::default()?.put("here", "1", None).await?;
/// goo_etcd::get_client("other")?.put("there", "1", None).await?;
/// goo_etcd::close_all().await?;
/// # Ok(())
/// # }
/// ```
pub async fn register(name: impl Into<String>, config: Config) -> Result<()> {
    CLIENTS.register(name.into(), config, false).await
}

/// Connects a client, keeps it under the name `default`, and makes it the default one.
///
/// # Errors
///
/// As for [`register`].
pub async fn register_default(config: Config) -> Result<()> {
    CLIENTS.register(DEFAULT.to_owned(), config, true).await
}

/// Forgets the client of this name and closes it, for everyone who holds a clone. If it was the
/// default one, there is none then.
///
/// # Errors
///
/// [`Error::UnknownClient`]; what [`Client::close`] fails with, and it is forgotten even so.
pub async fn unregister(name: impl AsRef<str>) -> Result<()> {
    let client = CLIENTS.write().remove(name.as_ref())?;
    client.close().await
}

/// Forgets the default client and closes it; there is none then.
///
/// # Errors
///
/// [`Error::NoDefaultClient`]; otherwise as for [`unregister`].
pub async fn unregister_default() -> Result<()> {
    let client = {
        let mut clients = CLIENTS.write();
        let name = clients.default_name()?.to_owned();
        clients.remove(&name)?
    };
    client.close().await
}

/// The client of this name.
///
/// # Errors
///
/// [`Error::UnknownClient`], with the names that are known.
pub fn get_client(name: impl AsRef<str>) -> Result<Client> {
    CLIENTS.read().get(name.as_ref()).cloned()
}

/// Makes the client of this name the default one.
///
/// # Errors
///
/// [`Error::UnknownClient`]; the default stays as it was.
pub fn set_default(name: impl AsRef<str>) -> Result<()> {
    CLIENTS.write().set_default(name.as_ref())
}

/// The default client: the one of [`register_default`], or of the last [`set_default`].
///
/// # Errors
///
/// [`Error::NoDefaultClient`].
pub fn default() -> Result<Client> {
    let clients = CLIENTS.read();
    clients.get(clients.default_name()?).cloned()
}

/// The `etcd-client` beneath the default client.
///
/// # Errors
///
/// [`Error::NoDefaultClient`].
pub fn get_default_client() -> Result<etcd_client::Client> {
    Ok(default()?.client())
}

/// Closes all clients and forgets them, those included that are just being registered. One that fails
/// keeps none of the others open.
///
/// # Errors
///
/// [`Error::CloseAll`] with each failure; all are closed and forgotten even so.
pub async fn close_all() -> Result<()> {
    CLIENTS.close_all().await
}

/// Tests the default client's connection, as [`Client::ping`].
///
/// # Errors
///
/// [`Error::NoDefaultClient`]; otherwise those of [`Client::ping`].
pub async fn ping() -> Result<()> {
    default()?.ping().await
}

/// The lock is held for lookups in memory only, never while anything is awaited.
struct Registry(RwLock<Clients>);

struct Clients {
    by_name: BTreeMap<String, Client>,
    /// A name in `by_name`.
    default: Option<String>,
    /// How often all were closed: who has begun to register before that must not come after it.
    closed: u64,
}

impl Registry {
    // Nothing under this lock can panic half-way through a change, so a poisoned one is sound.
    fn read(&self) -> RwLockReadGuard<'_, Clients> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Clients> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    async fn register(&self, name: String, config: Config, as_default: bool) -> Result<()> {
        let begun = self.read().vacant(&name)?;
        let client = Client::new(name, config).await?;
        // Another may have taken the name meanwhile, and then that one stays; or all were closed.
        let added = self.write().add(client.clone(), begun, as_default);
        if added.is_err() {
            client.close().await?;
        }
        added
    }

    async fn close_all(&self) -> Result<()> {
        let clients = self.write().take();
        close_each(clients, async |client| client.close().await).await
    }
}

/// Each in turn, whether or not those before it fail.
async fn close_each<C>(
    clients: BTreeMap<String, C>,
    close: impl AsyncFn(C) -> Result<()>,
) -> Result<()> {
    let mut failures = Vec::new();
    for (name, client) in clients {
        if let Err(error) = close(client).await {
            failures.push((name, error));
        }
    }
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
            closed: 0,
        }
    }

    fn known(&self) -> Vec<String> {
        self.by_name.keys().cloned().collect()
    }

    fn unknown(&self, name: &str) -> Error {
        Error::UnknownClient {
            name: name.to_owned(),
            known: self.known(),
        }
    }

    /// That there is none of this name, and as of when.
    fn vacant(&self, name: &str) -> Result<u64> {
        if self.by_name.contains_key(name) {
            return Err(Error::ClientAlreadyRegistered {
                name: name.to_owned(),
            });
        }
        Ok(self.closed)
    }

    fn add(&mut self, client: Client, begun: u64, as_default: bool) -> Result<()> {
        if begun != self.closed {
            return Err(Error::Closed {
                name: client.name().to_owned(),
            });
        }
        self.vacant(client.name())?;
        if as_default {
            self.default = Some(client.name().to_owned());
        }
        self.by_name.insert(client.name().to_owned(), client);
        Ok(())
    }

    /// All of them, to be closed.
    fn take(&mut self) -> BTreeMap<String, Client> {
        self.closed += 1;
        self.default = None;
        std::mem::take(&mut self.by_name)
    }

    fn get(&self, name: &str) -> Result<&Client> {
        self.by_name.get(name).ok_or_else(|| self.unknown(name))
    }

    fn remove(&mut self, name: &str) -> Result<Client> {
        match self.by_name.remove(name) {
            Some(client) => {
                if self.default.as_deref() == Some(name) {
                    self.default = None;
                }
                Ok(client)
            }
            None => Err(self.unknown(name)),
        }
    }

    fn default_name(&self) -> Result<&str> {
        self.default
            .as_deref()
            .ok_or_else(|| Error::NoDefaultClient {
                known: self.known(),
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
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn given_some_that_fail_to_close_then_all_are_closed_and_each_failure_is_told() {
        let closed = Mutex::new(Vec::new());
        let close = async |client: u8| {
            closed.lock().unwrap().push(client);
            match client % 2 {
                0 => Ok(()),
                _ => Err(Error::invalid("farewell", client.to_string(), "no")),
            }
        };
        let clients = [("a", 1), ("b", 2), ("c", 3), ("d", 4)];
        let clients = clients.map(|(name, client)| (name.to_owned(), client));
        let error = close_each(clients.into(), close).await.unwrap_err();
        assert_eq!(*closed.lock().unwrap(), [1, 2, 3, 4]);
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
