//! Opens the watch of a service: lists each layout once, or restores it from its cache file.

use std::path::PathBuf;
use std::sync::Arc;

use super::cache::{Cache, LIST_TIMEOUT};
use super::driver::Driver;
use super::follower::Follower;
use super::list_watch::EtcdRange;
use super::merge::MergedView;
use super::service_watch::ServiceWatch;
use super::state::ListWatchState;
use crate::client::{Client, RawWatch};
use crate::error::Result;
use crate::format::Layout;
use crate::snapshot::Snapshot;

/// Opens a watch of `service` in all `layouts`. No task follows etcd yet.
pub(super) async fn open(
    client: Client,
    service: String,
    layouts: Vec<Layout>,
    cache_dir: Option<PathBuf>,
) -> Result<Arc<ServiceWatch>> {
    let is_merged = layouts.len() > 1;
    let ttls = layouts.iter().map(|layout| layout.format.default_ttl());
    let ttl = ttls.max().unwrap_or_default();
    let mut opening = Vec::with_capacity(layouts.len());
    for layout in layouts {
        let name = layout.service_name(&service).to_owned();
        let state = ListWatchState::new(layout.format, layout.prefix, name);
        let state = if is_merged { state.by_address() } else { state };
        let cache = cache_dir
            .as_ref()
            .map(|folder| Cache::open(&state, client.name(), folder))
            .transpose()?;
        opening.push(OpeningLayout {
            range: EtcdRange::new(client.clone(), state.range().clone()),
            state,
            cache,
        });
    }
    futures::future::try_join_all(opening.iter_mut().map(OpeningLayout::list_or_restore)).await?;
    let first = opening.iter_mut().map(|layout| layout.state.snapshot());
    let (inputs, snapshots) = MergedView::start(first.collect());
    let followers = opening
        .into_iter()
        .zip(inputs)
        .map(|(layout, input)| Follower::new(layout.range, layout.state, input, layout.cache))
        .collect();
    let watch = ServiceWatch::new(service, ttl, snapshots, followers);
    Ok(Arc::new(watch))
}

struct OpeningLayout {
    range: EtcdRange,
    state: ListWatchState<RawWatch>,
    cache: Option<Cache>,
}

impl OpeningLayout {
    /// Lists the layout and opens its watch. If there is a cache file and etcd does not respond in
    /// time, restores the cached snapshot instead. A refusal by etcd is an error in either case.
    async fn list_or_restore(&mut self) -> Result<()> {
        let Some(cached) = load(self.cache.clone()).await else {
            return self.list_and_watch().await;
        };
        let range = self.range.clone();
        let listing = Box::pin(self.list_and_watch());
        let cause = match range.within(LIST_TIMEOUT, listing).await {
            Ok(()) => return Ok(()),
            Err(error) if error.is_permanent() => return Err(error),
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            service = self.state.service(),
            instances = cached.len(),
            cause,
            "starting with the cached instances"
        );
        self.state.restore(cached, &cause);
        Ok(())
    }

    async fn list_and_watch(&mut self) -> Result<()> {
        let mut driver = Driver::new(self.range.clone());
        driver.list_and_watch(&mut self.state).await
    }
}

async fn load(cache: Option<Cache>) -> Option<Snapshot> {
    let cache = cache?;
    let load = tokio::task::spawn_blocking(move || cache.load());
    load.await.ok().flatten()
}
