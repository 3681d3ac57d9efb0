//! Renewals that etcd refuses because of the user, while other leases are renewed on the same
//! stream.

use std::time::Duration;

use crate::support::users::{enable_auth, user};
use crate::support::{PATIENCE, TestResult, etcd_versions, version, wait_for, wait_until};
use etcd_client::{ConnectOptions, Permission, RoleRevokePermissionOptions};
use futures::future::try_join_all;
use goo_etcd::testing::{Etcd, EtcdBuilder};
use goo_etcd::{Client, Error, Instance, Lock, PutOptions, Registrar, RegistrationState};
use tokio::time::{Instant, sleep};
use tonic::Code;

/// Where the user `app` may read and write.
const APP: &str = "app/";

const TTL: Duration = Duration::from_secs(5);

async fn root(etcd: &Etcd) -> TestResult<etcd_client::Client> {
    let options = ConnectOptions::new().with_user("root", "root's");
    Ok(etcd_client::Client::connect([etcd.endpoint()], Some(options)).await?)
}

/// # Panics
///
/// If a lock is not held, with the reason.
async fn assert_held(locks: &[Lock]) {
    if let Some(lock) = locks.iter().find(|lock| !lock.is_held()) {
        let key = String::from_utf8_lossy(lock.key());
        panic!("{key} is lost: {}", lock.lost().await);
    }
}

/// The etcds under test, and whether each checks the permission to write the keys of a lease that
/// is renewed. The newest 3.5 does, but 3.5.16 does not.
fn etcds() -> impl Iterator<Item = (EtcdBuilder, bool)> {
    etcd_versions().into_iter().zip([version() >= (3, 6), true])
}

