//! Does work that only one process may do at a time. Run several `cargo run --example lock` at
//! once.

use std::time::Duration;

use goo_etcd::{Client, Config, TxnOp};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::new("lock", Config::from_env()?).await?;
    // If this process dies, another one gets the lock after 10 s.
    let lock = client.lock("nightly-report", 10).await?;
    println!("locked");
    tokio::select! {
        () = work() => {}
        // Stop working: another process may hold the lock now.
        error = lock.lost() => return Err(error),
    }
    // etcd applies this write only if the lock is still held.
    let done = TxnOp::put("report", "done", None);
    let response = client
        .txn()
        .when([lock.guard()])
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
