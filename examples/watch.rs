//! Watches a prefix until three events have arrived. Run with `cargo run --example watch`.

use futures::StreamExt;
use goo_etcd::{Client, Config, EventType, WatchOptions};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::connect("watch", Config::from_env()?).await?;
    // From here on no event is missed: the watch resumes when its connection is lost.
    let mut watch = client
        .watch("config/", WatchOptions::new().with_prefix())
        .await?;
    client.put("config/level", "info", None).await?;
    client.put("config/level", "debug", None).await?;
    client.delete("config/level", None).await?;

    let mut seen = 0;
    while seen < 3
        && let Some(response) = watch.next().await
    {
        for event in response?.events() {
            seen += 1;
            let Some(kv) = event.kv() else { continue };
            let (key, value) = (
                String::from_utf8_lossy(kv.key()),
                String::from_utf8_lossy(kv.value()),
            );
            match event.event_type() {
                EventType::Put => println!("{key} = {value}"),
                EventType::Delete => println!("{key} is deleted"),
            }
        }
    }
    client.close().await
}
