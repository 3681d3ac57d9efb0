//! The cluster's members.

use etcd_client::{
    MemberAddOptions, MemberAddResponse, MemberListResponse, MemberPromoteResponse,
    MemberRemoveResponse, MemberUpdateResponse, StatusResponse,
};

use super::handle::Client;
use super::members;
use super::wire::Route;
use crate::error::Result;

/// The cluster's members. Errors as for [`Client::put`].
impl Client {
    /// The status of the member at this endpoint, and of no other: it is asked over a connection
    /// of its own. The endpoint is written as in [`Config::endpoints`](crate::Config::endpoints)
    /// and need not be one of them. TLS and the user are as configured. From 3.5.28 and 3.6.9 on etcd tells it
    /// only to root where it asks for users, as it does with [`member_list`](Self::member_list).
    pub async fn status(&self, endpoint: impl AsRef<str>) -> Result<StatusResponse> {
        let endpoint = endpoint.as_ref();
        let operation = || format!("status of {endpoint}");
        let route = Route {
            // Its connection ends with the call.
            only: Some(members::only(&self.inner.config, endpoint)?),
            tried: None,
        };
        let mut maintenance = self.inner.transport.maintenance.clone();
        self.call(operation, route.of(maintenance.status())).await
    }

    /// The members of the cluster.
    pub async fn member_list(&self) -> Result<MemberListResponse> {
        let mut cluster = self.inner.transport.cluster.clone();
        self.call(|| "list members".to_owned(), cluster.member_list())
            .await
    }

    /// Adds a voting member that will be reached by its peers under these URLs.
    pub async fn member_add<U: Into<String>>(
        &self,
        peer_urls: impl IntoIterator<Item = U>,
    ) -> Result<MemberAddResponse> {
        self.add(peer_urls, None).await
    }

    /// Adds a learner: it receives the log and has no vote until it is promoted.
    pub async fn member_add_as_learner<U: Into<String>>(
        &self,
        peer_urls: impl IntoIterator<Item = U>,
    ) -> Result<MemberAddResponse> {
        self.add(peer_urls, Some(MemberAddOptions::new().with_is_learner()))
            .await
    }

    async fn add<U: Into<String>>(
        &self,
        peer_urls: impl IntoIterator<Item = U>,
        options: Option<MemberAddOptions>,
    ) -> Result<MemberAddResponse> {
        let urls: Vec<String> = peer_urls.into_iter().map(Into::into).collect();
        let mut cluster = self.inner.transport.cluster.clone();
        self.call(
            || format!("add member {}", urls.join(", ")),
            cluster.member_add(urls.as_slice(), options),
        )
        .await
    }

    /// Gives the learner with this id a vote, once it has caught up; until then etcd refuses.
    pub async fn member_promote(&self, id: u64) -> Result<MemberPromoteResponse> {
        let mut cluster = self.inner.transport.cluster.clone();
        self.call(
            || format!("promote member {id:x}"),
            cluster.member_promote(id),
        )
        .await
    }

    /// Removes the member with this id.
    pub async fn member_remove(&self, id: u64) -> Result<MemberRemoveResponse> {
        let mut cluster = self.inner.transport.cluster.clone();
        self.call(
            || format!("remove member {id:x}"),
            cluster.member_remove(id),
        )
        .await
    }

    /// Changes the URLs under which the member with this id is reached by its peers.
    pub async fn member_update<U: Into<String>>(
        &self,
        id: u64,
        peer_urls: impl IntoIterator<Item = U>,
    ) -> Result<MemberUpdateResponse> {
        let urls: Vec<String> = peer_urls.into_iter().map(Into::into).collect();
        let mut cluster = self.inner.transport.cluster.clone();
        self.call(
            || format!("update member {id:x} to {}", urls.join(", ")),
            cluster.member_update(id, urls.as_slice()),
        )
        .await
    }
}
