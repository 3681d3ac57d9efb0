//! Work that only one process may do at a time. `cargo run --example lock`, several times at once.

use std::time::Duration;

use goo_etcd::{Client, Config, TxnOp};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::new("lock", Config::from_env()?).await?;
    // 10 s after this process was last heard of, another may have it.
    let lock = client.lock("nightly-report", 10).await?;
    println!("locked");
    tokio::select! {
        () = work() => {}
        // The work stops: it is not ours any more.
        why = lock.lost() => return Err(why),
    }
    // What must not be done twice is done only while the lock is held, as etcd sees it.
    let done = TxnOp::put("report", "done", None);
    let answer = client
        .txn()
        .when([lock.guard()])
        .and_then([done])
        .commit()
        .await?;
    println!("written: {}", answer.succeeded());
    lock.unlock().await?;
    println!("unlocked");
    client.close().await
}

async fn work() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}
