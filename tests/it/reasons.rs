//! Directories and registrations that do not work say why, since when, and once in the log.

use std::time::Duration;

use crate::support::balanced::call;
use crate::support::log::Log;
use crate::support::process::isolate;
use crate::support::users::{enable_auth, user};
use crate::support::{TestResult, connect, wait_until};
use etcd_client::{AlarmAction, AlarmType, Permission, RoleRevokePermissionOptions};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{
    BalancedChannel, Client, Directory, Freshness, Instance, Registrar, Registration,
    RegistrationState,
};

/// Longer than several attempts, which follow at most a second apart.
const SEVERAL_ATTEMPTS: Duration = Duration::from_secs(3);

/// Where the user `app` may read and write.
const APP: &str = "services/greeter/";

async fn revoke_permission(root: &Client) -> TestResult {
    let options = RoleRevokePermissionOptions::new().with_prefix();
    let mut admin = root.client().auth_client();
    admin
        .role_revoke_permission("app", APP, Some(options))
        .await?;
    Ok(())
}

fn stale_reason(directory: &Directory) -> String {
    match directory.snapshot().freshness() {
        Freshness::Stale { reason, .. } => reason.to_string(),
        _ => String::new(),
    }
}

/// Waits until the latest reason contains a text, and returns since when the state holds.
async fn wait_for_reason(registration: &Registration, part: &str) -> std::time::SystemTime {
    let what = format!("{} says {part:?}", registration.key());
    wait_until(&what, async || {
        let state = registration.state();
        state.reason().is_some_and(|reason| reason.contains(part))
    })
    .await;
    registration.state().since().unwrap()
}

#[tokio::test]
async fn stale_directory_names_the_latest_failure() -> TestResult {
    if !isolate("reasons::stale_directory_names_the_latest_failure").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::directory=info");
    let etcd = Etcd::start().await?;
    enable_auth(&etcd, APP).await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let root = Client::new("root", user("root", "root's", [etcd.endpoint()])).await?;
    let app = Client::new("app", user("app", "hunter2", [proxy.endpoint()])).await?;
    let directory = Directory::watch(&app, "greeter").await?;
    let channel = BalancedChannel::builder(&directory)
        .ready_timeout(Duration::from_millis(1))
        .build()?;

    revoke_permission(&root).await?;
    // etcd checks a watch's permission only when it is created.
    proxy.disconnect().await?;
    wait_until("the missing permission is named", async || {
        stale_reason(&directory).contains("permission denied")
    })
    .await;
    let Freshness::Stale { since, .. } = *directory.snapshot().freshness() else {
        return Err("the directory is live".into());
    };
    tokio::time::sleep(SEVERAL_ATTEMPTS).await;
    assert_eq!(log.count("permission denied"), 1, "{}", log.text());
    let status = call(&channel).await.unwrap_err();
    assert!(status.message().contains("permission denied"), "{status}");

    let mut admin = root.client().auth_client();
    admin.user_change_password("app", "other").await?;
    proxy.disconnect().await?;
    wait_until("the wrong password is named", async || {
        stale_reason(&directory).contains("invalid user ID or password")
    })
    .await;
    proxy.cut().await;
    wait_until("the missing connection is named", async || {
        let reason = stale_reason(&directory);
        !reason.contains("password") && !reason.contains("permission")
    })
    .await;
    assert!(
        matches!(directory.snapshot().freshness(), Freshness::Stale { since: now, .. } if *now == since)
    );

    admin.user_change_password("app", "hunter2").await?;
    let permission = Permission::read_write(APP).with_prefix();
    admin.role_grant_permission("app", permission).await?;
    proxy.restore().await?;
    wait_until("the directory is live", async || {
        directory.snapshot().freshness().is_live()
    })
    .await;
    assert_eq!(log.count("a directory is live again"), 1, "{}", log.text());
    assert!(!log.text().contains("hunter2"));
    Ok(())
}

