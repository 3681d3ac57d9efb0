//! Checking a channel's settings, and building the channel.

use std::sync::Arc;
use std::time::Duration;

use http::HeaderValue;
use http::uri::Scheme;
use tokio::sync::Semaphore;

use super::BalancedChannelBuilder;
use crate::balance::call::Dispatcher;
use crate::balance::channel::BalancedChannel;
use crate::balance::connection::{Connector, Tls};
use crate::balance::pool::{
    DEFAULT_KEEP_FOR, DEFAULT_WINDOW, MassDeletionGuard, Pool, View, window_for_ttl,
};
use crate::config::TlsConfig;
use crate::error::{Error, Result};
use crate::runtime;
use crate::time::MAX_DURATION;

/// The channel's own part of the user agent.
const USER_AGENT: &str = concat!("goo-etcd/", env!("CARGO_PKG_VERSION"));

impl BalancedChannelBuilder {
    /// Creates the channel and starts to connect. Returns at once.
    ///
    /// Must be called within a Tokio runtime, which runs the tasks that keep the endpoints
    /// connected. When that runtime ends, all calls fail at once and say so.
    ///
    /// # Errors
    ///
    /// - [`Error::Invalid`] for a setting that is out of range, and for certificates that cannot be
    ///   read.
    /// - [`Error::NoRuntime`] outside of a Tokio runtime with timers and I/O.
    pub fn build(self) -> Result<BalancedChannel> {
        runtime::require_for_channel(self.connector.is_none())?;
        self.validate_calls()?;
        let user_agent = user_agent(self.user_agent.as_deref())?;
        let tls = self.tls.as_ref().map(load_tls).transpose()?;
        let guard = MassDeletionGuard::new(self.keep_for(), self.window());
        let settings = self.settings.validate()?;
        let plan = self.plan.validate()?;

        let connector = Arc::new(Connector::new(settings, tls, self.connector));
        let view = Arc::new(View::new(Arc::clone(self.source.name())));
        let pool = Pool::new(Arc::clone(&view), connector, plan, self.policy, guard);
        let dispatcher = Dispatcher {
            view,
            ready_timeout: self.ready_timeout.min(MAX_DURATION),
            wait_for_ready: self.wait_for_ready,
            timeout: self.timeout.map(|timeout| timeout.min(MAX_DURATION)),
            retry: self.retry,
            concurrency: self
                .concurrency_limit
                .map(|limit| Arc::new(Semaphore::new(limit.min(Semaphore::MAX_PERMITS)))),
            user_agent,
            origin: self.origin,
        };
        let pool = tokio::spawn(pool.run(self.source));
        Ok(BalancedChannel::new(dispatcher, pool))
    }

    /// Checks the settings of calls.
    fn validate_calls(&self) -> Result<()> {
        if self.concurrency_limit == Some(0) {
            return Err(Error::invalid(
                "concurrency_limit",
                "0",
                "must be at least 1",
            ));
        }
        if let Some(origin) = &self.origin {
            let known = [Some(&Scheme::HTTP), Some(&Scheme::HTTPS)].contains(&origin.scheme());
            if !known || origin.authority().is_none() {
                let reason = "must be http:// or https:// with an authority";
                return Err(Error::invalid("origin", origin.to_string(), reason));
            }
        }
        Ok(())
    }

    /// How long endpoints are retained after a mass deletion.
    fn keep_for(&self) -> Duration {
        match self.mass_deletion_guard {
            Some(keep_for) => keep_for.min(MAX_DURATION),
            None if self.source.ttl().is_some() => DEFAULT_KEEP_FOR,
            None => Duration::ZERO,
        }
    }

    /// The window of a mass deletion.
    fn window(&self) -> Duration {
        match self.mass_deletion_window {
            Some(window) => window.min(MAX_DURATION),
            None => self.source.ttl().map_or(DEFAULT_WINDOW, window_for_ttl),
        }
    }
}

fn load_tls(config: &TlsConfig) -> Result<Tls> {
    config.validate()?;
    Tls::new(config)
}

fn user_agent(own: Option<&str>) -> Result<HeaderValue> {
    match own {
        Some(own) => HeaderValue::try_from(format!("{own} {USER_AGENT}"))
            .map_err(|error| Error::invalid("user_agent", own, error.to_string())),
        None => Ok(HeaderValue::from_static(USER_AGENT)),
    }
}
