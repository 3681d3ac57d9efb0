//! Creates a key unless it exists, in a transaction. Run with `cargo run --example txn`.

use goo_etcd::{Client, Compare, CompareOp, Config, TxnOp, TxnOpResponse};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::connect("txn", Config::from_env()?).await?;
    client.delete("stock/apples", None).await?;
    for _ in 0..2 {
        // Creates the key, or else reads it.
        let response = client
            .txn()
            .when([Compare::create_revision(
                "stock/apples",
                CompareOp::Equal,
                0,
            )])
            .and_then([TxnOp::put("stock/apples", "10", None)])
            .or_else([TxnOp::get("stock/apples", None)])
            .commit()
            .await?;
        match response.op_responses().first() {
            Some(TxnOpResponse::Get(found)) => {
                let value = found.kvs().first().map(|kv| kv.value()).unwrap_or_default();
                println!("exists already: {}", String::from_utf8_lossy(value));
            }
            _ => println!("created: {}", response.succeeded()),
        }
    }
    client.close().await
}