#[tokio::test]
async fn registration_says_why_etcd_refuses_it() -> TestResult {
    if !isolate("reasons::registration_says_why_etcd_refuses_it").await {
        return Ok(());
    }
    let (log, _scope) = Log::start("goo_etcd::registrar=info");
    let etcd = Etcd::start().await?;
    enable_auth(&etcd, APP).await?;
    let root = Client::new("root", user("root", "root's", [etcd.endpoint()])).await?;
    let app = Client::new("app", user("app", "hunter2", [etcd.endpoint()])).await?;
    let registrar = Registrar::new(&app);
    let small = Instance::new("greeter", "10.0.0.1:80");
    let registered = registrar.register(small).await?;

    let elsewhere = Instance::new("elsewhere", "10.0.0.1:80");
    let denied = registrar.register_eventually(elsewhere)?;
    wait_for_reason(&denied, "permission denied").await;
    let large = Instance::new("greeter", "10.0.0.2:80").metadata("a", "x".repeat(1_700_000));
    let too_large = registrar.register_eventually(large)?;
    let since = wait_for_reason(&too_large, "request is too large").await;
    for refused in [&denied, &too_large] {
        let state = refused.state();
        assert!(
            matches!(state, RegistrationState::Registering { .. }),
            "{state}"
        );
    }
    tokio::time::sleep(SEVERAL_ATTEMPTS).await;
    assert_eq!(too_large.state().since(), Some(since));
    assert_eq!(log.count("permission denied"), 1, "{}", log.text());
    assert_eq!(log.count("request is too large"), 1, "{}", log.text());
    assert!(!log.text().contains("xxxx"));

    // A draining mark that cannot be written, and a key that cannot be deleted.
    revoke_permission(&root).await?;
    registered
        .update(|instance| instance.draining = true)
        .await
        .unwrap_err();
    wait_for_reason(&registered, "permission denied").await;
    assert!(matches!(
        registered.state(),
        RegistrationState::Recovering { .. }
    ));
    registered.deregister().await.unwrap_err();
    wait_for_reason(&registered, "permission denied").await;
    assert!(matches!(
        registered.state(),
        RegistrationState::Removing { .. }
    ));

    let mut admin = root.client().auth_client();
    let permission = Permission::read_write(APP).with_prefix();
    admin.role_grant_permission("app", permission).await?;
    wait_until("the key is deleted", async || {
        registered.state() == RegistrationState::Deregistered
    })
    .await;
    Ok(())
}

#[tokio::test]
async fn registration_says_that_etcd_is_full_or_away() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let registrar = Registrar::builder(&client)
        .ttl(Duration::from_secs(3))
        .build()?;
    let instance = |id: &str| Instance::new("greeter", "10.0.0.1:80").id(id);
    let registered = registrar.register(instance("a")).await?;
    let mut admin = etcd.client().await?;
    admin
        .alarm(AlarmAction::Activate, AlarmType::Nospace, None)
        .await?;
    let waiting = registrar.register_eventually(instance("b"))?;
    let since = wait_for_reason(&waiting, "database space exceeded").await;
    admin.delete(registered.key(), None).await?;
    wait_for_reason(&registered, "database space exceeded").await;

    proxy.cut().await;
    wait_until("the cut is named", async || {
        [&registered, &waiting].iter().all(|registration| {
            let state = registration.state();
            state
                .reason()
                .is_some_and(|reason| !reason.contains("space"))
        })
    })
    .await;
    assert_eq!(waiting.state().since(), Some(since));
    admin
        .alarm(AlarmAction::Deactivate, AlarmType::Nospace, None)
        .await?;
    proxy.restore().await?;
    wait_until("both are registered", async || {
        [&registered, &waiting]
            .iter()
            .all(|registration| registration.state() == RegistrationState::Registered)
    })
    .await;
    Ok(())
}
