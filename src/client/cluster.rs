//! The cluster's members.

use etcd_client::{
    MemberAddOptions, MemberAddResponse, MemberListResponse, MemberPromoteResponse,
    MemberRemoveResponse, MemberUpdateResponse, StatusResponse,
};

use super::handle::Client;
use super::transport::{self, CallOptions};
use crate::error::Result;

/// The path of a list of members, and the gRPC message that asks for a linearizable one:
/// `MemberListRequest { linearizable: true }`. etcd-client leaves the field out.
const LINEARIZABLE_LIST: (&str, &[u8]) =
    ("/etcdserverpb.Cluster/MemberList", &[0, 0, 0, 0, 2, 8, 1]);

/// The cluster's members. The calls fail like [`Client::put`].
impl Client {
    /// The status of the member at this endpoint, over a separate connection to it.
    ///
    /// The endpoint has the form of [`Config::endpoints`](crate::Config::endpoints) and need not be
    /// one of them. TLS and the user are as configured. With authentication enabled, some releases
    /// of etcd (3.6.16 is one) refuse this call and [`member_list`](Self::member_list) without a
    /// user. Some refuse the status (3.5.30 is one) or both (3.6.9 is one) to every user but root.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`](crate::Error::Invalid) for an endpoint that cannot be parsed, and the
    /// errors of [`Client::put`].
    pub async fn status(&self, endpoint: impl AsRef<str>) -> Result<StatusResponse> {
        let endpoint = endpoint.as_ref();
        let operation = || format!("status of {endpoint}");
        let options = CallOptions {
            // The connection is closed after the call.
            pinned: Some(transport::single_member(&self.inner.config, endpoint)?),
            ..CallOptions::default()
        };
        let mut maintenance = self.inner.transport.maintenance.clone();
        options
            .scope(self.call(operation, maintenance.status()))
            .await
    }

    /// Lists the members of the cluster. The list is linearizable, so it has every change that
    /// ended before, and needs a leader. etcd 3.4 has no such lists: there a member lists what it
    /// has applied.
    pub async fn member_list(&self) -> Result<MemberListResponse> {
        let mut cluster = self.inner.transport.cluster.clone();
        let options = CallOptions {
            message: Some(LINEARIZABLE_LIST),
            ..CallOptions::default()
        };
        let operation = || "list members".to_owned();
        self.call(operation, options.scope(cluster.member_list()))
            .await
    }

    /// Adds a voting member, which its peers reach under these URLs.
    pub async fn member_add<U: Into<String>>(
        &self,
        peer_urls: impl IntoIterator<Item = U>,
    ) -> Result<MemberAddResponse> {
        self.add_member(peer_urls, None).await
    }

    /// Adds a learner, which receives the log but has no vote until it is promoted.
    pub async fn member_add_as_learner<U: Into<String>>(
        &self,
        peer_urls: impl IntoIterator<Item = U>,
    ) -> Result<MemberAddResponse> {
        self.add_member(peer_urls, Some(MemberAddOptions::new().with_is_learner()))
            .await
    }

    async fn add_member<U: Into<String>>(
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

    /// Promotes the learner with this id to a voting member. etcd refuses until the learner has
    /// caught up with the log.
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

    /// Replaces the URLs under which peers reach the member with this id.
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
