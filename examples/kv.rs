//! Puts, gets, lists and deletes keys. Run with `cargo run --example kv`, and an etcd at
//! `localhost:2379` or at `GOO_ETCD_ENDPOINTS`.

use goo_etcd::{Client, Config, DeleteOptions, GetOptions, PutOptions, SortOrder, SortTarget};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::connect("kv", Config::from_env()?).await?;
    client.put("fruit/apple", "red", None).await?;
    client.put("fruit/pear", "green", None).await?;

    let previous = PutOptions::new().with_prev_key();
    let response = client.put("fruit/apple", "yellow", previous).await?;
    if let Some(before) = response.prev_key() {
        println!("before: {}", String::from_utf8_lossy(before.value()));
    }

    let all = GetOptions::new()
        .with_prefix()
        .with_sort(SortTarget::Key, SortOrder::Descend);
    for kv in client.get("fruit/", all).await?.kvs() {
        let (key, value) = (kv.key(), kv.value());
        println!(
            "{} = {}",
            String::from_utf8_lossy(key),
            String::from_utf8_lossy(value)
        );
    }

    let all = DeleteOptions::new().with_prefix();
    println!("deleted: {}", client.delete("fruit/", all).await?.deleted());
    client.close().await
}
