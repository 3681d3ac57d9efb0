//! Keeps a key while its owner runs, by a lease. Run with `cargo run --example lease`.

use futures::StreamExt;
use goo_etcd::{Client, Config, PutOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::connect("lease", Config::from_env()?).await?;
    let lease = client.grant(5).await?.id();
    let on_lease = PutOptions::new().with_lease(lease);
    client.put("workers/1", "here", on_lease).await?;

    // A background task renews the lease until the stream drops, whether it is polled or not.
    let mut renewals = client.keep_alive(lease).await?;
    if let Some(renewed) = renewals.next().await {
        println!("renewed for {} s", renewed?.ttl());
    }
    let left = client.lease_time_to_live(lease, None).await?;
    println!("granted for {} s", left.granted_ttl());

    client.revoke(lease).await?;
    println!(
        "keys left: {}",
        client.get("workers/1", None).await?.count()
    );
    client.close().await
}
