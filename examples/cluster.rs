//! Lists the members of a cluster and their status. Run with `cargo run --example cluster`.

use goo_etcd::{Client, Config};

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    let client = Client::connect("cluster", Config::from_env()?).await?;
    for member in client.member_list().await?.members() {
        for url in member.client_urls() {
            // Calls this member only, on a separate connection.
            match client.status(url).await {
                Ok(status) => println!(
                    "{} at {url}: etcd {}, {} bytes{}",
                    member.name(),
                    status.version(),
                    status.db_size(),
                    if status.leader() == member.id() {
                        ", leads"
                    } else {
                        ""
                    },
                ),
                Err(error) => println!("{} at {url}: {error}", member.name()),
            }
        }
    }
    client.close().await
}