/// etcd ends the stream of all leases when it refuses to renew one.
#[tokio::test]
async fn refused_lease_harms_no_other() -> TestResult {
    let all = etcds().map(|(builder, is_checked)| async move {
        let etcd = builder.start().await?;
        enable_auth(&etcd, APP).await?;
        let root = root(&etcd).await?;
        let other = Permission::read_write("other/").with_prefix();
        let mut auth = root.auth_client();
        auth.role_grant_permission("app", other).await?;
        let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
        let locks = try_join_all((0..10).map(|n| client.lock(format!("app/{n}"), TTL))).await?;
        let register = async |prefix| {
            let registrar = Registrar::builder(&client)
                .ttl(TTL)
                .prefix(prefix)
                .build()?;
            registrar
                .register(Instance::new("greeter", "10.0.0.1:1"))
                .await
        };
        let (allowed, _refused) = (register("app").await?, register("other").await?);
        let lease = client.grant(60).await?.id();
        let on_lease = PutOptions::new().with_lease(lease);
        client.put("other/key", "", on_lease).await?;

        let options = RoleRevokePermissionOptions::new().with_prefix();
        auth.role_revoke_permission("app", "other/", Some(options))
            .await?;
        let until = Instant::now() + TTL * 3;
        let mut refusals = 0;
        while Instant::now() < until {
            let renewed = wait_for("a response", client.keep_alive_once(lease)).await;
            if let Err(error) = renewed {
                assert_eq!(error.code(), Some(Code::PermissionDenied), "{error}");
                refusals += 1;
            }
            sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(is_checked, refusals > 0);
        assert_held(&locks).await;
        assert_eq!(allowed.state(), RegistrationState::Registered);
        TestResult::Ok(())
    });
    try_join_all(all).await?;
    Ok(())
}

/// Instances share leases, so the refusal of one key could end the lease of all.
#[tokio::test]
async fn refused_instance_harms_no_other() -> TestResult {
    let all = etcds().map(|(builder, is_checked)| async move {
        let etcd = builder.start().await?;
        enable_auth(&etcd, "services/greeter/").await?;
        let root = root(&etcd).await?;
        let other = Permission::read_write("services/other/").with_prefix();
        let mut auth = root.auth_client();
        auth.role_grant_permission("app", other).await?;
        let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
        let registrar = Registrar::builder(&client).ttl(TTL).build()?;
        let register = |service| registrar.register(Instance::new(service, "10.0.0.1:1"));
        let (allowed, refused) = (register("greeter").await?, register("other").await?);

        let before = root.kv_client().get("services/", None).await?;
        let start = before.header().ok_or("a header")?.revision() + 1;
        let options = RoleRevokePermissionOptions::new().with_prefix();
        auth.role_revoke_permission("app", "services/other/", Some(options))
            .await?;
        // etcd may refuse a write to any key of the lease, until the lease is replaced.
        let weight = async |weight| allowed.update(|instance| instance.weight = weight).await;
        weight(2).await.or_else(refusal_if(is_checked))?;
        sleep(TTL * 3).await;
        weight(3).await?;
        assert_eq!(allowed.state(), RegistrationState::Registered);
        // A key that was deleted meanwhile and put again has a later create revision.
        let key = root.kv_client().get(allowed.key(), None).await?;
        let key = key.kvs().first().ok_or("it is registered")?;
        assert!(key.create_revision() < start, "deleted and put again");
        if is_checked {
            let state = refused.state();
            assert!(
                matches!(state, RegistrationState::Recovering { .. }),
                "{state:?}"
            );
            let refused = refused.deregister().await.unwrap_err();
            assert!(refused.is_permission_denied(), "{refused}");
        }
        allowed.deregister().await?;
        let key = root.kv_client().get(allowed.key(), None).await?;
        assert!(key.kvs().is_empty());
        TestResult::Ok(())
    });
    try_join_all(all).await?;
    Ok(())
}

#[tokio::test]
async fn dropped_registrar_deletes_what_it_may() -> TestResult {
    let all = etcd_versions().into_iter().map(|builder| async {
        let etcd = builder.start().await?;
        enable_auth(&etcd, "services/greeter/").await?;
        let root = root(&etcd).await?;
        let other = Permission::read_write("services/a-refused/").with_prefix();
        let mut auth = root.auth_client();
        auth.role_grant_permission("app", other).await?;
        let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
        // The keys would outlive the test.
        let registrar = Registrar::builder(&client).ttl(PATIENCE * 4).build()?;
        let register = |service| registrar.register(Instance::new(service, "10.0.0.1:1"));
        let refused = register("a-refused").await?;
        let allowed = register("greeter").await?;
        let key = allowed.key().to_owned();
        let options = RoleRevokePermissionOptions::new().with_prefix();
        auth.role_revoke_permission("app", "services/a-refused/", Some(options))
            .await?;
        drop((refused, allowed, registrar));
        wait_until("the key is deleted", async || {
            let got = root.kv_client().get(key.as_str(), None).await;
            got.unwrap().kvs().is_empty()
        })
        .await;
        TestResult::Ok(())
    });
    try_join_all(all).await?;
    Ok(())
}

/// Accepts the error of a missing permission.
fn refusal_if(is_expected: bool) -> impl FnOnce(Error) -> Result<(), Error> {
    move |error| match is_expected && error.is_permission_denied() {
        true => Ok(()),
        false => Err(error),
    }
}

/// Each change outdates all tokens, also those that are younger than the time in which a token
/// reaches all members.
#[tokio::test]
async fn changes_of_users_lose_no_lock() -> TestResult {
    let secret = tempfile::NamedTempFile::new()?;
    std::fs::write(&secret, "any bytes can be a key of HMAC")?;
    let jwt = format!(
        "jwt,priv-key={},sign-method=HS256,ttl=10m",
        secret.path().display()
    );
    let all = etcd_versions().into_iter().map(|builder| async {
        let args = ["--auth-token", &jwt, "--bcrypt-cost", "4"];
        let etcd = builder.args(args).start().await?;
        enable_auth(&etcd, APP).await?;
        let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
        let locks = [3, 4, 6].map(|ttl| {
            let ttl = Duration::from_secs(ttl);
            client.lock(format!("app/{ttl:?}"), ttl)
        });
        let locks = try_join_all(locks).await?;
        // The first token is not new any more.
        sleep(Duration::from_secs(3)).await;
        for n in 0..12 {
            let mut auth = root(&etcd).await?.auth_client();
            auth.user_add(format!("other-{n}"), "", None).await?;
            sleep(Duration::from_millis(200)).await;
        }
        sleep(Duration::from_secs(3)).await;
        assert_held(&locks).await;
        TestResult::Ok(())
    });
    try_join_all(all).await?;
    Ok(())
}

/// A program may check the passwords of its users with etcd.
#[tokio::test]
async fn token_of_another_user_renews_no_lease() -> TestResult {
    let all = etcd_versions().into_iter().map(|builder| async {
        let etcd = builder.start().await?;
        enable_auth(&etcd, APP).await?;
        let mut auth = root(&etcd).await?.auth_client();
        auth.user_add("guest", "guest's", None).await?;
        let client = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
        let mut auth = client.client().auth_client();
        auth.authenticate("guest".to_owned(), "guest's".to_owned())
            .await?;
        let lease = client.grant(60).await?.id();
        let on_lease = PutOptions::new().with_lease(lease);
        client.put("app/key", "", on_lease).await?;
        // Some releases refuse a user who may not write the key.
        client.keep_alive_once(lease).await?;
        TestResult::Ok(())
    });
    try_join_all(all).await?;
    Ok(())
}
