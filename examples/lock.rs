//! Work that only one process may do at a time. Run `cargo run --example lock` several times at
//! once.

use std::time::Duration;

use goo_etcd::{Client, Config, TxnOp};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::connect("lock", Config::from_env()?).await?;
    // If this process dies, another one gets the lock after 10 s.
    let lock = client
        .lock("nightly-report", Duration::from_secs(10))
        .await?;
    println!("locked");
    tokio::select! {
        () = work() => {}
        // The work stops, because another process may hold the lock now.
        reason = lock.lost() => return Err(reason),
    }
    // etcd executes the write only if this process holds the lock at that moment.
    let done = TxnOp::put("report", "done", None);
    let response = client
        .txn()
        .when([lock.ownership()])
        .and_then([done])
        .commit()
        .await?;
    println!("written: {}", response.succeeded());
    lock.unlock().await?;
    println!("unlocked");
    client.close().await
}

async fn work() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}
