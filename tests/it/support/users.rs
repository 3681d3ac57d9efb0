//! etcd with authentication.

use etcd_client::Permission;
use goo_etcd::Config;
use goo_etcd::testing::Etcd;

use super::{TestResult, config};

/// Enables authentication, with the users `root` (password `root's`) and `app` (password
/// `hunter2`). `app` may read and write keys with a prefix; its role has the same name.
pub async fn enable_auth(etcd: &Etcd, prefix: &str) -> TestResult {
    let mut auth = etcd.client().await?.auth_client();
    auth.user_add("root", "root's", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.user_add("app", "hunter2", None).await?;
    auth.role_add("app").await?;
    let permission = Permission::read_write(prefix).with_prefix();
    auth.role_grant_permission("app", permission).await?;
    auth.user_grant_role("app", "app").await?;
    auth.auth_enable().await?;
    Ok(())
}

/// The configuration of a client that authenticates as a user.
pub fn user(
    name: &str,
    password: &str,
    endpoints: impl IntoIterator<Item = impl Into<String>>,
) -> Config {
    let mut config = config(endpoints);
    config.username = Some(name.to_owned());
    config.password = Some(password.to_owned());
    config
}
